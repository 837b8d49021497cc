"""The optimizer of a run, for everything that steps a model as training does."""

from typing import Any

import torch

from harness.config import OptimizerConfig
from harness.errors import UserError
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


def saved_optimizer(model: GPT, info: dict[str, Any], path: str) -> torch.optim.AdamW:
    """The AdamW in a checkpoint's `info`, of this model, at the learning rate, betas and weight decay saved with its
    state (those of the run's last step). UserError, with `path`, where there is none or one that does not fit."""
    advice = "take --direction gradient, or random"
    state = info.get("optimizer", {})
    if not state.get("state"):
        raise UserError(f"{path} holds no optimizer state, so there is no next AdamW update: {advice}")
    optimizer = make_optimizer(model, OptimizerConfig(), fused=False)
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: its optimizer state does not fit its model ({e}): {advice}") from e
    for parameter in model.parameters():
        moments = optimizer.state[parameter]
        if not all(key in moments and moments[key].shape == parameter.shape for key in ("exp_avg", "exp_avg_sq")):
            raise UserError(f"{path}: its optimizer state does not fit its model, or is not AdamW's: {advice}")
    return optimizer
