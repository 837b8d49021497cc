"""What an experiment's results come to over its seeds: the measures that are shown, their means, their paired
differences to the baseline, their course along training; and how such numbers are written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.comparison import headlines
from harness.errors import UserError
from harness.experiments.results import Results
from harness.figures import number
from measure.seeds import Difference, Estimate, difference, estimate, holm

MOST_DECIMALS = 8
MOST_POINTS = 120  # of a curve; neighbouring steps are averaged where more were logged
_LOSSES = {
    "val_full/loss": ("validation loss, whole set", "nats a token; lower is better"),
    "val/loss": ("validation loss", "nats a token; lower is better"),
    "train/loss": ("training loss", "nats a token; lower is better"),
}
_WHERE = {"min": "least along training", "max": "largest along training", "mean": "mean along training"}
_WHERE |= {"equal_time": "at equal time of training"}


@dataclass(frozen=True)
class Measure:
    name: str
    """as Results.values takes it"""
    label: str
    note: str
    """its unit, and which way is better"""

    @property
    def base(self) -> str:
        """The name under which it is found along training."""
        return self.name.partition("@")[0]

    @property
    def full_label(self) -> str:
        """With the diagnostic that it is of, as a person says it."""
        script, slash, _ = self.base.partition("/")
        return f"{self.label} ({script})" if slash and self.base not in _LOSSES else self.label


_OF_TRAINING = (
    Measure("activation_kurtosis/val/residual_stream", "kurtosis of the residual stream", "excess kurtosis"),
    Measure("activation_max_abs/val/residual_stream", "largest |x| of the residual stream", ""),
    Measure("sink_rate/val", "sink rate", "share of heads and sequences"),
)


class Paired(NamedTuple):
    variant: str
    difference: Difference
    """variant − baseline, of the seeds that have both"""
    p: float | None
    """after Holm's correction over the variants"""
    by_seed: dict[int, float]


def measures(results: Results, asked: Sequence[str]) -> list[Measure]:
    """Those of the page's tables: the losses, the diagnostics' headlines, what claims ask for."""
    there = results.measures()
    diagnostics = [measurement.diagnostic for measurement in results.experiment.measurements]
    own = {diagnostic.name for diagnostic in diagnostics}
    notes = headlines([name for name in there if name.partition("/")[0] in own], diagnostics)
    full = [name for name in ("val_full/loss",) if name in there] or [name for name in ("val/loss",) if name in there]
    found = [
        m for name in dict.fromkeys([*full, *notes, *asked]) if (m := _measure(name, notes)) and _there(results, m)
    ]
    labels = [m.label for m in found]
    return [m if labels.count(m.label) == 1 else Measure(m.name, m.name, m.note) for m in found]


def _measure(name: str, notes: dict[str, str]) -> Measure:
    base, _, where = name.partition("@")
    label, note = _LOSSES.get(base) or (base.partition("/")[2] or base, notes.get(base, ""))
    return Measure(name, label + (f", {_WHERE.get(where, f'step {where}')}" if where else ""), note)


def _there(results: Results, measure: Measure) -> bool:
    try:
        return any(results.values(measure.name, variant) for variant in results.experiment.variants)
    except UserError:
        return False


def over_seeds(results: Results, measure: str, variant: str) -> Estimate | None:
    values = list(results.values(measure, variant).values())
    return estimate(values) if values else None


def paired(results: Results, measure: str) -> list[Paired]:
    """Of every variant but the baseline that has a seed with it."""
    baseline = results.values(measure, results.experiment.baseline)
    found = []
    for variant in results.experiment.variants[1:]:
        values = results.values(measure, variant)
        if by_seed := {seed: values[seed] - baseline[seed] for seed in baseline if seed in values}:
            found.append((variant, difference(list(by_seed.values())), by_seed))
    adjusted = holm([d.p for _, d, _ in found])
    return [Paired(variant, d, p, by_seed) for (variant, d, by_seed), p in zip(found, adjusted, strict=True)]


