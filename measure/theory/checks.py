"""A statement as a test of numbers: what was found, what is due, and how far apart they may lie."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Tolerances: float64's epsilon is 2.2e-16, and no sum here has more than 10⁴ terms of size 1.
ROUNDING = 1e-11
# The error that a quadrature, a root finder or an optimiser may leave: one in the sixth digit, as in the figures.
NUMERICAL = 1e-6


class Check(NamedTuple):
    """One statement, tested: each number of `found` stands in `relation` (=, ≤, ≥) to its `due`, up to `tolerance`."""

    name: str
    found: list[float]
    relation: str
    due: list[float]
    tolerance: list[float]

    @property
    def passed(self) -> bool:
        excess = [f - d for f, d in zip(self.found, self.due, strict=True)]
        excess = {"=": [abs(e) for e in excess], "≤": excess, "≥": [-e for e in excess]}[self.relation]
        return all(e <= t for e, t in zip(excess, self.tolerance, strict=True))  # a NaN is not ≤ anything: it fails


def figures(name: str, found, due: str, units: int = 1) -> Check:
    """`found`, one number or several, are those in `due`, say "0.25 1.50", up to `units` of each one's last digit."""
    numbers = due.split()
    digits = [len(number.partition(".")[2]) for number in numbers]
    return Check(name, _floats(found), "=", [float(number) for number in numbers], [units * 10.0**-d for d in digits])


def equal(name: str, found, due, tolerance: float = ROUNDING) -> Check:
    """Both sides of an equation, numbers or tensors; of many cases the one furthest off is shown."""
    found, due = torch.broadcast_tensors(as_tensor(found), as_tensor(due))
    worst = (found - due).abs().argmax()  # takes a NaN for the largest
    return Check(name, _floats(found.flatten()[worst]), "=", _floats(due.flatten()[worst]), [tolerance])


def at_least(name: str, found: Tensor, due: float, tolerance: float = ROUNDING) -> Check:
    """An inequality; of many cases the least is shown."""
    return Check(name, _floats(found.min()), "≥", [due], [tolerance])


def at_most(name: str, found: Tensor, due: float, tolerance: float = ROUNDING) -> Check:
    """An inequality; of many cases the largest is shown."""
    return Check(name, _floats(found.max()), "≤", [due], [tolerance])


def _floats(value) -> list[float]:
    return [float(v) for v in value] if isinstance(value, tuple | list) else as_tensor(value).flatten().tolist()


def as_tensor(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def outcomes(section: int, check_section: Callable[[], Iterator[Check]]) -> Iterator[dict]:
    """A row for each check. An exception counts as a check that failed, and ends the section."""
    where = "its first check"
    try:
        for check in check_section():
            yield {"section": section, **check._asdict(), "passed": check.passed}
            where = f"what follows “{check.name}”"
    except Exception as error:
        stopped = {"found": [], "relation": "=", "due": [], "tolerance": [], "passed": False}
        yield {
            "section": section,
            "name": where,
            **stopped,
            "error": " ".join(f"{type(error).__name__}: {error}".split()),
        }


def line(row: dict) -> str:
    """PASS or FAIL, the section, the statement, what was found and what is due; or the exception that came instead."""
    start = f"{'PASS' if row['passed'] else 'FAIL'}  §{row['section']:<2}  {row['name']:<58}  "
    if "error" in row:
        return f"{start}stopped by {row['error']}"
    found, due = (" ".join(f"{number:.8g}" for number in row[key]) for key in ("found", "due"))
    due = f"{due} ± {max(row['tolerance']):.0e}" if row["relation"] == "=" else f"{row['relation']} {due}"
    return f"{start}found {found}  due {due}"
