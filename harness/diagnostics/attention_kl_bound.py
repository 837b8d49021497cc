"""How far a step moves the attention, and whether the quadratic model ½τ²Var of that holds.

A step of the parameters moves the logits of an attention row along a ray, to first order: from α⁰ to α(τ) ∝ α⁰ e^{τa},
a the exact slopes along the step, τ = 1 the whole of it. KL(α⁰‖α(τ)), forward, and KL(α(τ)‖α⁰), reverse, are ½τ²Var(a)
to second order; what that leaves is bounded by the spread Δ of the slopes, and their Taylor series in τ converges at
least up to the radius π/Δ. In float64, on real text. `--demo` shows the same on three small examples and needs no
checkpoint.

The summary's remainder_share: Σ|KL − ½τ²Var| over Σ KL, over all attention rows: what the quadratic model misses of the
divergence that the step makes.
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.checkpoint import feedback_of
from harness.diagnostics import Diagnostic, Result, Subject
from harness.errors import UserError
from harness.figures import RUN_STYLES, draw_heads, new_figure
from harness.optimizers import saved_optimizer
from measure.divergence import Ray
from measure.feedback import trained_by
from measure.perplexity import nonfinite
from measure.rays import CONSTANT, ENDS, FIELDS, TIGHTNESS, ends, median_curve, medians, rays_of_heads
from measure.slopes import (
    DIRECTIONS,
    LR,
    Direction,
    adamw_direction,
    attention_slopes,
    float64_copy,
    gradient_direction,
    learning_rate,
    length,
    random_direction,
    run_config,
)

CURVE_ROWS = 2048  # attention rows, drawn at random, over which the picture's curves are medians

COLUMNS = {
    "layer": "transformer block, from 0",
    "head": "from 0",
    "variance": "Var: median over rows of the variance of the slopes a under α⁰",
    "spread": "Δ: median of max a − min a",
    "radius": "π/Δ: median of the radius within which the Taylor series in τ surely converges",
    "kl_forward": "median of KL(α⁰‖α(τ)), nats",
    "kl_reverse": "median of KL(α(τ)‖α⁰), nats",
    "quadratic": "median of ½τ²Var, the second-order model of both",
    "remainder_forward": "median of |kl_forward − quadratic|",
    "remainder_reverse": "median of |kl_reverse − quadratic|",
    "bound_forward": "median of τ³Δ³/(36√3): no forward remainder is larger",
    "bound_reverse": "median of τ³Δ³/(18√3): no reverse remainder is larger",
    "tightness_forward": "largest |remainder|/bound of all rows: never above 1 but for rounding",
    "tightness_reverse": "the same of the reverse remainder",
    "beyond_radius": "share of rows with τ > π/Δ",
    "rows": "attention rows with Δ > 0; the others (a softmax head's first query) do not move and are left out",
}
EXTREMES = {
    "layer": "transformer block, from 0",
    "head": "from 0",
    **{
        f"{column}_{end}": f"{what} of the same rows"
        for column in ENDS
        for end, what in (("min", "least"), ("max", "largest"))
    },
}
CURVE = {
    "tau": "in steps, evenly spaced in log τ: from --tau/100 to thrice --tau or the heads' typical radius",
    **{c: f"median at that τ, over some {CURVE_ROWS:,} rows of all heads" for c in FIELDS if c not in CONSTANT},
}
READING = (
    "How to read it: KL close to quadratic means that the head moves as the quadratic model says; then a step in "
    "parameter space has a well-defined size in attention space. beyond_radius near 0 says that the step is small for "
    "the attention, near 1 that no Taylor expansion describes it. remainder ≤ bound always holds; a tightness near 1 "
    "says that some row comes as close as any can: two keys share it, unequally."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} CHECKPOINT [CHECKPOINT …] [options]\n       {parser.prog} --demo [--out DIR]"
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default="adamw",
        help="adamw (the default): what the saved optimizer, whichever it is, would add at its next step, from its "
        "moments, its learning rate and the gradient of --batches training batches; gradient: against that gradient; "
        "random: Gaussian. The latter two have a root mean square of the run's learning rate, about Adam's",
    )
    parser.add_argument("--tau", type=float, default=1.0, metavar="T", help="in steps of that size; default: 1")
    parser.add_argument("--demo", action="store_true", help="three small examples, no checkpoint")


def check_arguments(args: argparse.Namespace) -> None:
    if not 0 < args.tau < math.inf:
        raise UserError(f"--tau {args.tau:g}: above 0 and finite")


def measure(subject: Subject) -> Result:
    model = float64_copy(subject.model.cpu() if subject.device.type == "mps" else subject.model)  # MPS has no float64
    device = next(model.parameters()).device
    for idx, _ in subject.batches(subject.offsets(count=1), what="weights"):
        if findings := nonfinite(model, idx.to(device)):
            raise UserError(f"{subject.path} has no attention to measure: {'; '.join(findings)}")
    direction, notes = direction_of(subject, model, device)
    tau = subject.args.tau
    rays: list[list[Tensor]] = [[] for _ in model.transformer.h]  # of each layer, one a sequence
    drawn: list[tuple[Tensor, Tensor]] = []  # α⁰ and slopes of the rows that the curves are of
    generator = torch.Generator().manual_seed(subject.args.seed)
    sequences = subject.args.batches * subject.args.batch_size
    share = math.ceil(CURVE_ROWS / (sequences * len(rays)))
    try:
        for idx, _ in subject.batches(what="attention rows"):
            for sequence in idx.to(device):
                for layer, (alpha0, slopes) in enumerate(attention_slopes(model, direction, sequence)):
                    rays[layer].append(rays_of_heads(alpha0, slopes, tau))
                    alpha0, slopes = alpha0.flatten(0, 1), slopes.flatten(0, 1)  # (H·T, slots)
                    chosen = torch.randint(len(alpha0), (share,), generator=generator).to(device)
                    drawn.append((alpha0[chosen].cpu(), slopes[chosen].cpu()))
    except ValueError as e:
        raise UserError(f"{subject.path}: {e}") from e
    rows: list[dict] = []
    extremes: list[dict] = []
    sums = dict.fromkeys(("forward", "reverse", "remainder_forward", "remainder_reverse"), 0.0)  # over all rows
    for layer, found in enumerate(rays):
        ray = Ray(*torch.cat(found, dim=-1))  # (heads, rows) each
        sums = {name: so_far + getattr(ray, name).abs().sum().item() for name, so_far in sums.items()}
        for head in range(len(ray.spread)):
            of_head = Ray(*(x[head, ray.spread[head] > 0] for x in ray))
            for table, values in ((rows, medians(of_head, tau)), (extremes, ends(of_head))):
                table.append({"layer": layer, "head": head, **values})
    alpha0, slopes = (torch.cat(x) for x in zip(*drawn, strict=True))
    curve = median_curve(alpha0, slopes, tau, rows)
    summary = {"tau": tau, "step_norm": length(direction), "rows": sum(row["rows"] for row in rows)}
    if moving := [row for row in rows if row["rows"]]:
        beyond = sum(row["beyond_radius"] * row["rows"] for row in moving)
        summary |= {f"max_{column}": max(row[column] for row in moving) for column in TIGHTNESS}
        summary |= {"beyond_radius": beyond / summary["rows"]}
        for way in ("forward", "reverse"):
            summary[f"remainder_share_{way}"] = sums[f"remainder_{way}"] / sums[way] if sums[way] else None
    return Result(rows, summary, notes, {"extremes": extremes, "curve": curve})


def direction_of(subject: Subject, model, device) -> tuple[Direction, list[str]]:
    """The direction asked for, and notes that say what it is."""
    args, kind = subject.args, subject.args.direction
    own_lr = learning_rate(subject.info)
    lr = LR if own_lr is None else own_lr

    def batches():
        offsets = subject.offsets("train", args.batches * args.batch_size)
        for x, y in subject.batches(offsets, "train", "gradient"):
            yield x.to(device), y.to(device)

    if kind == "adamw":
        trained = subject.info.get("model_args", {}).get("block_size")
        if model.config.position == "learned" and trained not in (None, model.config.block_size):
            problem = f"the saved optimizer steps {trained} positions: take another --direction"
            raise UserError(f"--block-size {args.block_size}: {problem}")
        name = run_config(subject.info, "name") or "adamw"
        notes = [f"τ = 1 is the next update of the run's optimizer, {name}, at the learning rate {lr:g}"]
        optimizer = saved_optimizer(model, subject.info, subject.path)
        with trained_by(model, *feedback_of(subject.info, subject.path)):
            return adamw_direction(model, optimizer, batches(), run_config(subject.info, "grad_clip")), notes
    whose = "as the checkpoint knows no learning rate" if own_lr is None else "the run's learning rate"
    notes = [f"τ = 1 is a step whose root mean square over the parameters is {lr:g}, {whose}"]
    if kind == "gradient":
        try:
            with trained_by(model, *feedback_of(subject.info, subject.path)):
                return gradient_direction(model, batches(), lr), notes
        except ValueError as e:
            raise UserError(f"{subject.path}: {e}") from e
    return random_direction(model, lr, args.seed), notes


def draw(result: Result, title: str) -> Figure:
    figure, (kl, remainder, heat) = new_figure(1, 3)
    figure.suptitle(title, x=0.01, ha="left")
    curve, tau = result.tables["curve"], result.summary["tau"]
    steps = [point["tau"] for point in curve]

    def lines(ax, names):
        for (name, label), style in zip(names.items(), RUN_STYLES, strict=False):
            ax.loglog(steps, [point[name] for point in curve], label=label, **style | {"marker": ""})
        ax.axvline(tau, color="#777777", linewidth=0.8, label="the step measured")
        ax.set_xlabel("τ, in steps")
        ax.legend(fontsize=7)

    lines(kl, {"kl_forward": "KL forward", "kl_reverse": "KL reverse", "quadratic": "½τ²Var"})
    kl.set(title="KL and its quadratic model", ylabel="nats, median over rows")
    bounds = {f"{what}_{way}": f"{what} {way}" for way in ("forward", "reverse") for what in ("remainder", "bound")}
    lines(remainder, bounds)
    remainder.set(title="What the model leaves, and its bound", ylabel="nats, median over rows")

    in_radii = [{**row, "log10": math.log10(tau / row["radius"]) if row["radius"] else None} for row in result.rows]
    draw_heads(heat, in_radii, "log10", "log₁₀ τΔ/π; 0: at the radius")
    heat.set_title("τ over the radius π/Δ")
    return figure


DIAGNOSTIC = Diagnostic(
    name="attention_kl_bound",
    about=__doc__,
    columns=COLUMNS,
    measure=measure,
    draw=draw,
    reading=READING,
    # The curve is too long to print. Tables are printed by name, so under another name it is explained but not printed.
    tables={"extremes": EXTREMES, "curve, in the JSON": CURVE},
    add_arguments=add_arguments,
    check_arguments=check_arguments,
    headlines={
        "remainder_share_forward": "of the KL, missed by ½τ²Var; 0: the quadratic model is exact",
        "remainder_share_reverse": "of the KL, missed by ½τ²Var; 0: the quadratic model is exact",
        "beyond_radius": "share of attention rows; 0: all within the series' radius",
    },
    batches=2,
)
