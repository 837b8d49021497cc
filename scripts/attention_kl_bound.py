"""How far a step moves the attention, and whether the quadratic model ½τ²Var of that holds.

A step of the parameters moves the logits of an attention row along a ray, to first order: from α⁰ to α(τ) ∝ α⁰ e^{τa},
a the exact slopes along the step, τ = 1 the whole of it. KL(α⁰‖α(τ)), forward, and KL(α(τ)‖α⁰), reverse, are ½τ²Var(a)
to second order; what that leaves is bounded by the spread Δ of the slopes, and their Taylor series in τ converges at
least up to the radius π/Δ. In float64, on real text. `--demo` shows the same on three small examples and needs no
checkpoint.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.diagnostics import Diagnostic, Result, Subject, entry, run, write_json
from harness.errors import UserError, run_cli
from harness.figures import RUN_STYLES, draw_heads, new_figure, print_table, save_figure
from harness.optimizers import saved_optimizer
from measure.divergence import Ray, kl_along_ray
from measure.perplexity import nonfinite
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

BLOCK = 2**20  # slots of attention rows worked on at a time
CURVE_ROWS, CURVE_POINTS = 2048, 41  # rows drawn for the picture's curves, and steps on them

FIELDS = {  # column → field of a Ray
    "variance": "variance",
    "spread": "spread",
    "radius": "radius",
    "kl_forward": "forward",
    "kl_reverse": "reverse",
    "quadratic": "quadratic",
    "remainder_forward": "remainder_forward",
    "remainder_reverse": "remainder_reverse",
    "bound_forward": "bound_forward",
    "bound_reverse": "bound_reverse",
}
CONSTANT = ("variance", "spread", "radius")  # in τ
TIGHTNESS = ("tightness_forward", "tightness_reverse")
ENDS = (*CONSTANT, "kl_forward", "kl_reverse")  # what extremes are given of

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
        help="adamw (the default): what the saved optimizer would add at its next step, from its moments, its learning "
        "rate and the gradient of --batches training batches; gradient: against that gradient; random: Gaussian. The "
        "latter two have a root mean square of the run's learning rate, as Adam's steps have about",
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
    tau, rays, drawn = subject.args.tau, [[] for _ in model.transformer.h], []
    generator = torch.Generator().manual_seed(subject.args.seed)
    sequences = subject.args.batches * subject.args.batch_size
    share = math.ceil(CURVE_ROWS / (sequences * len(rays)))
    try:
        for idx, _ in subject.batches(what="attention rows"):
            for sequence in idx.to(device):
                for layer, (alpha0, slopes) in enumerate(attention_slopes(model, direction, sequence)):
                    rays[layer].append(rays_of_heads(alpha0, slopes, tau))
                    rows = alpha0.flatten(0, 1), slopes.flatten(0, 1)
                    chosen = torch.randint(len(rows[0]), (share,), generator=generator)
                    drawn.append([x[chosen.to(device)].cpu() for x in rows])
    except ValueError as e:
        raise UserError(f"{subject.path}: {e}") from e
    rows, extremes = [], []
    for layer, found in enumerate(rays):
        ray = Ray(*torch.cat(found, dim=-1))  # (heads, rows) each
        for head in range(len(ray.spread)):
            of_head = Ray(*(x[head, ray.spread[head] > 0] for x in ray))
            for table, values in ((rows, medians(of_head, tau)), (extremes, ends(of_head))):
                table.append({"layer": layer, "head": head, **values})
    curve = median_curve(*(torch.cat(x) for x in zip(*drawn, strict=True)), tau, rows)
    summary = {"tau": tau, "step_norm": length(direction), "rows": sum(row["rows"] for row in rows)}
    if moving := [row for row in rows if row["rows"]]:
        beyond = sum(row["beyond_radius"] * row["rows"] for row in moving)
        summary |= {f"max_{column}": max(row[column] for row in moving) for column in TIGHTNESS}
        summary |= {"beyond_radius": beyond / summary["rows"]}
    return Result(rows, summary, notes, {"extremes": extremes, "curve": curve})


def direction_of(subject: Subject, model, device) -> tuple[Direction, list[str]]:
    """The direction asked for, and notes that say what it is."""
    args, kind = subject.args, subject.args.direction
    lr = learning_rate(subject.info)
    known = lr is not None
    lr = lr if known else LR

    def batches():
        offsets = subject.offsets("train", args.batches * args.batch_size)
        for x, y in subject.batches(offsets, "train", "gradient"):
            yield x.to(device), y.to(device)

    if kind == "adamw":
        notes = [f"τ = 1 is the next AdamW update, at the learning rate {lr:g}"]
        optimizer = saved_optimizer(model, subject.info, subject.path)
        return adamw_direction(model, optimizer, batches(), run_config(subject.info, "grad_clip")), notes
    whose = "the run's learning rate" if known else "as the checkpoint knows no learning rate"
    notes = [f"τ = 1 is a step whose root mean square over the parameters is {lr:g}, {whose}"]
    if kind == "gradient":
        try:
            return gradient_direction(model, batches(), lr), notes
        except ValueError as e:
            raise UserError(f"{subject.path}: {e}") from e
    return random_direction(model, lr, args.seed), notes


def rays_of_heads(alpha0: Tensor, slopes: Tensor, tau: float) -> Tensor:
    """The fields of the Ray of every row, (fields, H, T) on the CPU, from α⁰ and a (H, T, n), block by block."""
    rows = max(1, BLOCK // alpha0.size(-1))
    blocks = zip(alpha0.flatten(0, 1).split(rows), slopes.flatten(0, 1).split(rows), strict=True)
    found = [torch.stack(kl_along_ray(a, s, tau)).cpu() for a, s in blocks]
    return torch.cat(found, dim=1).view(-1, *alpha0.shape[:2])


def medians(ray: Ray, tau: float) -> dict[str, float | None]:
    """The columns of one head from its moving rows."""
    n = len(ray.spread)
    if n == 0:
        return {column: None for column in (*FIELDS, *TIGHTNESS, "beyond_radius")} | {"rows": 0}
    found = {column: median(getattr(ray, field).abs()) for column, field in FIELDS.items()}
    found |= {column: getattr(ray, column).max().item() for column in TIGHTNESS}
    return found | {"beyond_radius": (ray.radius < tau).double().mean().item(), "rows": n}


def median(x: Tensor) -> float:
    """Of x (n,) on the CPU. Not torch.quantile: it takes no more than 2²⁴ numbers."""
    return float(np.median(x.numpy()))


def ends(ray: Ray) -> dict[str, float | None]:
    if len(ray.spread) == 0:
        return {f"{column}_{end}": None for column in ENDS for end in ("min", "max")}
    return {
        f"{column}_{end}": getattr(getattr(ray, FIELDS[column]), end)().item()
        for column in ENDS
        for end in ("min", "max")
    }


def median_curve(alpha0: Tensor, slopes: Tensor, tau: float, rows: list[dict]) -> list[dict]:
    """Medians over the given rows against τ, from far below the step to beyond the heads' radii."""
    moving = slopes.amax(-1) > slopes.amin(-1)
    radii = [row["radius"] for row in rows if row["radius"]]
    if not moving.any() or not radii:
        return []
    alpha0, slopes = alpha0[moving], slopes[moving]
    last = 3 * max(tau, float(np.median(radii)))
    curve = []
    for t in np.geomspace(tau / 100, last, CURVE_POINTS):
        ray = kl_along_ray(alpha0, slopes, float(t))
        values = {c: median(getattr(ray, f).abs()) for c, f in FIELDS.items() if c not in CONSTANT}
        curve.append({"tau": float(t), **values})
    return curve


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
    remainder.set(title="what the model leaves, and its bound", ylabel="nats, median over rows")

    steps = [
        {**row, "log10": math.log10(tau / row["radius"]) if row["radius"] else None} for row in result.rows
    ]  # in radii
    draw_heads(heat, steps, "log10", "0: the step is at the radius")
    heat.set_title("log₁₀ of τ over the radius π/Δ")
    return figure


