"""Two models, position by position: how far apart their predictions lie, and where.

Divergences of the next-token distributions of a reference and of each other checkpoint, on the same windows of text,
over all positions as mean, rmse, p95 and max: the mean hides a few positions where a model broke, the others do not.
*forward* is KL(reference‖other), *reverse* KL(other‖reference). The models compute their logits in float32, all that
follows is in float64. `--demo` shows on 60 made-up positions why the mean is blind, and needs no checkpoint.
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.diagnostics import Diagnostic, Result, Subject
from harness.errors import UserError
from harness.figures import RUN_STYLES, integer_ticks, new_figure
from harness.tokenizer import Tokenizer, different_tokenizers
from measure.divergence import AGGREGATES
from measure.perplexity import nonfinite
from measure.predictions import DIVERGENCES, aggregates, divergences, hinge, hinge_sentence, histogram

CONTEXT = 40  # tokens of text shown before a worst position
COLUMNS = {
    "divergence": "; ".join(f"{name}: {meaning}" for name, meaning in DIVERGENCES.items()),
    "mean": "over positions",
    "rmse": "√ of the mean of squares",
    "p95": "95th percentile, linear interpolation",
    "max": "the worst position's",
}
WORST = {
    "position": "of the predicted token in the split, in tokens from 0",
    "kl_reverse": "at this position; the worst first",
    "kl_forward": "at this position",
    "text": f"the {CONTEXT} tokens before it, or those that the window has, as a string literal",
    "next": "the token that follows in the text; '' at its end",
    "reference": "the reference's likeliest token, and its probability",
    "other": "the other's likeliest token, and its probability",
}
BY_POSITION = {
    "position": "in the window, from 0",
    "divergence, mean, rmse, p95, max": "as above, over the windows at this position",
}
HISTOGRAM = {
    "from, to": "a bin of nats, four to the decade; the first also takes what is below, the last what is above",
    "kl_forward, kl_reverse": "positions whose KL is in it",
}
HINGE = {
    "divergence": "as above",
    **{how: f"whether relu({how} − T) is above 0, T = --tau" for how in AGGREGATES},
}
READING = (
    "How to read it: rmse far above the mean, or max far above p95, says that a few positions carry the divergence: "
    "look at the worst ones. A coherent shift moves all four alike; a model caught in a loop, say, shows in rmse, p95 "
    "and max long before the mean. The summary's …_over_mean, of the two KLs, are rmse, p95 and max over the mean: how "
    "far outliers stand out of it, however large it is; without a value where the mean is 0."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} REFERENCE CKPT [CKPT …] [options]\n       {parser.prog} --demo [--tau T] [--out DIR]"
    parser.add_argument(
        "--tau",
        type=float,
        metavar="T",
        help="say which aggregates exceed it: a hinge there would fire. The aggregates are over all positions at once; "
        "the barrier of training takes that of each sequence and averages the hinges, so it may fire where this does "
        "not",
    )
    parser.add_argument("--order", type=float, default=0.5, metavar="α", help="of Rényi's divergence; default: 0.5")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="positions shown with their text; default: 8")
    parser.add_argument("--demo", action="store_true", help="60 made-up positions, no checkpoint")


def check_arguments(args: argparse.Namespace) -> None:
    if len(args.checkpoints) < 2:
        raise UserError(
            f"{args.checkpoints[0]} is alone: give a reference and at least one checkpoint to compare with it"
        )
    check_tau(args.tau)
    if not args.order >= 0:
        raise UserError(f"--order {args.order:g}: at least 0")
    if args.worst < 0:
        raise UserError(f"--worst {args.worst}: at least 0")


def check_tau(tau: float | None) -> None:
    if tau is not None and not 0 <= tau < math.inf:
        raise UserError(f"--tau {tau:g}: at least 0 and finite")


def measure(other: Subject) -> Result:
    args = other.args
    reference = Subject(args.reference, args)
    check_vocabularies(reference, other)
    # Both models read windows of the shorter of their contexts. The corpus is that of the one that names a corpus.
    shorter = min((reference, other), key=lambda s: s.model.config.block_size)
    knows = other if other.corpus_folder else reference
    corpus, block_size = knows.corpus, shorter.model.config.block_size
    for subject in (reference, other):
        corpus.check_fits(subject.path, subject.info, subject.model.config.vocab_size)
    shorter.corpus = corpus
    offsets = shorter.offsets(count=args.batches * args.batch_size)

    found, worst, start = [], [], 0
    for x, y in shorter.batches(offsets, what="positions"):
        values, likeliest = divergences(logits_of(reference, x), logits_of(other, x), args.order)
        found.append(values.view(len(DIVERGENCES), *x.shape))
        reverse = values[list(DIVERGENCES).index("kl_reverse")]
        for i in reverse.topk(min(args.worst, len(reverse))).indices.tolist():
            window, t = divmod(i, block_size)
            at = {"position": int(offsets[start + window]) + t + (shorter.bos is None), "kl_reverse": reverse[i].item()}
            at |= {"kl_forward": values[list(DIVERGENCES).index("kl_forward"), i].item()}
            at |= {"text": as_text(corpus.tokenizer, x[window, max(0, t + 1 - CONTEXT) : t + 1].tolist())}
            at |= {"next": as_text(corpus.tokenizer, [token for token in y[window, t : t + 1].tolist() if token >= 0])}
            for name, (token, p) in zip(("reference", "other"), likeliest[:, :, i].tolist(), strict=True):
                at[name] = f"{as_text(corpus.tokenizer, [int(token)])} {p:.3f}"
            worst.append(at)
        worst = sorted(worst, key=lambda at: -at["kl_reverse"])[: args.worst]
        start += len(x)
    per_position = torch.cat(found, dim=1)  # (divergences, windows, T)
    rows = aggregates(per_position.flatten(1))
    notes = [f"the reference is {reference.path}, step {reference.step}; Rényi's order is {args.order:g}"]
    by_position = [{"position": t, **row} for t in range(block_size) for row in aggregates(per_position[:, :, t])]
    tables = {"worst": worst, "by_position": by_position, "histogram": histogram(per_position.flatten(1))}
    if args.tau is not None:
        tables["hinge"] = hinge(rows, args.tau)
        notes.append(hinge_sentence(rows, args.tau))
    summary = {"positions": per_position[0].numel()} | ({} if args.tau is None else {"tau": args.tau})
    for row in rows[:2]:  # for --wandb
        name, mean = row["divergence"], row["mean"]
        summary |= {f"{name}_{how}": row[how] for how in AGGREGATES}
        summary |= {f"{name}_{how}_over_mean": row[how] / mean if mean else None for how in AGGREGATES if how != "mean"}
    return Result(rows, summary, notes, tables)


@torch.no_grad()
def logits_of(subject: Subject, idx: Tensor) -> Tensor:
    """The logits (B·T, V) on idx (B, T). If they are not finite, a UserError says where that starts in the model."""
    logits, _ = subject.model(idx)
    if not logits.isfinite().all():
        findings = "; ".join(nonfinite(subject.model, idx))
        raise UserError(f"{subject.path} predicts no distribution to compare: {findings}")
    return logits.flatten(0, 1)


def check_vocabularies(reference: Subject, other: Subject) -> None:
    sizes = [subject.model.config.vocab_size for subject in (reference, other)]
    differ = different_tokenizers(*(subject.info.get("corpus", {}) for subject in (reference, other)))
    if sizes[0] != sizes[1]:
        what = f"{sizes[0]} and {sizes[1]} token ids"
    elif differ:
        what = f"other tokens ({' and '.join(differ)})"
    else:
        return
    raise UserError(f"{reference.path} and {other.path} have {what}: only models of one vocabulary can be compared")


def as_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids` as a Python string literal. Ids that only pad the vocabulary have none: the first as `<id>`."""
    if padding := [i for i in ids if i >= tokenizer.vocab_size]:
        return f"<{padding[0]}>"
    return repr(tokenizer.decode(ids))


