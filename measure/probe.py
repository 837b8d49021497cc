"""Look inside a model: statistics of its weights and of what flows through it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from measure.moments import excess_kurtosis, whole
from model import GPT, CausalSelfAttention, GPTConfig

# The tensors that `watch` sees, without the layer's number, and what they are.
TENSORS = {
    "transformer.drop": "the residual stream after the embedding",
    "transformer.h": "the residual stream after the block",
    "ln_1": "the norm before the attention",
    "attn.q": "queries as they enter the scores, normed and rotated where the model does so, all heads side by side",
    "attn.k": "keys, likewise; fewer heads than queries where these are grouped",
    "attn.v": "values, as many heads as keys",
    "attn.output": "what the heads read, before the projection",
    "attn.c_proj": "the attention's projection",
    "ln_2": "the norm before the MLP",
    "mlp.hidden": "the MLP's hidden layer, what mlp.c_proj reads: gelu(c_fc(x)), or silu(c_gate(x)) · c_fc(x)",
    "mlp.c_proj": "the MLP's output",
    "transformer.ln_f": "the final norm",
    "lm_head": "the logits",
}


def kind_of(name: str) -> str:
    """transformer.h.3.attn.q → attn.q, and transformer.h.3 → transformer.h: a key of TENSORS."""
    layer = re.match(r"transformer\.h\.\d+(\.)?", name)
    if layer is None:
        return name
    return name[layer.end() :] if layer[1] else "transformer.h" + name[layer.end() :]


def weight_kurtosis(model: GPT) -> dict[str, float | None]:
    """The excess kurtosis of every weight matrix, by parameter name; None where its variance is zero."""
    return {name: excess_kurtosis(whole(p)) for name, p in model.named_parameters() if p.dim() >= 2}


def rows_of_c_attn(x: Tensor, config: GPTConfig) -> dict[str, Tensor]:
    """x ((H + 2 H_kv) D, …), the weight or bias of c_attn or its gradient: the rows that make q (H, D, …), and those
    that make k and v (H_kv, D, …)."""
    heads = (config.n_head, config.kv_heads, config.kv_heads)
    parts = zip("qkv", x.split([n * config.head_size for n in heads]), heads, strict=True)
    return {part: rows.unflatten(0, (n, config.head_size)) for part, rows, n in parts}


@contextlib.contextmanager
def capture_qk(model: GPT) -> Iterator[list[tuple[CausalSelfAttention, Tensor, Tensor]]]:
    """A list that fills, while the model runs, with (attention module, q, k) of each layer: q (B, H, T, D) and
    k (B, H_kv, T, D), as they enter the scores."""
    captured: list[tuple[CausalSelfAttention, Tensor, Tensor]] = []
    handles = []

    def hook_for(attn: CausalSelfAttention):
        def hook(_core, inputs):
            q, k, _ = inputs
            captured.append((attn, q, k))

        return hook

    for block in model.transformer.h:
        handles.append(block.attn.core.register_forward_pre_hook(hook_for(block.attn)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class AttentionPass(NamedTuple):
    """One layer's attention on a batch: what went into it, and the gradient that came back to its output."""

    attn: CausalSelfAttention
    q: Tensor  # (B, H, T, D), as it enters the scores
    k: Tensor  # (B, H_kv, T, D), as it enters the scores
    v: Tensor  # (B, H_kv, T, D)
    grad_out: Tensor  # dL/dO (B, H, T, D), where O is what the heads read


@contextlib.contextmanager
def capture_attention(model: GPT) -> Iterator[list[AttentionPass]]:
    """A list that fills, while a loss runs back through the model, with each layer's AttentionPass, in their order."""
    captured: list[AttentionPass] = []
    handles = []

    def hook_for(attn: CausalSelfAttention):
        def hook(_core, inputs, out):
            q, k, v = (x.detach() for x in inputs)
            # Insert at the front: the backward pass reaches the last layer first.
            out.register_hook(lambda grad: captured.insert(0, AttentionPass(attn, q, k, v, grad.detach())))

        return hook

    for block in model.transformer.h:
        handles.append(block.attn.core.register_forward_hook(hook_for(block.attn)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def side_by_side(x: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H·D)"""
    return x.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def watch(
    model: GPT,
    on_tensor: Callable[[str, Tensor], None],
    on_attention: Callable[[int, CausalSelfAttention, Tensor, Tensor, Tensor], None],
) -> Iterator[None]:
    """While the model runs, call on_tensor(name, x) for every tensor on its way, as soon as it is there: x (B, T, C) of
    each of `TENSORS`, and call on_attention(layer, attn, q, k, v) for each attention: q (B, H, T, D) and k (B, H_kv, T,
    D) as they enter the scores, v (B, H_kv, T, D)."""
    handles = []

    def outputs(module: nn.Module, name: str) -> None:
        def hook(_module, _inputs, out):
            on_tensor(name, out)

        handles.append(module.register_forward_hook(hook))

    def attention(attn: CausalSelfAttention, name: str, layer: int) -> None:
        def before(_core, inputs):
            q, k, v = inputs
            for part, x in (("q", q), ("k", k), ("v", v)):
                on_tensor(f"{name}.{part}", side_by_side(x))
            on_attention(layer, attn, q, k, v)

        def after(_core, _inputs, out):
            on_tensor(f"{name}.output", side_by_side(out))

        handles.append(attn.core.register_forward_pre_hook(before))
        handles.append(attn.core.register_forward_hook(after))

    def inputs(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _module, args: on_tensor(name, args[0])))

    try:
        outputs(model.transformer.drop, "transformer.drop")
        for layer, block in enumerate(model.transformer.h):
            name = f"transformer.h.{layer}"
            attention(block.attn, f"{name}.attn", layer)
            for part in ("ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"):
                outputs(block.get_submodule(part), f"{name}.{part}")
            inputs(block.mlp.c_proj, f"{name}.mlp.hidden")
            outputs(block, name)
        outputs(model.transformer.ln_f, "transformer.ln_f")
        outputs(model.lm_head, "lm_head")
        yield
    finally:
        for handle in handles:
            handle.remove()
