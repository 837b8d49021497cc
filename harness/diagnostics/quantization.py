"""Perplexity after simulated post-training quantization: `python scripts/quantization.py CHECKPOINT [CHECKPOINT …]`.

Outliers stretch the range that an integer grid has to cover. So weights (W) and activations (A) are rounded to 8, 6 or
4 bits by PyTorch's fake_quantize operators, everything else computes in float, and the loss on the evaluation windows
says what it cost. Weights have a symmetric grid, activations an asymmetric one, which holds 0 exactly. Activations are
rounded where integer kernels would read them: the inputs of the linear layers of each block (attn.c_attn, attn.c_proj,
mlp.c_fc, whose input the gate mlp.c_gate of a SwiGLU reads too, and mlp.c_proj, which reads the MLP's hidden layer,
gelu(c_fc(x)) or silu(c_gate(x)) · c_fc(x)), the attention probabilities, and the residual stream after the embedding
and after each block. The head stays in float without --head, the embedding and the norms always.

The schemes:
  W8, W4 per channel       weights alone, a scale for each output channel
  W8A8, W6A6 min-max       a scale for each tensor; activations' from their whole range over the calibration windows
  W8A8, W6A6 percentile    the same without the extremes of that range, see --percentile
  W8A8, W6A6 per token     a scale for each weight tensor, and for each token's activations anew; no calibration
  A8, A6 only SITE         activations alone, min-max, at one kind of site
The calibration windows are drawn at random from the training split, --seeds times. The attention probabilities of a
softmax need no calibration, their static range is [0, 1].

The layers' signal-to-noise ratio is 10 log₁₀ Σy² / Σ(ŷ − y)², where ŷ is computed from the quantized tensor (and linear
layer's weight) alone and y without: y is the linear layer's output, P v for the attention probabilities P, and for the
residual stream the output of the norm that reads it next (of both norms, where the next block's attention and MLP read
it in parallel). In the tensor itself, one outlier channel would pass for a strong signal.

The summary: the float model's loss and perplexity, and perplexity_rise and loss of each scheme with weights.
"""

import argparse
import math
from fnmatch import fnmatchcase as fnmatch

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator
from tqdm import tqdm

from harness.diagnostics import Diagnostic, Result, Subject
from harness.errors import UserError
from harness.figures import RUN_STYLES, heat_map, new_figure
from measure.perplexity import nonfinite, perplexity, score, standard_error, stretches
from measure.quantize import HEAD, KINDS, Scheme, calibrate, quantized, schemes, signal_to_noise

FLOAT = "float"
COLUMNS = {
    "scheme": "how the model is quantized, see above; the first row is the unquantized model",
    "loss": "in nats a token; the mean over the calibration draws, as all that follows",
    "perplexity": "e^loss",
    "perplexity_rise": "over the unquantized model on the same windows; – where that of the latter is beyond float64",
    "spread": "standard deviation of that rise over the calibration draws; – without calibration, or with one draw",
    "loss_rise": "of the loss over the unquantized model's, in nats a token",
    "standard_error": "of loss_rise, over stretches of the text as in perplexity.py; both models see the same tokens",
}
SUMMARY = ("perplexity_rise", "loss")  # the columns that the summary has of each scheme with weights
SHOWN = WORST_FIRST, WITHOUT_OUTLIERS = "W8A8 min-max", "W8A8 per token"
LAYERS = {
    "name": "the tensor: a linear layer's input, attention probabilities, or the residual stream (`site` in the JSON)",
    "layer": "the block it is in; – for the embedding and the head",
    **{
        scheme.name: f"its signal-to-noise ratio under {scheme.name}, in dB"
        for scheme in schemes()
        if scheme.weight_bits
    },
}


