"""The curves of training runs: metrics.jsonl read, each mistake in it named, and drawn, a panel for each metric."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.errors import UserError
from harness.figures import RUN_STYLES, integer_ticks, new_figure
from harness.text_files import parse_json, read_yaml

MAX_PANELS = 48
GIVE = "give a run that has logged something: out/NAME or its metrics.jsonl"
# Groups with a series for each parameter, drawn by their median and maximum.
GROUPS = ("weight_kurtosis", "normalizer", "feedback/angle")

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

    @property
    def full(self) -> str | None:
        """The series of the whole validation set, which a run's last evaluation may log beside `main`."""
        return "val_full/" + self.main.removeprefix("val/") if self.main.startswith("val/") else None

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(name for name in (self.aside, self.main, self.full) if name)


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
    Panel("Weights and their feedback", "angle, degrees", "median feedback/angle", "max feedback/angle", MEDIAN_MAX),
)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def metrics_files(runs: list[str]) -> dict[str, Path]:
    """Name in the legend → metrics.jsonl. The name is the run's folder, with as many parents as tell the runs apart.

    What is there and no run (out/* has the diagnostics' folders and logs too), or has logged nothing yet, is passed
    over with a line, as long as something is left.
    """
    files, passed_over = {}, []
    for run in runs:
        file = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
        if not Path(run).exists():
            raise UserError(f"{run}: no such file; {GIVE}")
        if not file.is_file() or file.suffix != ".jsonl":
            passed_over.append(f"{file}: no such file" if Path(run).is_dir() else f"{run}: no metrics.jsonl")
            continue
        if not file.stat().st_size:
            passed_over.append(f"{file}: no metrics in it yet")
            continue
        absolute = Path(os.path.abspath(file))
        files[absolute.parent if file.name == "metrics.jsonl" else absolute] = file
    if not files:
        raise UserError(f"{', '.join(passed_over)}; {GIVE}")
    for what in passed_over:
        print(f"passed over: {what}")
    depth = 1
    while len({path.parts[-depth:] for path in files}) < len(files):
        depth += 1
    return {"/".join(path.parts[-depth:]): file for path, file in files.items()}


def variants(configs: Mapping[str, dict | None]) -> dict[str, list[str]]:
    """Label → names of the runs that are seeds of one variant: their configs train the same but for the seed, and their
    seeds all differ. Every other run, and one whose config is not known, is a variant of its own."""
    same: dict[str, list[str]] = {}
    for name, config in configs.items():
        trained = json.dumps(_without_seed(config) if config else name, sort_keys=True, default=str)
        same.setdefault(trained, []).append(name)
    found: dict[str, list[str]] = {}
    for names in same.values():
        seeds = {str(config["run"].get("seed")) for name in names if (config := configs[name])}
        if len(names) == 1 or len(seeds) < len(names):
            found |= {name: [name] for name in names}
            continue
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        stem = re.sub(r"[-_./ ]+(seed|s)?[-_]?\d*$", "", "".join(letters[0] for letters in alike))
        label = f"{stem}, {len(names)} seeds"
        found[label if stem and label not in found else f"{', '.join(names)}: {len(names)} seeds"] = names
    return found


def _without_seed(config: dict) -> dict:
    """What a run computes, but for its seed."""
    training = {k: v for k, v in config.get("training", {}).items() if k not in ("resume", "overwrite")}
    return {k: v for k, v in config.items() if k not in ("run", "tracking", "training")} | {"training": training}


def config_beside(file: Path) -> dict | None:
    """The run's config.yaml beside its metrics.jsonl; None where there is none that could be read."""
    try:
        config = read_yaml(file.parent / "config.yaml", "config")
    except UserError:
        return None
    sections = config.values() if isinstance(config, dict) and "run" in config else [None]
    whole = all(isinstance(section, dict) and all(isinstance(key, str) for key in section) for section in sections)
    return config if whole and all(isinstance(name, str) for name in config) else None


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
        record = parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove this line") from None
    except ValueError as error:
        raise UserError(f"{where}: not a line of metrics ({error}); mend or remove it") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(f'{where}: not a line of metrics like {{"step": 10, "train/loss": 3.2}}; mend or remove it')
    for name, value in record.items():
        if not isinstance(value, int | float | None) or (isinstance(value, int) and value.bit_length() > 1000):
            raise UserError(f"{where}: the value of {name!r} is {value!r:.80}, not a number; mend or remove this line")
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
    for name in (name for panel in panels for name in panel.series):
        if not any(name in series for series in runs.values()):
            continue
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
    for split in ("val", "val_full"):
        if f"{split}/bits_per_byte" in names:
            names.discard(f"{split}/perplexity")
    panels = [panel for panel in PANELS if names.intersection(panel.series)]
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


