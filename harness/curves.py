"""The curves of training runs: metrics.jsonl read, each mistake in it named, and drawn, a panel for each metric."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.errors import UserError
from harness.figures import RUN_STYLES, new_figure

MAX_PANELS = 48
GROUPS = ("weight_kurtosis", "normalizer")  # a series for each parameter, drawn by their median and maximum

# One run: series name → (steps, values), both float64; values that are not finite are NaN, a gap in the curve.
Series = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: the series `main` drawn strong and `aside` drawn thin behind it."""

    title: str
    unit: str
    main: str
    aside: str | None = None
    legend: tuple[str, str] = ("", "")  # the names of main and aside
    scale: str = "linear"  # "log", "symlog" (for kurtosis, which may be negative), or "zero": linear from 0


VAL_TRAIN, MEDIAN_MAX = ("validation", "training"), ("median", "maximum")


def of_both_splits(title: str, unit: str, name: str, scale: str) -> Panel:
    """What is logged for each split, under `name` with {} where the split's stands."""
    return Panel(title, unit, name.format("val"), name.format("train"), VAL_TRAIN, scale)


PANELS = (
    Panel("Loss", "nats a token", "val/loss", "train/loss", VAL_TRAIN, "log"),
    Panel("Validation bits per byte", "bits a byte", "val/bits_per_byte", scale="log"),
    Panel("Validation perplexity", "perplexity a token", "val/perplexity", scale="log"),
    Panel("Learning rate", "learning rate", "train/lr", scale="zero"),
    Panel("Gradient norm", "2-norm before clipping", "train/grad_norm", scale="log"),
    Panel("Throughput", "tokens a second", "train/tokens_per_second", scale="zero"),
    Panel("Weights", "excess kurtosis", "median weight_kurtosis", "max weight_kurtosis", MEDIAN_MAX, "symlog"),
    Panel(
        "Attention probabilities, validation",
        "excess kurtosis",
        "activation_kurtosis/val/attention_probabilities_late",
        "activation_kurtosis/val/attention_probabilities",
        ("without the first 8 queries", "all queries"),  # 8: measure.activations.EARLY
        "symlog",
    ),
    of_both_splits("Residual stream", "excess kurtosis", "activation_kurtosis/{}/residual_stream", "symlog"),
    of_both_splits("Residual stream, largest |x|", "largest |x|", "activation_max_abs/{}/residual_stream", "log"),
    of_both_splits("Sink rate", "share of sequences", "sink_rate/{}", "zero"),
    of_both_splits("Row mass", "attention given to keys", "row_mass/{}", "zero"),
    Panel("Normalizer's parameters", "mean over heads", "median normalizer", "max normalizer", MEDIAN_MAX),
)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def metrics_files(runs: list[str]) -> dict[str, Path]:
    """Name in the legend → metrics.jsonl. The name is the run's folder, with as many parents as tell the runs apart."""
    files = {}
    for run in runs:
        file = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; give a run that has logged something: out/NAME or its metrics.jsonl"
            )
        absolute = Path(os.path.abspath(file))
        files[absolute.parent if file.name == "metrics.jsonl" else absolute] = file
    depth = 1
    while len({path.parts[-depth:] for path in files}) < len(files):
        depth += 1
    return {"/".join(path.parts[-depth:]): file for path, file in files.items()}


