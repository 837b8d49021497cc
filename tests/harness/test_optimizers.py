"""One optimizer, with the config's settings, wherever a model is stepped as training does."""

import pytest
import torch

from harness.config import OptimizerConfig
from harness.config_files import load_config
from harness.optimizers import make_optimizer, schedule_note
from tests.helpers import ROOT, tiny_gpt


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_the_configs(fused):
    model = tiny_gpt()
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.3, beta1=0.5, beta2=0.6), fused)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.1, (0.5, 0.6), decay, fused)


def test_it_is_built_in_one_place():
    files = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py"), *ROOT.glob("scripts/*.py")]
    builders = [file.name for file in files if "AdamW(" in file.read_text(encoding="utf-8")]
    assert builders == ["optimizers.py"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--optimizer.decay_steps", "24"), None),
        (("--optimizer.decay_steps", "5"), None),
        (("--optimizer.decay_steps", "5000"), "ends at 0.01 and not at min_lr, 0.001: training.max_steps is 24, "
         "optimizer.decay_steps 5000 and warmup_steps 2"),
        (("--optimizer.warmup_steps", "47"), "ends at 0.005 and not at min_lr, 0.001: training.max_steps is 24, "
         "optimizer.decay_steps 24 and warmup_steps 47"),
        (("--optimizer.decay_steps", "5000", "--optimizer.min_lr", "1e-2"), None),  # a constant rate
    ],
)  # fmt: skip
@pytest.mark.usefixtures("training_folder")
def test_a_schedule_that_does_not_come_to_its_end_is_said(arguments, expected):
    note = schedule_note(load_config(["config.yaml", *arguments]))
    assert note == (expected and f"note: the learning rate {expected}")
