"""The perplexity of checkpoints: `python scripts/perplexity.py CHECKPOINT [CHECKPOINT …]`.

The whole validation set, every token scored exactly once: in windows of block_size that follow on each other, the last
one shorter; or, with --stride S, in windows S apart, of which each scores the tokens that the one before has not seen,
with at least block_size − S tokens of context before them. In windows of documents this goes for each document by
itself, and its first token is never scored. No draw is random: the same numbers every time.

The summary: loss, the mean −ln p in nats a token; perplexity = e^loss; bits_per_byte = loss / ln 2 / the split's mean
bytes a token, which compares models across tokenizers; standard_error of the loss; tokens, how many were scored. The
losses of neighbouring tokens go together, and even windows are alike within a document, so the standard error is taken
over long stretches of the text as if these were independent: √W of them, each as many tokens, where W windows were
scored ("batch means"). s/√tokens would be several times too small. It says how the loss varies from text to text, not
from one training run to the next.
"""

import argparse
import math

import numpy as np
import torch
from matplotlib.figure import Figure

from harness.device import add_dtype
from harness.diagnostics import Diagnostic, Result, Subject
from harness.errors import UserError
from harness.figures import RUN_STYLES, new_figure
from measure.perplexity import (
    loss_by_position,
    nonfinite,
    perplexity,
    score,
    standard_error,
    stretches,
)

COLUMNS = {
    "position": "how many tokens the prediction could see, from 1 to block_size; a row is a bin, this its first",
    "up_to": "the bin's last position",
    "loss": "mean loss of the tokens predicted there, in nats a token",
    "standard_error": "of that mean, over stretches of the text; – where all of them are in one stretch",
    "tokens": "how many tokens were predicted there",
}


def measure(subject: Subject) -> Result:
    args, block_size = subject.args, subject.model.config.block_size
    stride = args.stride or block_size
    if stride > block_size:
        raise UserError(
            f"--stride {stride} would skip tokens, the context of {subject.path} is {block_size}: give at most that"
        )
    windows = subject.windows()
    early = int(subject.bos is not None)  # behind a token of its own, the text's first token is a target too
    offsets = windows.validation(args.batches and args.batches * args.batch_size, stride, early)
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        batches = subject.batches(offsets, what="perplexity")
        scores = score(subject.model, batches, offsets, stride, windows.starts)

    notes = []
    if bad := int((~np.isfinite(scores.losses)).sum()):
        first = int(np.isfinite(scores.losses).argmin())
        notes.append(
            f"{bad} of {len(scores.losses)} losses are NaN or Inf, the first that of token "
            f"{scores.targets[first] - early}"
        )
        window = scores.targets[first : first + 1] - scores.positions[first]  # where the one that scored it starts
        x, _ = next(subject.batches(window))
        notes += nonfinite(subject.model, x)
    loss, bytes_per_target = float(scores.losses.mean()), windows.bytes_per_target
    summary = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_target if bytes_per_target else None,
        "standard_error": standard_error(scores.losses, stretches(scores, block_size)),
        "tokens": len(scores.losses),
    }
    return Result(loss_by_position(scores, block_size), summary, notes)


def draw(result: Result, title: str) -> Figure:
    figure, (axes,) = new_figure()
    known = [row for row in result.rows if row["standard_error"] is not None]
    rows = known or result.rows  # without the bins, of few tokens mostly, that lie in one stretch of the text
    center = [math.sqrt(row["position"] * row["up_to"]) for row in rows]
    loss, error = (np.array([row[key] for row in rows], dtype=float) for key in ("loss", "standard_error"))
    axes.plot(center, loss, **RUN_STYLES[0], label="mean loss")
    axes.fill_between(
        center,
        loss - 2 * error,
        loss + 2 * error,
        color=RUN_STYLES[0]["color"],
        alpha=0.25,
        linewidth=0,
        label="± 2 standard errors",
    )
    if (mean := result.summary["loss"]) is not None:
        axes.axhline(mean, color="#555555", linestyle=(0, (5, 2)), linewidth=1, label=f"all positions: {mean:.4f}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, 1.1 * rows[-1]["up_to"])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        title=f"{title}: loss by position",
        xlabel="position: tokens the prediction could see",
        ylabel="loss, nats a token",
    )
    axes.legend()
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride", type=int, metavar="S", help="tokens from one window to the next; default: block_size, no overlap"
    )
    add_dtype(parser, "bfloat16")


def check_arguments(args: argparse.Namespace) -> None:
    if args.stride is not None and args.stride < 1:
        raise UserError(f"--stride {args.stride}: at least 1, at most the model's block_size")


DIAGNOSTIC = Diagnostic(
    name="perplexity",
    about=__doc__,
    columns=COLUMNS,
    measure=measure,
    draw=draw,
    headlines={"loss": "nats a token; lower is better", "bits_per_byte": "bits a byte; lower is better"},
    reading="How to read it: the loss falls along the context as far as the model makes use of what it sees; where it "
    "is level, more context is of no use to it. Losses on different texts differ if they lie more than two or three "
    "standard errors apart. Two models on the same text meet the same easy and hard blocks, so a smaller difference "
    "than that can be real.",
    add_arguments=add_arguments,
    check_arguments=check_arguments,
    batches=None,
    batch_size=16,
)