def measure(subject: Subject) -> Result:
    args, model, T = subject.args, subject.model, subject.model.config.block_size
    offsets = subject.offsets(count=args.batches * args.batch_size)
    batches = list(subject.batches(offsets, what="reading"))
    draws = [calibration_windows(subject, draw) for draw in range(args.seeds)]
    for idx in (*(x for x, _ in batches), *draws):
        if findings := nonfinite(model, idx):
            unknown = {"loss": None, "perplexity": None}
            return Result([{"scheme": FLOAT, **unknown}], unknown, [f"not quantized: {'; '.join(findings)}"])

    before = score(model, batches, offsets, T)
    chosen = [scheme for scheme in schemes(args.head) if any(fnmatch(scheme.name, glob) for glob in args.schemes)]
    found: dict[Scheme, list[np.ndarray]] = {scheme: [] for scheme in chosen}  # each draw's losses (n,)
    layers: list[dict] = []
    with tqdm(total=len(draws) * len(found), desc="schemes", leave=False, disable=None) as bar:
        for windows in draws:
            ranges = calibrate(model, windows, args.batch_size, args.percentile, args.head)
            if not layers:
                compared = [s for s in schemes(args.head) if s.name in SHOWN or (s in found and s.weight_bits)]
                reading = tqdm([x for x, _ in batches], desc="signal to noise", leave=False, disable=None)
                layers = signal_to_noise(model, reading, compared, ranges, args.head)
            for scheme, losses in found.items():
                if scheme.calibrated(model) or not losses:
                    with quantized(model, scheme, ranges, args.head):
                        losses.append(score(model, batches, offsets, T).losses)
                bar.update()

    loss = float(before.losses.mean())
    base = perplexity(loss)
    rows: list[dict] = [{"scheme": FLOAT, "loss": loss, "perplexity": base, "perplexity_rise": 0.0, "loss_rise": 0.0}]
    for scheme, losses in found.items():
        perplexities = np.array([perplexity(float(draw.mean())) for draw in losses])
        largest = perplexities.max()  # divided by it, not even the squares of e^700 overflow
        mean = float(largest * (perplexities / largest).mean()) if np.isfinite(largest) else math.inf
        known = len(perplexities) > 1 and math.isfinite(mean)
        rise = np.mean(losses, axis=0) - before.losses
        rows.append(
            {
                "scheme": scheme.name,
                "loss": float(np.mean(losses)),
                "perplexity": mean,
                "perplexity_rise": mean - base if math.isfinite(base) else None,
                "spread": float(largest * (perplexities / largest).std(ddof=1)) if known else None,
                "loss_rise": float(rise.mean()),
                "standard_error": standard_error(rise, stretches(before, T)),
            }
        )
    layers.sort(key=lambda row: row[WORST_FIRST] if row[WORST_FIRST] is not None else np.inf)
    quantized_weights = [row for row in rows if row["scheme"].startswith("W")]
    summary = {"loss": loss, "perplexity": base}
    summary |= {f"{column} {row['scheme']}": row[column] for column in SUMMARY for row in quantized_weights}
    return Result(rows, summary, where_it_hurts(rows, layers), {"layers": layers})


def calibration_windows(subject: Subject, draw: int) -> torch.Tensor:
    """--calibration windows (N, T) int64 of the training split: a function of --seed and the number of the draw."""
    windows = subject.windows("train")
    offsets = windows.training(subject.args.seed, draw, subject.args.calibration, whole=True)
    return torch.cat([x for x, _ in subject.batches(offsets, "train", "calibration")])


def where_it_hurts(rows: list[dict], layers: list[dict]) -> list[str]:
    notes = []
    for bits in (8, 6) if math.isfinite(rows[0]["perplexity"]) else ():
        alone = [row for row in rows if row["scheme"].startswith(f"A{bits} only")]
        if not alone:  # --schemes has left them out
            continue
        worst = max(alone, key=lambda row: row["perplexity_rise"])
        site, rise = worst["scheme"].removeprefix(f"A{bits} only "), worst["perplexity_rise"]
        notes.append(f"largest rise from activations of one kind alone, at {bits} bits: {site}, {rise:.3g}")
    worst = layers[0]
    if worst[WORST_FIRST] is not None:
        notes.append(f"lowest signal-to-noise ratio under {WORST_FIRST}: {worst['name']}, {worst[WORST_FIRST]:.1f} dB")
    return notes


def draw(result: Result, title: str) -> Figure:
    figure, (upper_left, upper_right, lower_left, lower_right) = new_figure(2, 2)
    figure.set_size_inches(9.5, 6.8)
    figure.suptitle(f"{title}: quantization")
    base, rows = result.rows[0]["perplexity"], result.rows[1:]  # base is None only where there are no rows
    layers = result.tables.get("layers", [])
    whole = {row["scheme"]: [row] for row in rows if row["scheme"].startswith("W")}
    alone = {kind: [row for row in rows if row["scheme"].endswith(f" only {kind}")] for kind in (*KINDS, HEAD)}
    for axes, found, what in (
        (upper_left, whole, "weights, and with activations"),
        (upper_right, {kind: found for kind, found in alone.items() if found}, "activations alone, min-max"),
    ):
        if rows and not found:  # --schemes has left them out
            axes.set_axis_off()
            continue
        draw_rises(axes, found, base)
        axes.set_title(what)
    both = [axes.get_legend_handles_labels() for axes in (upper_left, upper_right)]
    by_bits = {label: handle for found in both for handle, label in zip(*found, strict=True)}  # one entry each
    labels = sorted(by_bits, reverse=True)
    figure.legend([by_bits[label] for label in labels], labels, loc="outside lower center", ncols=3, title="above:")
    decibels = [row[name] for row in layers for name in (WORST_FIRST, WITHOUT_OUTLIERS) if row[name] is not None]
    for axes, name in ((lower_left, WORST_FIRST), (lower_right, WITHOUT_OUTLIERS)):
        axes.set_title(name)
        image = draw_layers(axes, layers, name, min(decibels, default=0), max(decibels, default=1))
    lower_right.set_yticklabels([])
    figure.colorbar(image, ax=[lower_left, lower_right], label="signal to noise, dB")
    return figure


