"""Look inside a model: statistics of its weights and of what flows through it."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from harness.moments import Moments, excess_kurtosis
from model import GPT, CausalSelfAttention, attention_weights


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
            B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
            q, k, _ = (z.view(B, T, attn.n_head, C // attn.n_head).transpose(1, 2) for z in qkv.split(C, dim=2))
            captured.append((attn, q, k))

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
