"""The optimizer of a run and its learning rate, for everything that steps a model as training does."""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config import Config, OptimizerConfig
from harness.errors import UserError
from harness.parallel import is_sharded, like
from measure.slopes import run_config
from model import GPT

KINDS = ("qkv", "matrix", "head", "embedding", "vector")  # of parameters, see `kinds_of`
DECAYING = {  # optimizer.decay → the kinds that weight decay is of
    "matrices_and_embeddings": KINDS[:4],
    "matrices": KINDS[:3],
    "all": KINDS,
}
BY_MUON = {"muon": KINDS[:2], "adamw_muon_embeddings": KINDS[:4]}  # optimizer.name → the kinds that Muon steps


def make_optimizer(model: GPT, config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the model's parameter groups, each at its peak learning rate. AdamW takes
    PyTorch's fused step or, not `fused`, its plain loop over the parameters."""
    by_muon, decay = BY_MUON.get(config.name, ()), (config.weight_decay, config.decay)
    rest = parameter_groups(model, *decay, kinds=[kind for kind in KINDS if kind not in by_muon])
    foreach = None if fused else False
    if config.name == "sgd":  # never fused: a first step that float16's scaler skips would leave that momentum unset
        momentum = 0.9 if config.momentum is None else config.momentum
        return torch.optim.SGD(rest, lr=config.lr, momentum=momentum, nesterov=momentum > 0, foreach=foreach)
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=betas, eps=config.eps, fused=fused, foreach=foreach)
    if not by_muon:
        return adamw
    momentum = 0.95 if config.momentum is None else config.momentum
    lr_ratio = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    parts = {"qkv": model.transformer.h[0].attn.sizes}  # queries, keys and values are three matrices
    groups = [
        group | {"lr_ratio": lr_ratio, "parts": parts.get(kind)}
        for kind in by_muon
        for group in parameter_groups(model, *decay, kinds=[kind])
    ]
    return Together(adamw, Muon(groups, lr=lr_ratio * config.lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))


class Muon(torch.optim.Muon):
    """PyTorch's, but for a group with `parts`, numbers of rows: its parameters are as many matrices, one below the
    other, and the step of each is made orthogonal by itself. Of matrices that are sharded over ranks, each rank keeps
    its shares of weights and momentum, and one matrix's update at a time is gathered, to be made orthogonal whole."""

    def step(self, closure=None) -> None:  # type: ignore[override]  # without a closure, which none here has
        if not is_sharded(self.param_groups[0]["params"][0]):
            super().step()
            return
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_sharded(parameter, group)
        self.param_groups = groups

    @torch.no_grad()
    def _step_sharded(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad: Any = parameter.grad
        momentum, state = group["momentum"], self.state[parameter]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(grad))
        buffer.lerp_(grad, 1 - momentum)
        # PyTorch's step of a matrix of zeros whose gradient is this update, without momentum, leaves the change in it.
        change = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        change.grad = grad.lerp(buffer, momentum).full_tensor()
        self.param_groups = [group | {"params": [change], "momentum": 0.0}]
        super().step()
        del self.state[change]
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(like(change, parameter))

    def _init_group(self, group, *tensors_of) -> bool:
        """Collects parameters, gradients and momenta for a step; the latter works in place, so views will do."""
        is_complex = super()._init_group(group, *tensors_of)
        for tensors in tensors_of if group["parts"] else ():
            tensors[:] = [part for whole in tensors for part in whole.split(group["parts"])]
        return is_complex


class Together(torch.optim.Optimizer):
    """Optimizers of parameters of their own as one, which has the groups and the state of all and steps them all."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure=None) -> None:  # type: ignore[override]  # without a closure, which none here has
        groups = iter(self.param_groups)
        for each in self.optimizers:  # anew at every step: what loads a state puts others in the place of both
            each.param_groups = list(itertools.islice(groups, len(each.param_groups)))
            each.state = self.state
            each.step()


def parameter_groups(model: GPT, weight_decay: float, decay="matrices_and_embeddings", kinds=KINDS) -> list[dict]:
    """The parameters of these kinds in groups that decay and groups that do not, as `optimizer.decay` names them. Their
    order is the same whatever decays, so that the state in a checkpoint, which goes by it, fits after a change."""
    found = {name: kind for name, kind in kinds_of(model).items() if kind in kinds}
    parameters, ordered = dict(model.named_parameters()), sorted(found, key=lambda name: found[name] == "vector")
    return [
        {"params": [parameters[name] for name in names], "weight_decay": weight_decay if decays else 0.0}
        for decays, names in itertools.groupby(ordered, lambda name: found[name] in DECAYING[decay])
    ]


def kinds_of(model: GPT) -> dict[str, str]:
    """What each parameter that is trained is: in a block, qkv, the matrices of queries, keys and values in one, or
    another matrix; embedding, of tokens (the head's too, where they are one) or positions; head, of its own; or vector:
    biases, norms and, whatever its shape, what the normalizer learns."""
    learned, kinds = model.normalizer_parameters(), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or name in learned:
            kinds[name] = "vector"
        elif name.startswith("transformer.h."):
            kinds[name] = "qkv" if name.endswith("attn.c_attn.weight") else "matrix"
        else:
            kinds[name] = "head" if name == "lm_head.weight" else "embedding"
    return kinds


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Give every group of the optimizer its rate at a step: `learning_rate`, which is returned, or Muon's multiple."""
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1)
    return lr


