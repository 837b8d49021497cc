"""The optimizer of a run and its learning rate, for everything that steps a model as training does."""

import math
from typing import Any

import torch

from harness.config import Config, OptimizerConfig
from harness.errors import UserError
from model import GPT


def make_optimizer(model: GPT, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the model's parameter groups with the learning rate, betas and weight decay of `config`; PyTorch's
    fused step, or, not `fused`, its plain loop over the parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=fused,
        foreach=None if fused else False,
    )


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and norms (one dimension), and what the normalizer learns, do not."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decaying = {name for name, p in parameters.items() if p.dim() >= 2} - model.normalizer_parameters().keys()
    return [
        {"params": [p for name, p in parameters.items() if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decaying], "weight_decay": 0.0},
    ]


def learning_rate(step: int, config: Config) -> float:
    """The rate at step 1, 2, …: a linear warm-up, a half cosine from lr to min_lr at decay_steps, then min_lr."""
    c = config.optimizer
    done, decay_steps = step - 1, c.decay_steps or config.training.max_steps
    if done < c.warmup_steps:
        return c.lr * step / (c.warmup_steps + 1)
    if done >= decay_steps:
        return c.min_lr
    progress = (done - c.warmup_steps) / (decay_steps - c.warmup_steps)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.lr - c.min_lr)


def schedule_note(config: Config) -> str | None:
    """What to say of a run whose learning rate has not come down to min_lr by its last step."""
    c, max_steps = config.optimizer, config.training.max_steps
    decay_steps, last = c.decay_steps or max_steps, learning_rate(max_steps, config)
    if last <= c.min_lr or max(decay_steps, c.warmup_steps + 1) <= max_steps:
        return None
    return (
        f"note: the learning rate ends at {last:.3g} and not at min_lr, {c.min_lr:.3g}: training.max_steps is "
        f"{max_steps}, optimizer.decay_steps {decay_steps} and warmup_steps {c.warmup_steps}"
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
