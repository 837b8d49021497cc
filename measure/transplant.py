"""What heads find at the first token, moved into a null slot: the normalizer `kvbias` in a model trained with softmax.

A head that sinks gives most of a query's attention to the first token, whatever that is, and gets hardly a value for
it. The null slot has the mean key and the mean value that tokens have when they come first, and stands in front of
them. The first token then has something to attend to, as later ones have, and need not become the sink itself.
(A prefix of real tokens to the same end: Son et al. 2024, "CushionCache"; Chen et al. 2024, "PrefixQuant".)
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from measure.moments import float64
from measure.probe import watch
from model import GPT, rotate, rotation

AT_ONCE = 256  # tokens


class FirstToken(NamedTuple):
    """A layer's keys and values of tokens that come first, averaged over the tokens; float64."""

    key: Tensor
    """(H_kv, D), as it enters the scores"""
    value: Tensor
    """(H_kv, D)"""
    key_agreement: Tensor
    """(H_kv,): the mean key's norm over the keys' mean norm; 1 where all tokens have the same key"""
    value_agreement: Tensor
    """(H_kv,): the same of the values"""


@torch.no_grad()
def first_tokens(model: GPT, tokens: Tensor) -> list[FirstToken]:
    """Of each layer, over `tokens` (N,) int64, each the first of a sequence: what follows it changes nothing,
    and each id is computed once."""
    sums: list[list] = [[0.0] * 4 for _ in model.transformer.h]
    ids, counts = tokens.unique(return_counts=True)

    def add(times: Tensor, layer: int, _attn, _q: Tensor, k: Tensor, v: Tensor) -> None:
        key, value = float64(k[:, :, 0]), float64(v[:, :, 0])  # (B, H_kv, D)
        for i, x in enumerate((key, value, key.norm(dim=-1), value.norm(dim=-1))):
            sums[layer][i] += torch.tensordot(times, x, 1)

    for idx, times in zip(ids[:, None].split(AT_ONCE), float64(counts).split(AT_ONCE), strict=True):
        with watch(model, lambda *_: None, partial(add, times)):
            model.features(idx)
    return [
        FirstToken(key / len(tokens), value / len(tokens), key.norm(dim=-1) / key_norm, value.norm(dim=-1) / value_norm)
        for key, value, key_norm, value_norm in sums
    ]


def transplanted(model: GPT, first: list[FirstToken], with_value: bool = True) -> GPT:
    """The model under `kvbias`, each layer with the null key and null value of its FirstToken, or a value of zero. It
    shares the memory of the model's weights.

    Rotated keys stand where a token in front of the text would be, at position −1: with the FirstToken of a single
    token, the model gives what the original gives after that token. ValueError where the normalizer is not softmax.
    """
    if model.config.normalizer != "softmax":
        raise ValueError(f"its normalizer is {model.config.normalizer}, and a null slot can be added to softmax alone")
    with torch.device("meta"):
        moved = GPT(dataclasses.replace(model.config, normalizer="kvbias"))
    weights, like = model.state_dict(), next(model.parameters())
    for layer, token in enumerate(first):
        key, value, at = token.key, token.value * with_value, f"transformer.h.{layer}.attn"
        if model.config.position == "rope":
            key = rotate(key[:, None], *rotation(model.config, -1, 0, like=key))[:, 0]
        weights |= {f"{at}.null_key": key.to(like), f"{at}.null_value": value.to(like)}
    moved.load_state_dict(weights, assign=True)
    if model.config.tie_embeddings:
        moved.lm_head.weight = moved.transformer.wte.weight
    return moved.eval()