def draw(result: Result, title: str) -> Figure:
    figure, (left, right) = new_figure(1, 2)
    figure.suptitle(f"{title}: divergence from the reference", x=0.01, ha="left")
    bins = result.tables["histogram"]
    edges = [b["from"] for b in bins] + [bins[-1]["to"]]
    names = {"kl_forward": "KL(reference‖other)", "kl_reverse": "KL(other‖reference)"}
    for (name, label), style in zip(names.items(), RUN_STYLES, strict=False):
        left.stairs([b[name] for b in bins], edges, label=label, color=style["color"], linestyle=style["linestyle"])
    filled = [b for b in bins if any(b[name] for name in names)]
    left.set(title="Positions by their KL", xscale="log", xlabel="KL, nats", ylabel="number of positions")
    left.set(xlim=(filled[0]["from"] / 2, 2 * filled[-1]["to"]))
    integer_ticks(left.yaxis)
    left.set_ylim(0, 1.4 * left.get_ylim()[1])  # the legends stand above the curves
    left.legend(loc="upper center")
    positions = [row for row in result.tables["by_position"] if row["divergence"] == "kl_reverse"]
    for how, style in zip(AGGREGATES, RUN_STYLES, strict=False):
        values = [row[how] for row in positions]
        right.plot([row["position"] for row in positions], values, label=how, **style | {"marker": ""})
    if (tau := result.summary.get("tau")) is not None:
        right.axhline(tau, color="#777777", linewidth=0.8, label="τ")
    right.set(title="KL(other‖reference) by position", xlabel="position in the window, from 0", ylabel="KL, nats")
    if any(row["max"] for row in positions):
        right.set_yscale("log")
        low, high = right.get_ylim()
        right.set_ylim(low, high * (high / low) ** 0.4)
    integer_ticks(right.xaxis)
    right.legend(loc="upper center", ncols=3)
    return figure


DIAGNOSTIC = Diagnostic(
    name="compare_kl",
    about=__doc__,
    columns=COLUMNS,
    measure=measure,
    draw=draw,
    reading=READING,
    tables={
        "hinge": HINGE,
        "worst": WORST,
        # These are too long to print. Tables are printed by name, so under other names they are explained, not printed.
        "by_position, in the JSON": BY_POSITION,
        "histogram, in the JSON": HISTOGRAM,
    },
    add_arguments=add_arguments,
    check_arguments=check_arguments,
    takes_reference=True,
    headlines={f"kl_reverse_{how}": "nats a position; lower: nearer to the reference" for how in AGGREGATES},
)
