"""Laps add up by name, medians carry their error, and what drifts cancels in a ratio."""

import pytest
import torch

from harness import timing
from harness.timing import Laps, in_turn, median, median_ratio

CPU = torch.device("cpu")


def test_laps_of_one_name_are_added_up(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(timing, "now", lambda device: next(clock))
    laps = Laps(CPU)
    for name in ("data", "forward", "data"):
        laps.end(name)
    assert laps.seconds() == {"data": 4, "forward": 2}


def test_a_median_has_the_error_of_a_gaussians_median():
    values = torch.distributions.Normal(5, 2).icdf(torch.linspace(0.0005, 0.9995, 1000)).tolist()
    found = median(values)
    assert found.value == pytest.approx(5, abs=1e-3)
    assert found.error == pytest.approx(2 * (torch.pi / 2 / 1000) ** 0.5, rel=0.01)  # σ √(π / 2n)
    disturbed = median([*values[:-1], 1e9])
    assert disturbed == pytest.approx(found, rel=0.01)  # one repeat of a thousand, at the end already
    with pytest.raises(ValueError, match="no spread"):
        median([1.0])


def test_a_drift_cancels_in_the_ratio_of_rounds():
    drift = [1.0, 2.0, 4.0, 8.0]
    assert median_ratio([3 * x for x in drift], drift) == (3, 0)


def test_runs_take_turns_each_once_a_round():
    ran = []
    laps = in_turn({name: lambda lap, n=name: (ran.append(n), lap.end("work")) for name in "abc"}, CPU, 5)
    rounds = [ran[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1  # shuffled
    assert {name: len(own) for name, own in laps.items()} == {"a": 5, "b": 5, "c": 5}
    assert all(list(each) == ["work"] for own in laps.values() for each in own)
