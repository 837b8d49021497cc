"""What an experiment's cells have to show: the values at the end of training and along it, by name.

A *measure* is a diagnostic's summary value, `activation_kurtosis/sink_rate`, or a metric of metrics.jsonl,
`val_full/loss`, in both cases that of the end of training. Along training `@` follows: `val/loss@500` is the value at
step 500, and `@min`, `@mean`, `@max` are over the steps measured. `val/loss@equal_time` is the value at the training
time at which the fastest of the variants compared ends: train.py's own clock, without evaluations, at each variant's
median speed. A slower variant is then in the middle of its schedule, at a higher learning rate.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.checkpoint import is_step
from harness.curves import read_run
from harness.errors import UserError
from harness.experiments.grid import Cell, Experiment
from harness.experiments.state import changed_keys, other_options
from harness.text_files import read_json

Points = list[tuple[int, float]]  # (step, value), by step


@dataclass
class Run:
    """What one cell has to show. Values that do not exist, or are not finite, are left out."""

    cell: Cell
    last: dict[str, float] = field(default_factory=dict)
    """measure → its value at the end of training"""
    along: dict[str, Points] = field(default_factory=dict)
    """measure → its values along training"""
    heads: list[dict] = field(default_factory=list)
    """a row a head, `layer`, `head` and the columns of activation_kurtosis and jacobian_energy"""
    problem: str | None = None
    """why it has less to show than it should: not trained to the end, a diagnostic missing"""

    @property
    def name(self) -> str:
        return self.cell.name


@dataclass
class Results:
    experiment: Experiment
    runs: list[Run]

    def of(self, variant: str) -> list[Run]:
        """The variant's runs, by seed."""
        return sorted((run for run in self.runs if run.cell.variant == variant), key=lambda run: run.cell.seed)

    def measures(self) -> list[str]:
        """Of the end of training, those that any run has: diagnostics first, in the experiment's order."""
        names = dict.fromkeys(name for run in self.runs for name in run.last)
        own = [m.name + "/" for m in self.experiment.measurements]
        return sorted(names, key=lambda name: next((i for i, o in enumerate(own) if name.startswith(o)), len(own)))

    def values(self, measure: str, variant: str, compared: Sequence[str] = ()) -> dict[int, float]:
        """Seed → value, of the runs that have it; `compared` are the variants that share the time of `@equal_time`, all
        where there are none. UserError for a measure that no run has."""
        name, _, where = measure.partition("@")
        if not any(name in (run.along if where else run.last) for run in self.runs):
            known = sorted({n for run in self.runs for n in (run.along if where else run.last)})
            near = [n for n in known if n.split("/")[0] == name.split("/")[0]]
            raise UserError(f"no run has a value of {measure}; there are {', '.join(near or known)[:400]}")
        if where == "equal_time":
            return self._at_equal_time(name, variant, compared or self.experiment.variants)
        found = {run.cell.seed: _at(run, name, where) for run in self.of(variant)}
        return {seed: value for seed, value in found.items() if value is not None}

    def _at_equal_time(self, name: str, variant: str, compared: Sequence[str]) -> dict[int, float]:
        paces = {v: self.seconds_a_step(v) for v in compared}
        ends = [pace * self.of(v)[0].cell.config.training.max_steps for v, pace in paces.items() if pace]
        pace, found = paces[variant], {}
        for run in self.of(variant) if pace else ():
            if points := run.along.get(name):
                steps, values = zip(*points, strict=True)
                found[run.cell.seed] = float(np.interp(min(ends) / pace, steps, values))
        return found

    def seconds_a_step(self, variant: str) -> float | None:
        """Of training alone, the median over all that the variant's runs have logged."""
        found = []
        for run in self.of(variant):
            c = run.cell.config
            tokens = c.training.batch_size * c.model.block_size
            found += [tokens / rate for _, rate in run.along.get("train/tokens_per_second", [])]
        return statistics.median(found) if found else None


_OVER: dict[str, Callable[[Iterable[float]], float]] = {"min": min, "max": max, "mean": statistics.fmean}


def _at(run: Run, name: str, where: str) -> float | None:
    if not where:
        return run.last.get(name)
    points = run.along.get(name, [])
    if where in _OVER:
        return _OVER[where]([value for _, value in points]) if points else None
    if not (where.isascii() and where.isdecimal()):
        raise UserError(f"{name}@{where}: after @ stands a step, min, max, mean or equal_time")
    return next((value for step, value in points if step == int(where)), None)


def read_results(experiment: Experiment) -> Results:
    """What is there of every cell; a cell that lacks something says so in its `problem`."""
    return Results(experiment, [_read(experiment, cell) for cell in experiment.cells])


def _read(experiment: Experiment, cell: Cell) -> Run:
    run, problems = Run(cell), []
    metrics, end = cell.folder / "metrics.jsonl", cell.config.training.max_steps
    if not metrics.exists():
        run.problem = "not trained"
        return run
    try:
        changed, series = changed_keys(cell), read_run(metrics)
    except (UserError, OSError) as error:
        run.problem = str(error)
        return run
    if changed:
        run.problem = f"it was trained with another config: {', '.join(changed)}"
        return run
    for name, (steps, values) in series.items():
        run.along[name] = [(int(s), float(v)) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    step = max(int(steps[-1]) for steps, _ in series.values())
    if step < end:
        run.problem = f"trained to step {step} of {end}"
        return run
    run.last = {name: points[-1][1] for name, points in run.along.items() if points and points[-1][0] == end}
    heads: dict[tuple[int, int], dict] = {}
    for measurement in experiment.measurements:
        for words, path in measurement.commands(cell):
            if other_options(experiment, words, path):
                problems.append(f"{measurement.name} was measured with other options: run the experiment again")
                continue
            try:
                content = read_json(path)
                entries = content.get("checkpoints", [content])
                for entry in entries:
                    _take(run, heads, measurement.name, entry, path.parent.name == "along")
            except (FileNotFoundError, IsADirectoryError):
                problems.append(f"{measurement.name} was not measured")
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
                problems.append(f"{path} is no result of {measurement.name}: delete it and run the experiment again")
    run.heads = list(heads.values())
    run.problem = "; ".join(dict.fromkeys(problems)) or None
    return run


def _take(run: Run, heads: dict, script: str, entry: dict, along: bool) -> None:
    """Add what one checkpoint's JSON says to the run. An error of any kind for what a diagnostic does not write."""
    if not is_step(entry["step"]):
        raise TypeError(f"step {entry['step']!r:.20}")
    for name, value in entry["summary"].items():
        if isinstance(value, int | float) and math.isfinite(value):
            points = run.along.setdefault(f"{script}/{name}", [])
            if entry["step"] not in [step for step, _ in points]:  # the last one is among those along training too
                points.append((entry["step"], float(value)))
                points.sort()
            if not along:
                run.last[f"{script}/{name}"] = float(value)
    if not along:
        for row in [*entry.get("heads", []), *entry["rows"]]:
            if row.get("layer") is not None and row.get("head") is not None:
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
                heads.setdefault((row["layer"], row["head"]), {}).update(numbers)