class Point(NamedTuple):
    step: float
    estimate: Estimate


def curve(results: Results, name: str, variant: str, against: str | None = None) -> list[Point]:
    """The mean over seeds of what was logged along training, or of its difference to another variant's by seed."""
    width = window(results, name)
    runs = [_windows(run.along.get(name, []), width) for run in results.of(variant)]
    if against:
        others = {run.cell.seed: _windows(run.along.get(name, []), width) for run in results.of(against)}
        seeds = [run.cell.seed for run in results.of(variant)]
        pairs = [(own, others.get(seed, {})) for seed, own in zip(seeds, runs, strict=True)]
        runs = [{step: own[step] - other[step] for step in own if step in other} for own, other in pairs]
    steps = sorted({step for run in runs for step in run})
    return [Point(step, estimate([run[step] for run in runs if step in run])) for step in steps]


def window(results: Results, name: str) -> int:
    """How many neighbouring steps of a series are one point of its curve."""
    longest = max((len(run.along.get(name, [])) for run in results.runs), default=0)
    return max(1, math.ceil(longest / MOST_POINTS))


def _windows(points: Sequence[tuple[int, float]], width: int) -> dict[float, float]:
    """Step → value; of each `width` neighbours their means. Windows begin at the same steps in every run."""
    if width == 1:
        return dict(points)
    groups = [points[i : i + width] for i in range(0, len(points) - width + 1, width)]
    return {math.fsum(s for s, _ in group) / width: math.fsum(v for _, v in group) / width for group in groups}


def along(results: Results, shown: Sequence[Measure]) -> list[Measure]:
    """Those of the diagnostics' measures that were taken at two steps of a run or more; where there are none, the
    training's own of sinks and outliers."""
    found: dict[str, Measure] = {}
    for measure in shown:
        if _at_steps(results, measure.base) and measure.base not in _LOSSES:
            label = measure.label.partition(", ")[0] if "@" in measure.name else measure.label
            found.setdefault(measure.base, Measure(measure.base, label, measure.note))
    return list(found.values()) or [measure for measure in _OF_TRAINING if _at_steps(results, measure.name)]


def _at_steps(results: Results, name: str) -> bool:
    return len({step for run in results.runs for step, _ in run.along.get(name, [])}) > 1


def long_form(results: Results, shown: Sequence[Measure]) -> Iterator[tuple[str, int, str, float]]:
    """(variant, seed, measure, value) of the end of training, and of what claims are decided by."""
    names = dict.fromkeys([*results.measures(), *(measure.name for measure in shown)])
    for variant in results.experiment.variants:
        for name in names:
            for seed, value in sorted(results.values(name, variant).items()):
                yield variant, seed, name, value


# --- numbers in words -------------------------------------------------------------------------------------------------


def written(value: float | None) -> str:
    """In four digits, with a minus sign; a dash for what is not there."""
    return "–" if value is None else number(value).replace("-", "−")


def digits_for(error: float) -> int:
    """Decimals in which a number with this error is written: two digits of the error."""
    return max(0, min(MOST_DECIMALS, 1 - math.floor(math.log10(error)))) if error > 0 else 4


def with_interval(found: Estimate | None) -> str:
    """ "1.234 ± 0.056": the mean and half of the 95 % interval; the mean alone of one seed."""
    if found is None:
        return "–"
    if found.high is None or found.low is None:
        return written(found.mean)
    half = (found.high - found.low) / 2
    if half == 0:
        return f"{written(found.mean)} ± 0"
    if half < 1e-6 * max(1.0, abs(found.mean)) or half >= 1e6:
        return f"{written(found.mean)} ± {half:.0e}".replace("-", "−")
    decimals = digits_for(half)
    return f"{found.mean:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """In the digits of the sentences that claims.py makes."""
    return "none" if low is None or high is None else f"{written(low)} to {written(high)}"


def probability(p: float | None) -> str:
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.3g}"
