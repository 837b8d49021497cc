"""What scripts/gpu_report.py measures: a module a section, each run by `python -m harness.gpu_report` in a process of
its own.

A section is a generator of rows, written to disk as they come, so that whatever ends it loses nothing before.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass
class Task:
    """What a section is given."""

    cpu: bool
    """a dry run: the same code on small shapes"""
    seed: int
    """of everything random"""
    seconds: float
    """how long it may take"""
    corpus: str
    """the folder of the one to train on, if it is prepared"""
    folder: str
    """for what it leaves behind"""
    report: list[dict] = field(default_factory=list)
    """the sections before it, as in the report's JSON"""

    def __post_init__(self):
        self.device = torch.device("cpu" if self.cpu else "cuda")
        self._end = time.monotonic() + self.seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def rows(self, section: str) -> list[dict]:
        """What the section of that name found before."""
        return [row for entry in self.report if entry["section"] == section for row in entry["rows"]]


class Table(NamedTuple):
    caption: str
    rows: list[dict]


class Section(NamedTuple):
    title: str
    minutes: float
    """at most"""
    run: Callable[[Task], Iterator[dict]]
    present: Callable[[list[dict]], list[Table]]
    """the tables that a reader wants, of the rows"""


def finished(what: str, jobs: Mapping[str, Callable[[], list[dict]]], pool: Executor) -> Iterator[dict]:
    """The rows of the jobs, by name, as soon as each has ended; one that fails has a row that says why."""
    with pool:
        running = {pool.submit(job): name for name, job in jobs.items()}
        for job in as_completed(running):
            try:
                yield from job.result()
            except Exception as error:  # the pool's too, where a process of it has died
                yield {what: running[job], "verdict": "FAILED", "note": f"{type(error).__name__}: {error}"[:400]}


def pivot(rows: list[dict], label: str, column: str, value: Callable[[dict], str]) -> list[dict]:
    """A row for each value of `label`, a column for each of `column`, both in the order of their first appearance."""
    table: dict[Any, dict] = {}
    for row in rows:
        table.setdefault(row[label], {label: row[label]})[str(row[column])] = value(row)
    return list(table.values())


def with_error(value: float, error: float, digits: int = 3) -> str:
    """`1.234 ± 0.005`: the value and its error with so many decimals, or more where the error would be shown as 0."""
    if error > 0:
        digits = max(digits, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
