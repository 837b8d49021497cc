"""One optimizer, with the config's settings, wherever a model is stepped as training does."""

import pytest
import torch

from harness.config import OptimizerConfig
from harness.optimizers import make_optimizer
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