# --- the demonstration ------------------------------------------------------------------------------------------------

DEMO_COLUMNS = {
    "tau": "tau",
    "kl_reverse": "reverse",
    "kl_forward": "forward",
    "quadratic": "quadratic",
    "bound_reverse": "bound_reverse",
    "tightness_reverse": "tightness_reverse",
    "tightness_forward": "tightness_forward",
}
BERNOULLI = (0.3, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def demo(argv: list[str]) -> None:
    """Three examples: three keys, 100 random rows, and the two keys that meet the bound. Prints and writes them."""
    parser = argparse.ArgumentParser(prog="scripts/attention_kl_bound.py", description=demo.__doc__)
    parser.add_argument("--demo", action="store_true", required=True, help="this one, which takes no checkpoint")
    parser.add_argument("--out", type=Path, default=Path("out") / DIAGNOSTIC.name, metavar="DIR", help="%(default)s")
    args = parser.parse_args(argv)

    three_way = float64(1, 2, 0.5).softmax(-1), float64(0.3, -0.5, 0.8)
    share = (3 + math.sqrt(3)) / 6
    extremum = float64(share, 1 - share), float64(0, 1)
    rows, coin = table(three_way, (0.1, 0.5, 1, 1.5)), table(extremum, BERNOULLI)
    cases = random_cases()
    ray = kl_along_ray(*three_way, 1.0)
    summary = {"variance": ray.variance.item(), "spread": ray.spread.item(), "radius": ray.radius.item()}
    for way in ("reverse", "forward"):
        found = [case[f"tightness_{way}"] for case in cases]
        of_cases = {"min": min(found), "max": max(found), "mean": sum(found) / len(found)}
        summary |= {f"random_cases_{way}_{name}": value for name, value in of_cases.items()}

    print("three keys, α⁰ = softmax(1, 2, .5), slopes (.3, −.5, .8)")
    print_digits(rows)
    print("\n100 random rows: least, largest and mean tightness")
    print_digits(
        [
            {"direction": way} | {e: summary[f"random_cases_{way}_{e}"] for e in ("min", "max", "mean")}
            for way in ("reverse", "forward")
        ]
    )
    print("\ntwo keys with shares (3 ± √3)/6, slopes (0, 1): the largest third cumulant there is")
    print_digits(coin)
    reading = "tightness: |remainder| / bound; it reaches 1 as τ → 0 in the last table, and nothing exceeds it."
    print("\n" + reading)
    result = Result(rows, summary, [reading], {"random_cases": cases, "bernoulli": coin})
    written = [
        write_json(args.out / f"{DIAGNOSTIC.name}.json", [entry(DIAGNOSTIC.name, None, result)]),
        save_figure(draw_demo(three_way, extremum, cases), args.out / f"{DIAGNOSTIC.name}.png"),
    ]
    print("\nwritten: " + ", ".join(map(str, written)))


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(example: tuple[Tensor, Tensor], steps) -> list[dict]:
    ray = kl_along_ray(*example, float64(*steps))
    return [
        {c: steps[i] if c == "tau" else getattr(ray, field)[i].item() for c, field in DEMO_COLUMNS.items()}
        for i in range(len(steps))
    ]


def random_cases() -> list[dict]:
    rng, cases = np.random.default_rng(42), []
    for _ in range(100):
        n = int(rng.integers(2, 8))
        logits, slopes = (torch.from_numpy(rng.standard_normal((1, n))) for _ in range(2))
        tau = rng.uniform(0.01, 0.5)
        ray = kl_along_ray(logits.softmax(-1), slopes, tau)
        cases.append({"keys": n, "tau": tau, **{column: getattr(ray, column).item() for column in TIGHTNESS}})
    return cases


def print_digits(rows: list[dict]) -> None:
    """A table with nine significant digits."""
    text = [{k: f"{v:.9g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    print_table(text, list(rows[0]))


def draw_demo(three_way, extremum, cases: list[dict]) -> Figure:
    figure, (kl, remainder, random, coin) = new_figure(2, 2)
    steps = torch.linspace(0, 1.5, 200, dtype=torch.float64)
    ray = kl_along_ray(*three_way, steps)
    panels = {
        kl: {"KL forward": ray.forward, "KL reverse": ray.reverse, "½τ²Var": ray.quadratic},
        remainder: {
            "remainder forward": ray.remainder_forward,
            "bound forward": ray.bound_forward,
            "remainder reverse": ray.remainder_reverse,
            "bound reverse": ray.bound_reverse,
        },
    }
    for ax, curves in panels.items():
        lowest, gap = -math.inf, 0.06 * max(values[-1].item() for values in curves.values())
        for (label, values), style in sorted(zip(curves.items(), RUN_STYLES, strict=False), key=lambda c: c[0][1][-1]):
            ax.plot(steps, values, **style | {"marker": ""})
            lowest = max(values[-1].item(), lowest + gap)  # the labels of neighbouring ends stand apart
            ax.text(1.53, lowest, label, va="center", color=style["color"], fontsize=7.5)
        ax.set(xlabel="τ", ylabel="nats", xlim=(0, 2.3), xticks=[0, 0.5, 1, 1.5])
    kl.set_title("three keys: KL and its quadratic model")
    remainder.set_title("what the model leaves, and its bound")
    for way, style in zip(("forward", "reverse"), RUN_STYLES, strict=False):
        marks = style | {"linestyle": "", "alpha": 0.7}
        random.plot([c["tau"] for c in cases], [c[f"tightness_{way}"] for c in cases], label=way, **marks)
        grid = torch.logspace(-8, 0, 200, dtype=torch.float64)
        tightness = getattr(kl_along_ray(*extremum, grid), f"tightness_{way}")
        coin.semilogx(grid, tightness, label=way, **style | {"marker": ""})
    random.set_title("100 random rows")
    coin.set_title("two keys, shares (3 ± √3)/6")
    for ax in (random, coin):
        ax.axhline(1, color="#777777", linewidth=0.8)
        ax.set(xlabel="τ", ylabel="|remainder| / bound")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # beside the title, clear of the points
    return figure


DIAGNOSTIC = Diagnostic(
    name="attention_kl_bound",
    about=__doc__,
    columns=COLUMNS,
    measure=measure,
    draw=draw,
    reading=READING,
    tables={"extremes": EXTREMES, "curve, in the JSON": CURVE},  # not under its own name, and so not printed
    add_arguments=add_arguments,
    check_arguments=check_arguments,
    batches=2,
)


def main() -> None:
    if "--demo" in sys.argv[1:]:
        demo(sys.argv[1:])
    else:
        run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
