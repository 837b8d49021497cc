"""Three small examples of what attention_kl_bound measures, without a checkpoint: `attention_kl_bound.py --demo`."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.diagnostics import Result, entry, write_json
from harness.diagnostics.attention_kl_bound import DIAGNOSTIC
from harness.figures import RUN_STYLES, new_figure, print_table, save_figure
from harness.files import check_folder
from measure.divergence import kl_along_ray
from measure.rays import TIGHTNESS

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
    check_folder(args.out)

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
    demo_entry = entry(DIAGNOSTIC.name, None, result) | {"arguments": {"demo": True}}
    written = [
        write_json(args.out / f"{DIAGNOSTIC.name}.json", [demo_entry]),
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


def draw_demo(three_way: tuple[Tensor, Tensor], extremum: tuple[Tensor, Tensor], cases: list[dict]) -> Figure:
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
    random.set(title="100 random rows", ylim=(-0.05, 1.3))  # the legend stands above the points
    coin.set(title="two keys, shares (3 ± √3)/6")
    for ax in (random, coin):
        ax.axhline(1, color="#777777", linewidth=0.8)
        ax.set(xlabel="τ", ylabel="|remainder| / bound")
    random.legend(loc="upper right", ncols=2)
    coin.legend(loc="lower left")
    return figure
