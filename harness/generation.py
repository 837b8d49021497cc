"""Text from a model, token by token."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT, GPTConfig


class KVCache:
    """The keys and values of the tokens seen so far, for every layer: (B, H_kv, T, D) each.

    The room for them is doubled each time it is full, up to block_size: it follows what is generated, not the longest
    context there may be, and a token is copied about once on average.
    """

    def __init__(self, config: GPTConfig):
        self.block_size = config.block_size
        self.k, self.v = ([torch.empty(1, 1, 0, 1)] * config.n_layer for _ in range(2))  # no tokens
        self.length = 0  # tokens held so far; the model counts new ones once every layer has appended them

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens (B, H_kv, T, D); return those of all tokens so far."""
        end = self.length + k.size(-2)
        for held, new in ((self.k, k), (self.v, v)):
            if held[layer].size(-2) < end:  # the first tokens take just their room, for there may be no others
                room = new.new_empty(*new.shape[:2], min(max(end, 2 * self.length), self.block_size), new.size(-1))
                room[:, :, : self.length] = held[layer][:, :, : self.length]
                held[layer] = room
            held[layer][:, :, self.length : end] = new
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, *, stop_token: int | None = None, use_cache: bool = True, **sampling
) -> Iterator[Tensor]:
    """Continue idx (B, T), yielding the next tokens (B, 1) one step at a time, at most `max_new_tokens` of them.

    `sampling` goes to `sample`: temperature, top_k, top_p, generator. A row that drew `stop_token` repeats it; when
    all have, generation ends. Beyond block_size the context is the last block_size tokens: the position of each
    changes with every step then, so that the cache is of no use and a token costs a whole forward pass.
    """
    block_size = model.config.block_size
    cache = KVCache(model.config) if use_cache else None
    stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if cache is not None and idx.size(1) <= block_size:
            x = model.features(idx[:, cache.length :], cache)
        else:
            x = model.features(idx[:, -block_size:])
        token = sample(model.lm_head(x[:, -1]).float(), **sampling)
        if stop_token is not None:
            token = torch.where(stopped, stop_token, token)
            stopped |= token == stop_token
        yield token
        if stop_token is not None and stopped.all():
            return
        idx = torch.cat((idx, token), dim=1)


def sample(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw one token a row from logits (B, V) → (B, 1). Temperature 0 takes the likeliest token; `top_k` (an int) keeps
    the k likeliest, `top_p` (a float) the fewest that together hold that probability."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # at most 0: nothing overflows to +∞
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        p, order = F.softmax(logits, dim=-1).sort(descending=True)
        outside = p.cumsum(-1) - p >= max(top_p, 1e-30)  # the likelier tokens already hold top_p; never the likeliest
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
