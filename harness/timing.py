"""How long something takes: a clock that a GPU's queue does not fool, and medians that carry their error."""

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from harness.device import now


class Laps:
    """The times between marks, of which the first is set when the object is made. On CUDA a mark is an event in the
    queue of work, so that nothing waits for the device until `seconds` is called."""

    def __init__(self, device: torch.device):
        self._device = device
        self._names: list[str] = []
        self._marks: list[Any] = []  # CUDA events, or seconds
        self.end("")

    def end(self, name: str) -> None:
        """The lap `name` ends here, and the next begins; laps of one name are added up."""
        if self._device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(now(self._device))
        self._names.append(name)

    def seconds(self) -> dict[str, float]:
        """The seconds of each lap, by its name. Waits for the device."""
        totals = dict.fromkeys(self._names[1:], 0.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for name, start, end in zip(self._names[1:], self._marks, self._marks[1:], strict=False):
            totals[name] += start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
        return totals


class Median(NamedTuple):
    value: float
    error: float
    """the standard error, 1.2533 σ/√n with σ from the interquartile range, which a few disturbed repeats leave alone"""


def median(values: list[float]) -> Median:
    """ValueError for fewer than two values, which have no spread."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no spread")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Median(statistics.median(values), 1.2533 * (high - low) / 1.349 / len(values) ** 0.5)


def median_ratio(values: list[float], baseline: list[float]) -> Median:
    """The median of each value over the baseline's of the same round, so that what drifts between rounds cancels."""
    return median([a / b for a, b in zip(values, baseline, strict=True)])


def in_turn(
    runs: Mapping[str, Callable[[Laps], object]], device: torch.device, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """The laps of every run in every round, by the run's name. The order is shuffled in each round, since a run depends
    on what the one before it left in the caches."""
    shuffled = random.Random(0)
    laps: dict[str, list[Laps]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            laps[name].append(Laps(device))
            runs[name](laps[name][-1])
    return {name: [each.seconds() for each in own] for name, own in laps.items()}
