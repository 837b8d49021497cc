"""Steps whose gradient is not finite: stopped at, or skipped up to a limit, the same after a resume."""

import math
from functools import partial

import pytest
import torch

from harness.config import Config
from harness.distributed import Ranks
from harness.errors import UserError
from harness.nonfinite import Skips, check_finite
from tests.processes import TrainingRun, assert_same_run

SKIP = ("--training.on_nonfinite", "skip", "--training.keep_interval", "1")
POISONED = (3, 4, 12)


def poison(steps: tuple[int, ...]) -> None:
    """At these steps the first gradient has a NaN, as one element that overflows in a kernel leaves it."""
    import train

    clip, set_rates, now = torch.nn.utils.clip_grad_norm_, train.set_learning_rates, [0]

    def set_learning_rates(optimizer, step, config):
        now[0] = step
        return set_rates(optimizer, step, config)

    def clip_grad_norm_(parameters, limit):
        parameters = list(parameters)
        if now[0] in steps:
            parameters[0].grad.view(-1)[0] = math.nan
        return clip(parameters, limit)

    train.set_learning_rates, torch.nn.utils.clip_grad_norm_ = set_learning_rates, clip_grad_norm_


def poisoned(*arguments, steps=POISONED, status: int = 0, **how) -> TrainingRun:
    run = TrainingRun(*arguments, inject=partial(poison, steps=steps), **how)
    assert run.wait() == status, run.output()
    return run


def test_steps_are_skipped_counted_and_the_same_after_a_kill(training_folder):
    whole = poisoned("whole", *SKIP)
    assert "step 4: gradient norm nan: skipped, 2 in a row" in whole.output()
    lines = whole.metrics()
    assert [line["train/skipped_steps"] for line in lines[1:]] == [0, 0, 1, *[2] * 8, *[3] * 13]
    assert lines[3]["train/grad_norm"] is None
    before, skipped, after = (whole.checkpoint(f"steps/{step}.pt")["model"] for step in (2, 4, 5))
    for name, weight in before.items():
        assert torch.equal(weight, skipped[name])
    assert not torch.equal(skipped["lm_head.weight"], after["lm_head.weight"])
    assert poisoned("killed", *SKIP, signal_at=(4, 9), status=-9).metrics()[-1]["step"] == 4
    assert_same_run(whole, poisoned("killed", *SKIP))


def test_a_run_stops_at_the_first_or_beyond_the_limit_and_a_resume_counts_on(training_folder):
    assert "error: step 3: train/loss" in poisoned("run", status=2).output()
    limited = (*SKIP, "--training.nonfinite_limit", "2")
    poisoned("limited", *limited, steps=(3, 4, 5), signal_at=(4, 9), status=-9)
    message = poisoned("limited", *limited, steps=(3, 4, 5), status=2).output()
    assert "error: step 5: gradient norm nan, after training.nonfinite_limit, 2, steps in a row that were" in message


def test_a_lower_limit_counts_from_what_was_skipped_before():
    config = Config()
    config.training.on_nonfinite, config.training.nonfinite_limit = "skip", 2
    skips = Skips(config, {"total": 9, "in_a_row": 5})
    with pytest.raises(UserError, match=r"step 7: gradient norm inf, after training.nonfinite_limit, 2, steps"):
        skips.skip(7, torch.tensor(math.inf), print)


def test_float16s_loss_scaling_skips_by_itself_and_a_step_that_was_skipped_is_not_judged():
    def judged(loss: float, norm: float, skipped: bool, scaled: bool) -> dict[str, float]:
        unchecked = [(1, {"train/loss": torch.tensor(loss)}, torch.tensor(norm), skipped)]
        return check_finite(unchecked, Ranks(torch.device("cpu")), scaled)

    with pytest.raises(UserError, match="step 1: train/loss 2, gradient norm inf: not finite"):
        judged(2.0, math.inf, False, False)
    assert judged(2.0, math.inf, False, True) == {"train/loss": 2}
    with pytest.raises(UserError, match="train/loss nan"):
        judged(math.nan, math.inf, False, True)
    assert math.isnan(judged(math.nan, math.inf, True, True)["train/loss"])


def test_a_step_that_is_skipped_lowers_the_loss_scale():
    """What the loop does under float16: unscale_, no step, update."""
    scaler, weight = torch.amp.GradScaler("cpu", init_scale=8.0), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight * math.inf).backward()
    scaler.unscale_(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4
