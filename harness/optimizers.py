"""The optimizer of a run, for everything that steps a model as training does."""

import torch

from harness.config import OptimizerConfig
from model import GPT


def make_optimizer(model: GPT, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the model's parameter groups with the learning rate, betas and weight decay of `config`; PyTorch's
    fused step, or, not `fused`, its plain loop over the parameters."""
    return torch.optim.AdamW(
        model.parameter_groups(config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=fused,
        foreach=None if fused else False,
    )
