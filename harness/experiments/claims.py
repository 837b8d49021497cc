"""Published claims, and whether an experiment bears them out: *held*, *did not hold* or *not decided*.

    sentence: softmax1 keeps the loss and removes the kurtosis of the activations.
    source: "Miller (2023), Attention Is Off By One: https://…"
    tested_at: nothing; the post has no experiment              # the scale at which its source tested it
    experiment: ../stdlib.yaml                                  # relative to this file
    seeds: 3                                                    # as many at least; the default
    decides:                                                    # measure → what has to be so, of variants' names
      perplexity/loss: softmax1 < softmax + 0.01
      activation_kurtosis/avg kurtosis: softmax1 < 0.5 * softmax

A comparison is arithmetic on the variants' values of one seed: numbers, + − * / and abs(…), min(…), max(…), with one <
or > between two sides. The difference of the sides is taken seed by seed and tested against 0, two-sided, at 5 % after
Holm's correction over all comparisons of all claims of the experiment. One that is significant the way it was written
*held*, the other way *did not hold*; any other is *not decided*. A claim held if all its comparisons did, and did not
hold if one of them did not.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.experiments.grid import Experiment
from harness.experiments.results import Results
from measure.seeds import Difference

HELD, FAILED, OPEN = "held", "did not hold", "not decided"


@dataclass(frozen=True)
class Claim:
    path: Path
    sentence: str
    source: str
    tested_at: str
    experiment: Path
    seeds: int
    decides: dict[str, list[str]]
    """measure → comparisons"""

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Comparison:
    """One comparison with what came of it."""

    measure: str
    text: str
    """as the claim's file has it"""
    means: dict[str, float]
    """variant → mean over the seeds that were compared, of the variants that it names"""
    left: float
    """means over the seeds that were compared, of the two sides"""
    right: float
    seeds: list[int]
    """that have all values it needs"""
    difference: Difference
    """of left − right"""
    p: float | None
    """after Holm's correction"""
    outcome: str
    sentence: str
    """made from the numbers: what was found, with the interval"""


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    comparisons: list[Comparison]
    outcome: str
    sentence: str
    """made from the numbers"""
    problems: list[str]
    """in a line each: too few seeds, a measure that no run has, a variant that is not there"""


def load_claims(experiment: Experiment) -> list[Claim]:
    """Those in claims/ beside the experiment's file that name it. UserError for every mistake in one."""
    ...


def judge(results: Results, claims: list[Claim]) -> list[Verdict]: ...
