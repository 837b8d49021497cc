"""Look inside a model: statistics of its weights and of what flows through it."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.moments import Moments, excess_kurtosis
from model import GPT, CausalSelfAttention, attention_weights

# The tensors that `watch` sees, without the layer's number, and what they are.
TENSORS = {
    "transformer.drop": "the residual stream after the embedding",
    "transformer.h": "the residual stream after the block",
    "ln_1": "the layer norm before the attention",
    "attn.q": "queries, all heads side by side",
    "attn.k": "keys",
    "attn.v": "values",
    "attn.output": "what the heads read, before the projection",
    "attn.c_proj": "the attention's projection",
    "ln_2": "the layer norm before the MLP",
    "mlp.gelu": "the MLP's hidden layer, after its GELU",
    "mlp.c_proj": "the MLP's output",
    "transformer.ln_f": "the final layer norm",
    "lm_head": "the logits",
}


def weight_kurtosis(model: GPT) -> dict[str, float | None]:
    """The excess kurtosis of every weight matrix, by parameter name; None where its variance is zero."""
    return {name: excess_kurtosis(p) for name, p in model.named_parameters() if p.dim() >= 2}


@torch.no_grad()
def attention_kurtosis(model: GPT, idx: Tensor) -> float | None:
    """The excess kurtosis of the attention probabilities on idx (B, T), each layer's over all its (B, H, T, T) entries,
    the causal zeros included; averaged over layers. This is the activation kurtosis that quietGPT logs."""
    kurtoses = []
    with capture_qk(model) as captured:
        model(idx)
    for attn, q, k in captured:
        moments = Moments()
        for q_1, k_1 in zip(q.split(1), k.split(1), strict=True):  # one sequence's T × T maps at a time
            moments.update(attention_weights(q_1, k_1, null_logit=attn.null_logit(), scale=q.size(-1) ** -0.5))
        kurtoses.append(moments.excess_kurtosis)
    return None if None in kurtoses else sum(kurtoses) / len(kurtoses)


@contextlib.contextmanager
def capture_qk(model: GPT):
    """A list that fills, while the model runs, with (attention module, q, k) of each layer; q and k (B, H, T, D)."""
    captured, handles = [], []

    def hook_for(attn):
        def hook(_module, _inputs, qkv):
            q, k, _ = qkv.chunk(3, dim=2)
            captured.append((attn, heads_of(q, attn.n_head), heads_of(k, attn.n_head)))

        return hook

    for block in model.transformer.h:
        handles.append(block.attn.c_attn.register_forward_hook(hook_for(block.attn)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class AttentionPass(NamedTuple):
    """One layer's attention on a batch, there and back."""

    attn: CausalSelfAttention
    q: Tensor  # (B, H, T, D), as are the others
    k: Tensor
    v: Tensor
    grad_out: Tensor  # dL/dO, O the output of `attention`


@contextlib.contextmanager
def capture_attention(model: GPT):
    """A list that fills, while a loss runs back through the model, with each layer's AttentionPass, in their order."""
    captured, handles = [], []

    def watch(attn):
        qkv = None

        def heads(x):
            return x.detach().unflatten(-1, (attn.n_head, -1)).transpose(1, 2)

        def keep_qkv(_module, _inputs, output):
            nonlocal qkv
            qkv = [heads(x) for x in output.chunk(3, dim=-1)]

        def keep_gradient(_module, inputs):  # the backward pass comes by the last layer first
            inputs[0].register_hook(lambda grad: captured.insert(0, AttentionPass(attn, *qkv, heads(grad))))

        handles.append(attn.c_attn.register_forward_hook(keep_qkv))
        handles.append(attn.c_proj.register_forward_pre_hook(keep_gradient))

    for block in model.transformer.h:
        watch(block.attn)
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def heads_of(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) → (B, H, T, D)"""
    return x.unflatten(2, (n_head, -1)).transpose(1, 2)


@contextlib.contextmanager
def watch(
    model: GPT,
    on_tensor: Callable[[str, Tensor], None],
    on_attention: Callable[[int, CausalSelfAttention, Tensor, Tensor], None],
):
    """While the model runs, call on_tensor(name, x) for every tensor on its way, as soon as it is there: x (B, T, C) of
    each of `TENSORS`, and call on_attention(layer, attn, q, k) for each attention: q and k (B, H, T, D)."""
    handles = []

    def outputs(module: nn.Module, name: str) -> None:
        def hook(_module, _inputs, out):
            on_tensor(name, out)

        handles.append(module.register_forward_hook(hook))

    def attention(attn: CausalSelfAttention, name: str, layer: int) -> None:
        def after_qkv(_module, _inputs, qkv):
            q, k, v = qkv.chunk(3, dim=2)
            for part, x in (("q", q), ("k", k), ("v", v)):
                on_tensor(f"{name}.{part}", x)
            on_attention(layer, attn, heads_of(q, attn.n_head), heads_of(k, attn.n_head))

        def before_projection(_module, inputs):
            on_tensor(f"{name}.output", inputs[0])

        handles.append(attn.c_attn.register_forward_hook(after_qkv))
        handles.append(attn.c_proj.register_forward_pre_hook(before_projection))

    try:
        outputs(model.transformer.drop, "transformer.drop")
        for layer, block in enumerate(model.transformer.h):
            name = f"transformer.h.{layer}"
            attention(block.attn, f"{name}.attn", layer)
            for part in ("ln_1", "attn.c_proj", "ln_2", "mlp.gelu", "mlp.c_proj"):
                outputs(block.get_submodule(part), f"{name}.{part}")
            outputs(block, name)
        outputs(model.transformer.ln_f, "transformer.ln_f")
        outputs(model.lm_head, "lm_head")
        yield
    finally:
        for handle in handles:
            handle.remove()
