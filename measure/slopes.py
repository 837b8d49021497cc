"""How the attention's logits move when all parameters move along a direction, exactly: forward-mode differentiation.

A direction is a dict of tensors, one for each named parameter. Everything here is computed in float64 on a copy of the
model, `float64_copy`.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.backends import materialized_attention
from measure.jacobian import backward_mode, take_gradients
from measure.probe import capture_qk
from model import GPT, NORMALIZERS, attention_rows, repeat_heads

Direction = dict[str, Tensor]
DIRECTIONS = ("adamw", "gradient", "random")
LR = 1e-4
"""the step of gradient and random for a checkpoint that knows no learning rate of its own"""


def float64_copy(model: GPT) -> GPT:
    return copy.deepcopy(model).double().eval()


def adamw_direction(
    model: GPT, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]], grad_clip: float | None
) -> Direction:
    """What the model's `optimizer`, with its state, would add to the parameters at its next step.

    The step is made from the mean gradient over `batches` (x, y), as the run's own backward pass gives it, clipped to
    the norm `grad_clip` if there is one; then the parameters are as they were.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _backward(model, batches)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    direction = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    return direction


def gradient_direction(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], lr: float) -> Direction:
    """Against the mean gradient over `batches`, as the run's own backward pass gives it; its length as of `scaled`."""
    _backward(model, batches)
    return scaled({name: -gradient for name, gradient in take_gradients(model).items()}, lr)


def random_direction(model: GPT, lr: float, seed: int) -> Direction:
    """Gaussian, so that all directions are equally likely; its length as of `scaled`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
    return scaled({name: x.to(next(model.parameters()).device) for name, x in drawn.items()}, lr)


def scaled(direction: Direction, lr: float) -> Direction:
    """The direction with a root mean square of `lr` over all parameters. Adam's steps are about as long: they move each
    parameter by about lr, however long the gradient is. ValueError where the direction's length is 0 or not finite."""
    norm, count = length(direction), sum(x.numel() for x in direction.values())
    if not 0 < norm < float("inf"):
        raise ValueError(f"the gradient has the norm {norm}: it gives no direction; take --direction random")
    return {name: x * (lr * count**0.5 / norm) for name, x in direction.items()}


def length(direction: Direction) -> float:
    """The Euclidean norm over all parameters."""
    return torch.stack([torch.linalg.vector_norm(x) for x in direction.values()]).norm().item()


def learning_rate(info: dict[str, Any]) -> float | None:
    """The learning rate of the run's last step, by its optimizer; else that of its config; None without either."""
    groups = info.get("optimizer", {}).get("param_groups", [])
    return groups[0]["lr"] if groups else run_config(info, "lr") or run_config(info, "learning_rate")


def attention_slopes(model: GPT, direction: Direction, idx: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer the attention probabilities α⁰ and the slopes a of their logits along `direction`, for one sequence
    idx (T,): (H, T, n) each, n = T, or T + 1 with the null slot last.

    a is the total derivative of the logits S = QKᵀ/√D, through everything below (norms and rotations of Q and K too):
    `(Q̇Kᵀ + QK̇ᵀ)/√D`. softmax1's null slot has slope 0, a sink's that of its parameter, and a kvbias's key moves as any
    other. A key that a query cannot see (α⁰ = 0) is given the slope of the first key, so that it does not widen the
    spread. All this takes one forward pass with its tangents; that pass does not depend on `backward`, so neither do
    the slopes. ValueError for a normalizer that is no softmax: its weights are not α ∝ e^S, and the KL has its bounds
    only along the ray of such weights.
    """
    normalizer = NORMALIZERS[model.config.normalizer]
    if not normalizer.is_softmax:
        raise ValueError(
            f"normalizer '{model.config.normalizer}' is no softmax over the keys and perhaps a null slot, and only of "
            "such rows are KL, variance and bounds along a ray of logits defined"
        )

    def queries_and_keys(parameters):
        with capture_qk(model) as captured, materialized_attention():
            torch.func.functional_call(_Features(model), {f"model.{n}": p for n, p in parameters.items()}, (idx[None],))
        return [(q[0], k[0]) for _, q, k in captured]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with backward_mode(model, "full"):  # forward-mode differentiation has no other
        moved = torch.func.jvp(queries_and_keys, (parameters,), (direction,))
    primals, tangents = moved  # type: ignore[misc]  # the type allows for a third value, which only has_aux=True brings

    H, T, D = primals[0][0].shape
    visible = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    for layer, ((q, k), (dq, dk)) in enumerate(zip(primals, tangents, strict=True)):
        with torch.no_grad():
            alpha0, null = attention_rows(q[None], k[None], **model.transformer.h[layer].attn.arguments())
        k, dk = (repeat_heads(x[None], H)[0] for x in (k, dk))
        alpha0, slopes = alpha0[0], (dq @ k.mT + q @ dk.mT) / D**0.5
        slopes = torch.where(visible, slopes, slopes[..., :1])
        if null is not None:
            attn, null_slope = f"transformer.h.{layer}.attn", slopes.new_zeros(H)
            if normalizer.null_logit is not None:
                null_slope = direction.get(f"{attn}.{normalizer.null_logit}", null_slope)
            else:
                key, dkey = (repeat_heads(x[f"{attn}.null_key"][None, :, None], H)[0] for x in (parameters, direction))
                null_slope = (dq @ key.mT + q @ dkey.mT) / D**0.5
            alpha0 = torch.cat((alpha0, null[0]), -1)
            slopes = torch.cat((slopes, null_slope.to(slopes).view(H, -1, 1).expand(H, T, 1)), -1)
        yield alpha0, slopes


class _Features(torch.nn.Module):
    """The model without its head, whose products with the whole vocabulary no logit of the attention needs."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor) -> Tensor:
        return self.model.features(idx)


def _backward(model: GPT, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Leave the mean gradient over the batches in the parameters."""
    count = 0
    for x, y in batches:
        model(x, y)[1].backward()
        count += 1
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= count


def run_config(info: dict[str, Any], key: str):
    """The value of `key` in the run's config: in section `optimizer` of this project's, or in nanoGPT's flat one."""
    config = info.get("config") or {}
    return config.get("optimizer", config).get(key)