def read_run(file: Path) -> Series:
    """All series of a metrics.jsonl that have a finite value, and `median GROUP` and `max GROUP` of the `GROUPS`.

    An unfinished last line (the run was killed, or is writing at this moment) is left out. Raises UserError, with file
    and line number, for any other line that is not metrics, and where there are none.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if not lines[-1].endswith("}"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        record = parse_line(line, f"{file}:{number}")
        step = record.pop("step")
        for name, value in (record | over_groups(record)).items():
            points.setdefault(name, []).append((step, np.nan if value is None else value))
    series = {}
    for name, pairs in points.items():
        steps, values = np.array(pairs, dtype=np.float64).T
        if np.isfinite(values).any():
            series[name] = (steps, np.where(np.isfinite(values), values, np.nan))
    if not series:
        raise UserError(f"{file}: no metrics in it yet; train for at least one log_interval")
    return series


def parse_line(line: str, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl: `step`, an int, and numbers or None. UserError, saying `where`, for anything else."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove this line") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(f'{where}: not a line of metrics like {{"step": 10, "train/loss": 3.2}}; mend or remove it')
    for name, value in record.items():
        if not isinstance(value, int | float | None):
            raise UserError(f"{where}: the value of {name!r} is {value!r}, not a number; mend or remove this line")
    return record


def over_groups(record: dict[str, float | None]) -> dict[str, float]:
    """`median GROUP` and `max GROUP` of the `GROUPS` that the record has values of."""
    summary: dict[str, float] = {}
    for group in GROUPS:
        values = [value for name, value in record.items() if name.startswith(group + "/") and value is not None]
        if values:
            summary |= {f"median {group}": float(np.median(values)), f"max {group}": max(values)}
    return summary


def last_values(runs: dict[str, Series], panels: list[Panel]) -> list[dict]:
    """Rows of the table: a metric, and its last finite value in each run."""
    rows: list[dict] = [{"last value": "step"}]
    rows[0] |= {run: int(max(s[-1] for s, _ in series.values())) for run, series in runs.items()}
    for name in (name for panel in panels for name in (panel.aside, panel.main) if name):
        row: dict[str, Any] = {"last value": name}
        for run, series in runs.items():
            if name in series:
                row[run] = float(series[name][1][np.isfinite(series[name][1])][-1])
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def standard_panels(runs: dict[str, Series]) -> list[Panel]:
    """The panels that some run has data for. Perplexity has one only where there are no bits per byte, which are its
    logarithm but for a factor and show the same."""
    names = set().union(*runs.values())
    if "val/bits_per_byte" in names:
        names.discard("val/perplexity")
    panels = [panel for panel in PANELS if panel.main in names or panel.aside in names]
    if not panels:
        raise UserError(
            f"none of the standard metrics in {', '.join(runs)}; name some of {families(names)} by --metrics"
        )
    return panels


def panels_for(prefixes: list[str], runs: dict[str, Series]) -> list[Panel]:
    """One panel for each metric that begins with one of the prefixes, in the order of the files."""
    names = dict.fromkeys(name for series in runs.values() for name in series)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"--metrics {prefix}: no metric of {', '.join(runs)} begins so; there are {families(names)}"
            )
    chosen = [name for name in names if name.startswith(tuple(prefixes))]
    if len(chosen) > MAX_PANELS:
        raise UserError(
            f"--metrics: {len(chosen)} metrics begin so, more than {MAX_PANELS} panels; give longer prefixes"
        )
    panels = []
    for name in chosen:
        family, _, metric = name.rpartition("/")
        panels.append(Panel(metric, family, name, scale="symlog" if "kurtosis" in family else "linear"))
    return panels


def families(names: Iterable[str]) -> str:
    """What the names begin with, such as "train/, val/", for an error message."""
    return ", ".join(sorted({name.split("/")[0] + "/" for name in names if "/" in name and " " not in name}))


def draw(runs: dict[str, Series], panels: list[Panel]) -> Figure:
    fuller = min((4, 3), key=lambda width: -len(panels) % width)  # the width that leaves fewer places empty
    columns = min(len(panels), fuller)
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(rows, columns)
    for axes, panel in zip(grid, panels, strict=False):
        draw_panel(axes, panel, runs)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [Line2D([], [], **RUN_STYLES[i % len(RUN_STYLES)]) for i in range(len(runs))]
    per_row = max(1, 50 * columns // (max(map(len, runs)) + 10))
    figure.legend(handles, runs, loc="outside upper left", ncols=per_row, handlelength=3.5)
    return figure


def draw_panel(axes: Axes, panel: Panel, runs: dict[str, Series]) -> None:
    drawn = []
    for i, series in enumerate(runs.values()):
        style = RUN_STYLES[i % len(RUN_STYLES)]
        if panel.aside in series:
            drawn.append(series[panel.aside][1])
            axes.plot(*series[panel.aside], **style | {"marker": ""}, linewidth=0.9, alpha=0.45, zorder=2)
        if panel.main in series:
            steps, values = series[panel.main]
            drawn.append(values)
            # few points: a marker on each; many: a thin line with about eight markers, shifted from run to run
            every = 1 if len(steps) <= 40 else len(steps) // 8
            width = 1.6 if every == 1 else 1.0
            axes.plot(steps, values, **style, linewidth=width, markevery=(i * every // len(runs), every), zorder=3)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    set_scale(axes, panel.scale, np.concatenate(drawn))
    if panel.aside:
        grey: dict[str, Any] = {"color": "#555555", "markersize": 4}
        handles = [Line2D([], [], **grey, marker="o"), Line2D([], [], **grey, linewidth=0.9, alpha=0.6)]
        axes.legend(handles, panel.legend, fontsize="small")


def set_scale(axes: Axes, scale: str, values: np.ndarray) -> None:
    """A logarithmic axis only where the values span enough to need it, and plain numbers at its ticks."""
    low, high = np.nanmin(values), np.nanmax(values)
    if scale == "log" and low > 0 and high / low > 3:
        axes.set_yscale("log", subs=[])  # no minor ticks
        if high / low < 100:  # powers of ten alone would leave one tick or two
            ticks = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=ticks))
    elif scale == "symlog":
        axes.axhline(0, color="#777777", linewidth=0.8, zorder=1)
        if high > 10:
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=min(low, 0) - 0.3)  # Matplotlib's margin, a share of the maximum, would be too wide
    elif scale == "zero":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep="") if high >= 10_000 else lambda value, _: f"{value:g}")
