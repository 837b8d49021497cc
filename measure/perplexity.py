"""How well a model predicts a text: the loss of every token, each scored exactly once, and means of it."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.loss import IGNORED
from model import GPT

_ROWS = 2048  # tokens whose logits are held at a time: 400 MB with GPT-2's vocabulary


class Scores(NamedTuple):
    """The scored targets of a text, all arrays (n,)."""

    losses: np.ndarray
    """−ln p of the target, float64, in nats"""
    targets: np.ndarray
    """its index in the text, int64; the text's first token, 0, is no target"""
    positions: np.ndarray
    """how many tokens the prediction could see, int64, from 1 to block_size"""


def sliding_offsets(tokens: int | np.ndarray, block_size: int, stride: int, starts: int | np.ndarray = 0) -> np.ndarray:
    """Where the windows of block_size start so that `score` takes each of the tokens − 1 targets once.

    Every `stride` tokens, until a window reaches the end of the text. 1 ≤ stride ≤ block_size; windows of stride
    block_size do not overlap. Of several texts, `tokens` and `starts` are (n,): the length of each, and its place.
    """
    tokens, starts = np.atleast_1d(tokens), np.atleast_1d(starts)
    beyond_the_first = np.maximum(tokens - 1 - block_size, 0)
    counts = np.where(tokens > 1, 1 - (-beyond_the_first // stride), 0)
    before = np.repeat(np.cumsum(counts) - counts, counts)  # windows of the texts before
    return np.repeat(starts, counts) + stride * (np.arange(len(before)) - before)


@torch.no_grad()
def score(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    offsets: np.ndarray,
    stride: int,
    text_starts: int | np.ndarray = 0,
) -> Scores:
    """The loss of each target that no earlier window of `sliding_offsets` has scored: the last `stride` of a window, so
    that each saw at least block_size − stride tokens before it; all of a window at one of the `text_starts`.

    This is the evaluation with a stride of Hugging Face's guide "Perplexity of fixed-length models". `batches`: inputs
    and targets (B, T) int64 of the windows at `offsets`, in their order; a target past the end of the text is IGNORED.
    """
    parts, done = [], 0
    for x, y in batches:
        starts = offsets[done : done + len(x), None]  # (B, 1)
        done += len(x)
        i = np.arange(x.size(1))  # predicts target starts + i + 1 from i + 1 tokens
        fresh = (i >= x.size(1) - stride) | np.isin(starts, text_starts)  # (B, T)
        y = y.masked_fill(torch.from_numpy(~fresh).to(y.device), IGNORED)
        scored = (y != IGNORED).cpu().numpy()
        losses = token_losses(model, x, y).cpu().double().numpy()
        parts.append((losses, (starts + i + 1)[scored], np.broadcast_to(i + 1, scored.shape)[scored]))
    return Scores(*map(np.concatenate, zip(*parts, strict=True)))


def token_losses(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """The loss, in nats, of each target of y (B, T) but those IGNORED: (n,), row by row; no other logits are made."""
    scored = y != IGNORED
    losses = []
    for features, targets in zip(model.features(x)[scored].split(_ROWS), y[scored].split(_ROWS), strict=True):
        logits = model.lm_head(features)
        at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
        losses.append(F.cross_entropy(logits.to(at_least_float32), targets, reduction="none"))
    return torch.cat(losses)


def standard_error(losses: np.ndarray, clusters: np.ndarray) -> float | None:
    """The standard error of the mean of `losses` (n,). `clusters` (n,) says which cluster each is in: losses of one
    cluster may depend on each other, those of different clusters do not.

    It is that of the ratio Σ_c L_c / Σ_c n_c over C clusters, linearized: `√(C/(C−1) Σ_c (L_c − n_c·mean)²) / n`
    (Cochran 1977, Sampling Techniques, §2.11). With one token a cluster this is the usual s/√n. None for a single
    cluster.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(cluster, weights=losses - losses.mean())
    C = len(residuals)
    return math.sqrt(C / (C - 1) * float(residuals @ residuals)) / len(losses) if C > 1 else None


def stretches(scores: Scores, block_size: int) -> np.ndarray:
    """Which stretch of the text each target is in (n,): √W stretches of equally many targets, for W windows' worth.

    Tokens depend on each other far beyond a window (a document is easy or hard as a whole), so that windows are no
    clusters for `standard_error`. Long stretches nearly are; √W of them is the usual choice of "batch means".
    """
    n = len(scores.targets)
    count = max(1, math.isqrt(n // block_size))
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(scores.targets, kind="stable")] = np.arange(n)
    return rank * count // n


def loss_by_position(scores: Scores, block_size: int) -> list[dict]:
    """Mean loss, its standard error and the number of tokens in bins of positions, two to the octave: rows with
    `position` and `up_to` (the bin's first and last), loss, standard_error, tokens."""
    clusters = stretches(scores, block_size)
    last = np.rint(2 ** (np.arange(0, 2 * math.log2(block_size)) / 2)).astype(int)
    last = np.unique(np.append(last, block_size)).tolist()
    rows = []
    for first, up_to in zip([1, *(edge + 1 for edge in last)], last, strict=False):
        inside = (scores.positions >= first) & (scores.positions <= up_to)
        if inside.any():
            losses = scores.losses[inside]
            rows.append(
                {
                    "position": first,
                    "up_to": up_to,
                    "loss": float(losses.mean()),
                    "standard_error": standard_error(losses, clusters[inside]),
                    "tokens": len(losses),
                }
            )
    return rows


def perplexity(loss: float) -> float:
    """e^loss, infinite where float64 cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def nonfinite_weights(model: GPT) -> list[str]:
    """A line for each parameter that holds NaN or Inf."""
    counts = {name: int((~parameter.isfinite()).sum()) for name, parameter in model.named_parameters()}
    return [
        f"{name} holds {count} of {model.get_parameter(name).numel()} weights that are NaN or Inf"
        for name, count in counts.items()
        if count
    ]


@torch.no_grad()
def nonfinite(model: GPT, idx: Tensor) -> list[str]:
    """Where NaN and Inf come from on idx (B, T): the parameters that hold some, by name; where none does, the first
    module whose output does. Empty if the logits are finite."""
    if findings := nonfinite_weights(model):
        return findings

    def look(name: str):
        def hook(_module: nn.Module, _inputs, output):
            if not findings and isinstance(output, Tensor) and not output.isfinite().all():
                findings.append(f"the first output that is NaN or Inf is that of {name}")

        return hook

    # A module runs before the one that holds it, and so is looked at before it.
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return findings