def draw(runs: dict[str, Series], panels: list[Panel], groups: dict[str, list[str]]) -> Figure:
    """A panel for each of `panels`, in it a curve for each group, label → its runs: of several its mean and a band from
    the least to the largest."""
    fuller = min((4, 3), key=lambda width: -len(panels) % width)  # the width that leaves fewer places empty
    columns = min(len(panels), fuller)
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(rows, columns)
    members = {label: [runs[name] for name in names] for label, names in groups.items()}
    for axes, panel in zip(grid, panels, strict=False):
        draw_panel(axes, panel, members)
    for axes in grid[len(panels) :]:
        axes.remove()
    handles = [Line2D([], [], **RUN_STYLES[i % len(RUN_STYLES)]) for i in range(len(groups))]
    per_row = max(1, 50 * columns // (max(map(len, groups)) + 10))
    figure.legend(
        handles,
        groups,
        loc="outside upper left",
        ncols=per_row,
        handlelength=3.5,
        title="of seeds, the mean in a band from the least to the largest" if len(groups) < len(runs) else None,
        alignment="left",
    )
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(groups) // per_row))
    return figure


def band(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) that all curves have, and their values there (curves, n)."""
    if len(curves) == 1:
        return curves[0][0], curves[0][1][None]
    steps = reduce(np.intersect1d, [steps for steps, _ in curves])
    return steps, np.stack([values[np.searchsorted(own, steps)] for own, values in curves])


def draw_panel(axes: Axes, panel: Panel, runs: dict[str, list[Series]]) -> None:
    drawn: dict[str, list[np.ndarray]] = {}
    for i, members in enumerate(runs.values()):
        style = RUN_STYLES[i % len(RUN_STYLES)]
        for name in panel.series:
            if not (curves := [series[name] for series in members if name in series]):
                continue
            steps, values = band(curves)
            drawn.setdefault(name, []).append(values.ravel())
            if name == panel.aside:
                look = style | {"marker": "", "linewidth": 0.9, "alpha": 0.45, "zorder": 2}
            elif name == panel.full:
                look = style | {"marker": "*", "markersize": 11, "linestyle": "", "zorder": 4}
            else:
                # few points: a marker on each; many: a thin line with about eight markers, shifted from run to run
                every = 1 if len(steps) <= 40 else len(steps) // 8
                look = style | {"markevery": (i * every // len(runs), every), "zorder": 3}
                look["linewidth"] = 1.6 if every == 1 else 1.0
            axes.plot(steps, values.mean(0), **look)
            if len(curves) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    integer_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    set_scale(axes, panel.scale, np.concatenate([values for found in drawn.values() for values in found]))
    grey: dict[str, Any] = {"color": "#555555"}
    names = {
        panel.main: (panel.legend[0], Line2D([], [], **grey, marker="o", markersize=4)),
        panel.aside: (panel.legend[1], Line2D([], [], **grey, linewidth=0.9, alpha=0.6)),
        panel.full: ("whole validation set", Line2D([], [], **grey, marker="*", markersize=9, linestyle="")),
    }
    shown = [names[name] for name in (panel.main, panel.aside, panel.full) if name in drawn]
    if set(drawn) != {panel.main}:
        labels, handles = zip(*((label or "at evaluations", handle) for label, handle in shown), strict=True)
        axes.legend(handles, labels, fontsize="small")


def set_scale(axes: Axes, scale: str, values: np.ndarray) -> None:
    """A logarithmic axis only where the values span enough to need it, and plain numbers at its ticks."""
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = values.min(), values.max()
    if scale == "symlog" and low >= 1:  # far from 0, where half of the panel would be empty
        scale = "log"
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