def draw_rises(axes: Axes, rows: dict[str, list[dict]], base: float) -> None:
    """A line for each label, from top to bottom, with the rises of its schemes in percent of the perplexity `base`."""
    drawn = [(y, row) for y, found in enumerate(rows.values()) for row in found if row["perplexity_rise"] is not None]
    ends = [0.0]
    for y, row in drawn:
        ends += [100 * (row["perplexity_rise"] + sign * (row["spread"] or 0)) / base for sign in (-1, 1)]
        bits = row["scheme"][1]
        style = RUN_STYLES["864".index(bits)]
        axes.errorbar(
            100 * row["perplexity_rise"] / base,
            y,
            xerr=100 * (row["spread"] or 0) / base,
            color=style["color"],
            marker=style["marker"],
            linestyle="none",
            capsize=3,
            label=f"{bits} bits",
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.6)  # linear around 0, since a rise may be negative
    ends = [end for end in ends if math.isfinite(1.5 * end)]
    left, right = min(1.5 * min(ends), -0.02), max(1.5 * max(ends), 0.05)
    axes.set_xlim(left, right)
    # The first decade and the figures within one, for which there is room; of many decades every so many alike.
    if left < -0.1 or right >= 5:
        first, steps = (0 if right >= 100 else -1), [1]
    else:
        first, steps = (-2, [5, 10]) if right < 0.2 else (-1, [1, 2, 5])
    decades = range(first, 1 + math.ceil(math.log10(max(right, -left))))
    ticks = sorted({step * 10.0**n for n in decades[:: -(-len(decades) // 6)] for step in steps})
    axes.xaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0, *ticks]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    axes.grid(False, axis="y")
    spread = any(row["spread"] is not None for found in rows.values() for row in found)
    axes.set_xlabel("rise in perplexity, %" + (" ± spread over calibrations" if spread else ""))


def draw_layers(axes: Axes, layers: list[dict], scheme: str, low: float, high: float) -> AxesImage:
    """A heat map of a scheme's signal-to-noise ratios: a row for each kind of site, a column for each block, with the
    embedding before the blocks and the head behind them."""
    kinds = [kind for kind in (*KINDS, HEAD) if any(row["site"] == kind for row in layers)]
    last = max((row["layer"] for row in layers if row["layer"] is not None), default=-1)
    blocks = ["emb", *range(last + 1), "head"][: None if HEAD in kinds else -1]
    grid = np.full((max(len(kinds), 1), len(blocks)), np.nan)
    for row in layers:
        column = row["layer"] + 1 if row["layer"] is not None else len(blocks) - 1 if row["site"] == HEAD else 0
        value = np.nan if row[scheme] is None else row[scheme]
        cell = kinds.index(row["site"]), column
        grid[cell] = np.fmin(grid[cell], value)  # c_gate and c_fc read one tensor: the worse of the two
    image = heat_map(axes, grid, low, high, "{:.0f}" if len(blocks) <= 14 else "")
    axes.set_yticks(range(len(kinds)), kinds)
    step = -(-len(blocks) // 12)
    axes.set_xticks(range(0, len(blocks), step), blocks[::step])
    axes.set_xlabel("block")
    return image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head",
        action="store_true",
        help="quantize lm_head too, its weight and its input; holds a batch's logits several times over",
    )
    parser.add_argument(
        "--schemes", nargs="+", default=["*"], metavar="GLOB", help="those of the schemes, as 'W8A8*'; default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="calibration draws; default: 3")
    parser.add_argument("--calibration", type=int, default=32, metavar="N", help="training windows a draw; default: 32")
    parser.add_argument(
        "--percentile",
        type=float,
        default=99.99,
        metavar="P",
        help="the percentile schemes' range is from the (100 − P)th to the Pth percentile of a tensor; default: 99.99",
    )


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("seeds", "calibration"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    for glob in args.schemes:
        if not any(fnmatch(scheme.name, glob) for scheme in schemes(args.head)):
            raise UserError(f"--schemes {glob!r} is none of {', '.join(scheme.name for scheme in schemes(args.head))}")
    if not 50 < args.percentile < 100:
        raise UserError(f"--percentile {args.percentile}: above 50 and below 100")


DIAGNOSTIC = Diagnostic(
    name="quantization",
    about=__doc__,
    columns=COLUMNS,
    tables={"layers": LAYERS},
    measure=measure,
    draw=draw,
    headlines={
        f"perplexity_rise {scheme}": "perplexity a token; lower is better"
        for scheme in ("W4 per channel", "W8A8 min-max", "W6A6 min-max")
    },
    reading="How to read it: min-max far above percentile or per token means that a few extreme values stretch the "
    "range and take the resolution from all others: outliers (of the probabilities, whose range is fixed: that most "
    "are small). The 'only' rows say which kind of activation suffers, the layers (worst first; 6 dB are one bit) "
    "where. A loss_rise of less than two standard errors may be none.",
    add_arguments=add_arguments,
    check_arguments=check_arguments,
    batches=8,
    batch_size=16,
)
