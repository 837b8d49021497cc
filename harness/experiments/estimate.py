"""What an experiment would cost, from a few real steps of each variant."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from harness.config import Config
from harness.experiments.grid import Cell, Experiment
from harness.stepping import Stepper

STEPS = 8
"""are timed of each variant, after as many to warm up"""


def estimate(experiment: Experiment) -> Iterator[dict]:
    """A row a cell: its tokens, FLOPs (see GPT.flops_per_token), and the seconds that its training will take here,
    without start, evaluations and diagnostics. A variant is timed once, for all seeds."""
    paces: dict[str, tuple[float, dict]] = {}
    for cell in experiment.cells:
        if cell.variant not in paces:
            paces[cell.variant] = _pace(cell)
        seconds, step = paces[cell.variant]
        steps = cell.config.training.max_steps
        yield {
            "cell": cell.name,
            "steps": steps,
            "tokens": steps * step["tokens"],
            "flops": steps * step["flops"],
            "seconds": steps * seconds,
        }


def _pace(cell: Cell) -> tuple[float, dict]:
    """Seconds a step, the median, and what Stepper says of a step."""
    config = cell.config
    if (reference := config.kl.reference) and not reference.startswith("hf:") and not Path(reference).exists():
        config = _without_reference(config)
    stepper = Stepper(config)
    stepper.run(STEPS)
    seconds = statistics.median(sum(phases.values()) for phases in stepper.run(STEPS))
    described = stepper.describe()
    if config is not cell.config:  # its forward pass is about a third of a step's
        seconds, described["flops"] = seconds * 4 / 3, described["flops"] * 4 // 3
    return seconds, described


def _without_reference(config: Config) -> Config:
    """The config without its KL reference, a cell that is not trained yet."""
    return dataclasses.replace(config, kl=dataclasses.replace(config.kl, reference=None))
