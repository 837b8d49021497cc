"""One optimizer, with the config's settings, wherever a model is stepped as training does."""

from pathlib import Path

import pytest
import torch

from harness.config import OptimizerConfig
from harness.optimizers import make_optimizer
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_the_configs(fused):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.3, beta1=0.5, beta2=0.6), fused)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.1, (0.5, 0.6), decay, fused)


def test_it_is_built_in_one_place():
    files = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py"), *ROOT.glob("scripts/*.py")]
    builders = [file.name for file in files if "AdamW(" in file.read_text(encoding="utf-8")]
    assert builders == ["optimizers.py"]
