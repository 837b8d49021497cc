"""Two models, position by position: how far apart their predictions lie, and where.

Divergences of the next-token distributions of a reference and of each other checkpoint, on the same windows of text,
over all positions as mean, rmse, p95 and max: the mean hides a few positions where a model broke, the others do not.
*forward* is KL(reference‖other), *reverse* KL(other‖reference). The models compute their logits in float32, all that
follows is in float64. `--demo` shows on 60 made-up positions why the mean is blind, and needs no checkpoint.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from harness.diagnostics import Diagnostic, Result, Subject, entry, run, write_json
from harness.errors import UserError, run_cli
from harness.figures import RUN_STYLES, new_figure, print_table, save_figure
from harness.tokenizer import Tokenizer, different_tokenizers
from measure.divergence import (
    AGGREGATES,
    aggregate,
    hellinger,
    jensen_shannon,
    kl_divergence,
    renyi,
    total_variation,
)
from measure.perplexity import nonfinite

BLOCK = 2**21  # log-probabilities of a model that are held in float64 at a time
CONTEXT = 40  # tokens of text shown before a worst position
DIVERGENCES = {
    "kl_forward": "KL(reference‖other), nats",
    "kl_reverse": "KL(other‖reference), nats",
    "jensen_shannon": "½KL(p‖m) + ½KL(q‖m), m = ½(p + q): nats, at most ln 2",
    "total_variation": "½Σ|p − q|, at most 1",
    "hellinger": "√(½Σ(√p − √q)²), with the ½: at most 1",
    "renyi": "of the reference from the other, log(Σ p^α q^(1−α))/(α − 1), α = --order, nats",
}
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
    "and max long before the mean."
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
    """Also tells the reference from the others: the first of the positional arguments."""
    if len(args.checkpoints) < 2:
        raise UserError(
            f"{args.checkpoints[0]} is alone: give a reference and at least one checkpoint to compare with it"
        )
    args.reference, *args.checkpoints = args.checkpoints
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
    # the windows of the shorter context, and the corpus of whichever knows one
    shorter = min((reference, other), key=lambda s: s.model.config.block_size)
    knows = other if "corpus" in other.info or args.data else reference
    corpus, block_size = knows.corpus, shorter.model.config.block_size
    shorter.corpus = corpus
    offsets = shorter.offsets(count=args.batches * args.batch_size)

    found, worst, start = [], [], 0
    for x, y in shorter.batches(offsets, what="positions"):
        logits = [logits_of(subject, x) for subject in (reference, other)]  # (B·T, V) each
        values, likeliest = divergences(*logits, args.order)
        found.append(values.view(len(DIVERGENCES), *x.shape))
        reverse = values[list(DIVERGENCES).index("kl_reverse")]
        for i in reverse.topk(min(args.worst, len(reverse))).indices.tolist():
            window, t = divmod(i, block_size)
            at = {"position": int(offsets[start + window]) + t + 1, "kl_reverse": reverse[i].item()}
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
    summary |= {f"{row['divergence']}_{how}": row[how] for row in rows[:2] for how in AGGREGATES}  # for --wandb
    return Result(rows, summary, notes, tables)


@torch.no_grad()
def logits_of(subject: Subject, idx: Tensor) -> Tensor:
    """(B, T) → (B·T, V). UserError where they are not finite, which says where that comes from."""
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


@torch.no_grad()
def divergences(reference: Tensor, other: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Of logits (N, V): (divergences, N) in float64 on the CPU, and the likeliest token of each model with its
    probability, (2 models, 2, N). Block by block, since in float64 they are larger than the logits themselves."""
    rows, values, likeliest = max(1, BLOCK // reference.size(-1)), [], []
    for blocks in zip(reference.split(rows), other.split(rows), strict=True):
        p, q = (torch.log_softmax((x.cpu() if x.device.type == "mps" else x).double(), -1) for x in blocks)
        found = (kl_divergence(p, q), kl_divergence(q, p), jensen_shannon(p, q), total_variation(p, q))
        values.append(torch.stack((*found, hellinger(p, q), renyi(p, q, order))).cpu())
        tops = [x.max(-1) for x in (p, q)]
        likeliest.append(torch.stack([torch.stack((top.indices.double(), top.values.exp())) for top in tops]).cpu())
    return torch.cat(values, dim=1), torch.cat(likeliest, dim=2)


def aggregates(values: Tensor) -> list[dict]:
    """A row for each divergence from its values (divergences, N)."""
    table = {how: aggregate(values, how).tolist() for how in AGGREGATES}
    return [{"divergence": name, **{how: table[how][i] for how in AGGREGATES}} for i, name in enumerate(DIVERGENCES)]


def hinge(rows: list[dict], tau: float) -> list[dict]:
    return [{"divergence": row["divergence"], **{how: row[how] > tau for how in AGGREGATES}} for row in rows]


def hinge_sentence(rows: list[dict], tau: float) -> str:
    reverse = next(row for row in rows if row["divergence"] == "kl_reverse")
    quiet, firing = ([how for how in AGGREGATES if (reverse[how] > tau) is fires] for fires in (False, True))
    if not quiet or not firing:
        said = "all four aggregates fire" if firing else "no aggregate fires"
    else:
        said = f"{listed(quiet)} {'does' if len(quiet) == 1 else 'do'} not fire, while {listed(firing)} "
        said += "does" if len(firing) == 1 else "do"
    return f"at τ = {tau:g}, on KL(other‖reference), {said}"


def listed(names: list[str]) -> str:
    return "the " + " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def histogram(values: Tensor) -> list[dict]:
    """Positions by the size of their KL, four bins a decade; the first takes all below, the last all above."""
    edges = np.logspace(-6, 2, 33)
    counts = {}
    for name in ("kl_forward", "kl_reverse"):
        of_name = values[list(DIVERGENCES).index(name)].numpy()
        counts[name] = np.histogram(np.clip(of_name, edges[0], edges[-1]), edges)[0].tolist()
    return [
        {"from": edges[i], "to": edges[i + 1], **{name: count[i] for name, count in counts.items()}}
        for i in range(len(edges) - 1)
    ]


def as_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """As a Python string literal; ids that only pad the vocabulary stand for nothing."""
    if padding := [i for i in ids if i >= tokenizer.vocab_size]:
        return f"<{padding[0]}>"
    return repr(tokenizer.decode(ids))


def draw(result: Result, title: str) -> Figure:
    figure, (left, right) = new_figure(1, 2)
    figure.suptitle(f"{title}: divergence from the reference", x=0.01, ha="left")
    bins = result.tables["histogram"]
    for name, style in zip(("kl_forward", "kl_reverse"), RUN_STYLES, strict=False):
        edges = [b["from"] for b in bins] + [bins[-1]["to"]]
        left.stairs([b[name] for b in bins], edges, label=name, color=style["color"], linestyle=style["linestyle"])
    left.set(title="positions by their KL", xscale="log", xlabel="nats", ylabel="positions")
    left.legend()
    positions = [row for row in result.tables["by_position"] if row["divergence"] == "kl_reverse"]
    for how, style in zip(AGGREGATES, RUN_STYLES, strict=False):
        values = [row[how] for row in positions]
        right.plot([row["position"] for row in positions], values, label=how, **style | {"marker": ""})
    if "tau" in result.summary:
        right.axhline(result.summary["tau"], color="#777777", linewidth=0.8, label="τ")
    right.set(title="KL(other‖reference) by position", xlabel="position in the window", ylabel="nats")
    if any(row["max"] for row in positions):
        right.set_yscale("log")
    for formatter in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        formatter(LogFormatter())
    right.legend(ncols=2)
    return figure


# --- the demonstration ------------------------------------------------------------------------------------------------


def demo(argv: list[str]) -> None:
    """Two students of one teacher on 60 positions: one coherently shifted, one caught in a loop at four of them."""
    parser = argparse.ArgumentParser(prog="scripts/compare_kl.py", description=demo.__doc__)
    parser.add_argument("--demo", action="store_true", required=True, help="this one, which takes no checkpoint")
    parser.add_argument("--tau", type=float, default=0.5, metavar="T", help="where the hinge stands; default: 0.5")
    parser.add_argument("--out", type=Path, default=Path("out") / DIAGNOSTIC.name, metavar="DIR", help="%(default)s")
    args = parser.parse_args(argv)
    check_tau(args.tau)
    teacher, students = demo_logits()
    values = {name: divergences(teacher, logits, order=0.5)[0] for name, logits in students.items()}
    of_student = {name: aggregates(v) for name, v in values.items()}
    rows = []
    for coherent, loop in zip(*of_student.values(), strict=True):
        ratio = {how: loop[how] / coherent[how] for how in AGGREGATES}
        for student, numbers in (("coherent", coherent), ("loop", loop), ("loop / coherent", ratio)):
            rows.append(
                {"divergence": coherent["divergence"], "student": student, **{h: numbers[h] for h in AGGREGATES}}
            )
    print_table([row | {h: f"{row[h]:.6f}" for h in AGGREGATES} for row in rows], list(rows[0]))
    sentences = [f"{name}: {hinge_sentence(table, args.tau)}" for name, table in of_student.items()]
    print("\n" + "\n".join(sentences))
    reverse = {name: v[list(DIVERGENCES).index("kl_reverse")] for name, v in values.items()}
    tables = {
        "by_position": [
            {"position": t, **{name: v[t].item() for name, v in reverse.items()}} for t in range(len(teacher))
        ],
        "hinge": [{"student": name, **row} for name, table in of_student.items() for row in hinge(table, args.tau)],
    }
    result = Result(rows, {"tau": args.tau, "positions": len(teacher)}, sentences, tables)
    written = [
        write_json(args.out / f"{DIAGNOSTIC.name}.json", [entry(DIAGNOSTIC.name, None, result)]),
        save_figure(draw_demo(reverse, of_student, args.tau), args.out / f"{DIAGNOSTIC.name}.png"),
    ]
    print("\nwritten: " + ", ".join(map(str, written)))


def demo_logits() -> tuple[Tensor, dict[str, Tensor]]:
    """(60, 200) each: the teacher's, and those of the two students."""
    teacher = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 200)))
    order = teacher.softmax(-1).mean(0).argsort()
    coherent, loop = teacher.clone(), teacher.clone()
    coherent[:, order[100]] += 1.6
    loop[12:16] = -10.0
    loop[12:16, order[3]] = 12.0
    return teacher, {"coherent": coherent, "loop": loop}