def learning_rate(step: int, config: Config) -> float:
    """The rate at step 1, 2, …, with n = step − 1 steps done, W = warmup_steps and D = decay_steps, or max_steps:

        n < W        lr · step / (W + 1)
        W ≤ n < D    min_lr + (lr − min_lr) · share, by `schedule`, with t = (n − W) / (D − W):
                       cosine    share = (1 + cos πt) / 2
                       linear    share = 1 − t
                       wsd       share = min(1, (D − n) / (D − S)), S = max(W, (1 − decay_share) · D)
        D ≤ n        min_lr

    wsd (warm-up, stable, decay) is Hu et al.'s (2024), with a linear decay.
    """
    c = config.optimizer
    done, decay_steps = step - 1, c.decay_steps or config.training.max_steps
    if done < c.warmup_steps:
        return c.lr * step / (c.warmup_steps + 1)
    if done >= decay_steps:
        return c.min_lr
    progress = (done - c.warmup_steps) / (decay_steps - c.warmup_steps)
    if c.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif c.schedule == "linear":
        share = 1 - progress
    else:
        stable = max(c.warmup_steps, (1 - c.decay_share) * decay_steps)
        share = min(1.0, (decay_steps - done) / (decay_steps - stable))
    return c.min_lr + share * (c.lr - c.min_lr)


def schedule_note(config: Config) -> str | None:
    """What to say of a run whose learning rate has not come down to min_lr by its last step, or rises to it. UserError
    where the rate would have to be at its least before it has risen."""
    c, max_steps = config.optimizer, config.training.max_steps
    decay_steps, last = c.decay_steps or max_steps, learning_rate(max_steps, config)
    if decay_steps <= c.warmup_steps < max_steps:
        problem = f"{decay_steps}, where min_lr is reached, lies before the end of the warm-up: warmup_steps is"
        raise config.error("optimizer.decay_steps", f"{problem} {c.warmup_steps}. Raise the one or lower the other")
    if c.min_lr > c.lr:
        return f"note: the learning rate rises after the warm-up, from lr, {c.lr:.3g}, towards min_lr, {c.min_lr:.3g}"
    if last <= c.min_lr or max(decay_steps, c.warmup_steps + 1) <= max_steps:
        return None
    return (
        f"note: the learning rate ends at {last:.3g} and not at min_lr, {c.min_lr:.3g}: training.max_steps is "
        f"{max_steps}, optimizer.decay_steps {decay_steps} and warmup_steps {c.warmup_steps}"
    )


def saved_optimizer(model: GPT, info: dict[str, Any], path: str) -> torch.optim.Optimizer:
    """The optimizer in a checkpoint's `info`, of this model, at the learning rates and whatever else was saved with its
    state (those of the run's last step). UserError, with `path`, where there is none or one that does not fit."""
    advice = "take --direction gradient, or random"
    state, chosen = info.get("optimizer", {}), {}
    sharded = "shards" in info
    for key in ("name", "decay"):  # which parameters are in which group
        if run_config(info, key) is not None:
            chosen[key] = run_config(info, key)
    config = OptimizerConfig(**chosen)
    stateless = config.name == "sgd" and run_config(info, "momentum") == 0
    if not (state.get("state") or sharded or (stateless and state.get("param_groups"))):
        raise UserError(f"{path} holds no optimizer state, so there is no next update by {config.name}: {advice}")
    optimizer = make_optimizer(model, config, fused=False)
    needed = [set(group) for group in optimizer.param_groups]
    if sharded:
        from harness.sharded import optimizer_state  # here: what it imports takes half a second

        state = state | {"state": optimizer_state(info, Path(path), optimizer)}
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: its optimizer state does not fit its model ({e}): {advice}") from e
    for keys, group in zip(needed, optimizer.param_groups, strict=True):
        moments = ("exp_avg", "exp_avg_sq") if "betas" in keys else () if stateless else ("momentum_buffer",)
        for parameter in group["params"]:
            held = optimizer.state[parameter]
            if not keys <= set(group) or any(getattr(held.get(m), "shape", None) != parameter.shape for m in moments):
                problem = f"its optimizer state does not fit its model, or is not {config.name}'s"
                raise UserError(f"{path}: {problem}: {advice}")
    return optimizer
