"""The step under the clock is the step of training, and its baseline computes nanoGPT's loss."""

import math

import pytest
import torch

from harness.config_files import load_config
from harness.stepping import PHASES, NanoGPT, Stepper, relative_errors
from tests.helpers import random_ids, tiny_gpt
from tests.processes import finished

pytestmark = pytest.mark.usefixtures("training_folder")


def stepper(*changes: str, **how) -> Stepper:
    return Stepper(load_config(["config.yaml", *changes]), **how)


@pytest.mark.slow
@pytest.mark.parametrize("feedback", ["backprop", "fa"])
def test_its_steps_give_the_losses_and_weights_of_training(feedback):
    how = ("--training.compile", "false", "--training.feedback", feedback, "--training.max_steps", "3")
    run = finished("run", *how)
    own = stepper(*how, "--training.micro_batch_size", "8")
    expected = [line["train/loss"] for line in run.metrics() if "train/loss" in line]
    assert own.losses(3) == pytest.approx(expected, rel=1e-6)
    for name, value in run.checkpoint()["model"].items():
        torch.testing.assert_close(own.raw_model.state_dict()[name], value, rtol=0, atol=1e-6)
    laps = own.run(2)
    assert [list(each) for each in laps] == 2 * [list(PHASES)]
    assert all(seconds >= 0 for each in laps for seconds in each.values())


def test_the_baseline_is_softmax_with_pytorchs_cross_entropy():
    assert stepper(nanogpt=True).raw_model.config.normalizer == "softmax"
    model, idx = tiny_gpt(noise=0.3), random_ids(3, 12)
    targets = idx.roll(-1, 1)
    targets[:, -1] = -1
    logits, loss = NanoGPT(model)(idx, targets)
    expected_logits, expected = model(idx, targets)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected)


def test_it_steps_by_the_configs_optimizer_and_the_baseline_by_adamw():
    name = ("--optimizer.name", "muon", "--optimizer.muon_lr", "0.5")
    own, baseline = stepper(*name), stepper(*name, nanogpt=True)
    assert sorted({group["lr"] for group in own.optimizer.param_groups}) == [1e-2, 0.5]
    assert isinstance(baseline.optimizer, torch.optim.AdamW)
    assert len({p for group in baseline.optimizer.param_groups for p in group["params"]}) == 2 * 6 + 3


def test_what_it_says_of_a_step():
    own = stepper("--training.micro_batch_size", "3")
    assert own.micro_batch_size == 2  # the most that divides the 8 of a batch
    found = own.describe()
    assert (found["dtype"], found["tokens"]) == ("float32", 8 * 16)
    assert found["flops"] == own.raw_model.flops_per_token() * 8 * 16
    assert math.isfinite(found["peak_flops"])
    assert own.compiled_error() is None


@pytest.mark.parametrize(
    ("normalizer", "name"), [("softmax", "adamw"), ("sink", "adamw"), ("softmax", "sgd"), ("sink", "muon")]
)
def test_a_step_reads_no_number_back_from_the_device(normalizer, name):
    """On a GPU each of these operators would wait until all that was queued is done."""
    how = ("--model.normalizer", normalizer, "--optimizer.name", name, "--training.micro_batch_size", "4")
    own = stepper(*how, "--training.compile", "false")
    own.run(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        own.run(2)
    waiting = [event for event in profiler.events() if event.name in ("aten::_local_scalar_dense", "aten::nonzero")]
    # (Only the CPU's AdamW reads the number of the step as a number.)
    assert all("aten::_fused_adamw_" in ancestors(event) for event in waiting)


def ancestors(event) -> list[str]:
    return [event.name] + (ancestors(event.cpu_parent) if event.cpu_parent else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu():
    own = stepper("--training.device", "cuda")
    own.run(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        own.run(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("eager", "compiled", "error"),
    [(1.0, 1.0, 0.0), (1.0, 1.5, 0.5), (1.0, 0.0, 1.0), (1.0, math.nan, math.inf), (math.nan, 1.0, math.inf),
     (math.nan, math.nan, math.nan)],
)  # fmt: skip
def test_a_compiled_gradient_is_compared_and_none_that_is_not_finite_is_hidden(eager, compiled, error):
    own = stepper()

    def scaled(factor: float):
        def run(x, y, with_logits):
            logits, loss = own.raw_model(x, y, with_logits)
            return logits, loss * factor

        return run

    own.eager, own.model = scaled(eager), scaled(compiled)
    assert own.compiled_error() == pytest.approx(error, abs=1e-3, nan_ok=True)


def test_a_gradient_that_should_be_zero_has_no_small_error():
    zeros, ones = torch.zeros(3), torch.ones(3)
    cases = {"alike": (ones, ones), "none": (zeros, zeros), "some": (ones, 1.5 * ones), "lost": (ones, zeros)}
    cases |= {"not zero": (zeros, 1e-10 * ones), "not finite": (ones, math.nan * ones)}
    expected, found = ({name: pair[i] for name, pair in cases.items()} for i in range(2))
    errors = {"alike": 0.0, "none": 0.0, "some": 0.5, "lost": 1.0, "not zero": math.inf, "not finite": math.nan}
    assert relative_errors(expected, found) == pytest.approx(errors, nan_ok=True)