def draw_demo(reverse: dict[str, Tensor], of_student: dict[str, list[dict]], tau: float) -> Figure:
    figure, (left, right) = new_figure(1, 2)
    for (name, values), style in zip(reverse.items(), RUN_STYLES, strict=False):
        left.plot(values, label=name, **style | {"marker": ""})
        row = next(r for r in of_student[name] if r["divergence"] == "kl_reverse")
        right.plot(AGGREGATES, [row[how] for how in AGGREGATES], label=name, **style | {"linestyle": ""})
    left.set(title="two students, by position", xlabel="position", ylabel="KL(student‖teacher), nats")
    left.set_yscale("symlog", linthresh=1e-3)  # the loop is 0 elsewhere
    right.axhline(tau, color="#777777", linewidth=0.8)
    right.text(-0.4, tau, f"τ = {tau:g}", va="bottom", fontsize=7.5, color="#444444")
    right.set(title="the mean is blind", yscale="log", ylabel="nats", xlim=(-0.5, 3.5))
    for ax in (left, right):
        ax.legend()
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
        # too long to print, and so not under their own names
        "by_position, in the JSON": BY_POSITION,
        "histogram, in the JSON": HISTOGRAM,
    },
    add_arguments=add_arguments,
    check_arguments=check_arguments,
)


def main() -> None:
    if "--demo" in sys.argv[1:]:
        demo(sys.argv[1:])
    else:
        run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
