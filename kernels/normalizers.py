"""From a row of scores to attention weights: the definitions, and how the weights change with the scores.

`scores` are (B, H, T_q, T_k), −∞ where a query does not see a key, and so are the results; each row is computed by
itself. Of each normalizer there are its weights P and, for two of the backward passes, what they multiply dL/dP with:

    diagonal   ∂P_ij/∂S_ij
    detached   the same, with the sum in the row's denominator (for entmax: its threshold) held constant

model.py lists them in `NORMALIZERS`. The fused kernels compute the same functions tile by tile, those of `TILES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILES = ("softmax", "clipped", "softpick", "sigmoid", "relu")
"""What the kernels of cpu.cpp and triton_tiles.py compute; "softmax" is every softmax, with or without a null slot."""


@dataclass(frozen=True)
class Normalizer:
    """One way from scores to attention weights: an entry of model.py's `NORMALIZERS`."""

    weights: Callable[..., Tensor]
    """The definition: scores (B, H, T_q, T_k), float32 at least and −∞ where a key is not visible, and the parameters
    and constants by name → the weights, of that shape, each row from its own scores alone. Keys that are not visible
    get 0 anyway."""
    parameters: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """What an attention module learns for it: name → its start value, of a `GPTConfig`."""
    constants: dict[str, Callable[[Any], float]] = field(default_factory=dict)
    """The numbers in it that a `GPTConfig` gives: name → which."""
    diagonal: Callable[..., Tensor] | None = None
    """(scores, weights, parameters) → ∂weights_ij/∂scores_ij. Without it the backward "diagonal" is refused."""
    detached: Callable[..., Tensor] | None = None
    """The same with the row's sum held constant, for the backward "detached", which is refused without it."""
    null_logit: float | str | None = None
    """Where the softmax covers a null slot besides the keys: the slot's logit, or the parameter or constant that holds
    it. A slot with a key has the parameter null_key (H_kv, D) instead, and may have a null_value."""
    queries: Callable[..., Tensor] | None = None
    """(q, T_k, parameters) → q: what happens to the queries before the scores, of which the weights are the softmax."""
    bounded: bool = False
    """Whether a weight lies in [0, 1] whatever the scores are, as a softmax's does."""
    tile: str | None = None
    """Which of `TILES` computes it in the fused kernels; without one it runs materialized, in O(T²) memory."""

    def __post_init__(self):
        if self.is_softmax:
            object.__setattr__(self, "tile", "softmax")
            object.__setattr__(self, "bounded", True)
        elif self.null_logit is not None or self.queries is not None:
            raise ValueError("a null_logit or queries go with softmax_weights: other weights have no place for them")
        known: tuple[set, ...] = ({self.null_logit}, {"null_key"}, {"null_key", "null_value"}, set())
        if self.is_softmax and not self.queries and {*self.parameters, *self.constants} not in known:
            raise ValueError("softmax_weights takes no parameters but its null_logit, or null_key and null_value")

    @property
    def is_softmax(self) -> bool:
        """Whether the weights are a softmax over the keys and perhaps a null slot. Only then is a row, with its null
        slot, a probability distribution."""
        return self.weights is softmax_weights


def visible_keys(scores: Tensor) -> Tensor:
    """How many keys each query sees: (B, H, T_q, 1)."""
    return (~scores.isneginf()).sum(-1, keepdim=True).to(scores.dtype)


# --- softmax, over the keys and perhaps a null slot -------------------------------------------------------------------


def softmax1(x: Tensor, dim: int = -1) -> Tensor:
    """`exp(x_i) / (1 + Σ_j exp(x_j))` along `dim`: a softmax over x and one more logit, 0, whose share is dropped.

    Any shape; integers become the default float type. E. Miller, "Attention Is Off By One" (2023).
    """
    if not x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    if x.numel() == 0:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Subtracting the largest logit keeps exp from overflowing. The null logit, 0, counts among them, hence the clamp.
    shift = wide.detach().amax(dim, keepdim=True).clamp(min=0)
    exp_x = torch.exp(wide - shift)
    return (exp_x / (torch.exp(-shift) + exp_x.sum(dim, keepdim=True))).to(x.dtype)


def softmax_rows(scores: Tensor, null_logit: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A softmax over the keys and, with a `null_logit` (H,), over one slot more, whose value is zero.

    scores (B, H, T_q, T_k) → the keys' weights, of that shape, and the null slot's share (B, H, T_q, 1), or None.
    """
    logsumexp = torch.logsumexp(scores, dim=-1, keepdim=True)
    if null_logit is None:
        return (scores - logsumexp).exp(), None
    null_logit = null_logit.to(scores.dtype).view(-1, 1, 1)
    logsumexp = torch.logaddexp(logsumexp, null_logit)
    return (scores - logsumexp).exp(), (null_logit - logsumexp).exp()


def softmax_weights(scores: Tensor, null_logit: Tensor | None = None) -> Tensor:
    return softmax_rows(scores, null_logit)[0]


def softmax_diagonal(scores: Tensor, weights: Tensor, null_logit: Tensor | None = None) -> Tensor:
    return weights * (1 - weights)


def softmax_detached(scores: Tensor, weights: Tensor, null_logit: Tensor | None = None) -> Tensor:
    return weights


SOFTMAX: dict[str, Any] = {
    "weights": softmax_weights,
    "diagonal": softmax_diagonal,
    "detached": softmax_detached,
}


def scaled_queries(q: Tensor, keys: int, ssmax_scale: Tensor) -> Tensor:
    """`q_i ← s·log(n)·q_i`, where n is the number of keys that query i sees, and s = `ssmax_scale` (H,) is learned:
    scalable softmax, whose weights do not fade as the context grows (Nakanishi 2025). q (B, H, T_q, D); `keys`: T_k."""
    n = torch.arange(keys - q.size(-2) + 1, keys + 1, device=q.device)
    factor = ssmax_scale.to(torch.promote_types(q.dtype, torch.float32)).view(-1, 1, 1) * n.log().view(-1, 1)
    return (q * factor).to(q.dtype)


# --- clipped softmax --------------------------------------------------------------------------------------------------


def clipped_weights(scores: Tensor, alpha: float, context: int) -> Tensor:
    """`clip((1 − γ) softmax(x) + γ, 0, 1)`, γ = −alpha / context; a context of 0 stands for the number of keys that the
    row sees. A weight below about alpha / context is exactly 0, without scores that grow without bound.

    Bondarenko, Nagel & Blankevoort, "Quantizable Transformers" (2023), whose ζ is 1 here. With a fixed context the
    threshold is the same for all rows, and causal rows are not: of equal scores, a row keeps all as long as it sees at
    most context / alpha keys, and from then on none.
    """
    gamma = _gamma(scores, alpha, context)
    return ((1 - gamma) * softmax_weights(scores) + gamma).clip(0, 1)


def clipped_diagonal(scores: Tensor, weights: Tensor, alpha: float, context: int) -> Tensor:
    P = softmax_weights(scores)
    return torch.where(weights > 0, (1 - _gamma(scores, alpha, context)) * P * (1 - P), 0)


def clipped_detached(scores: Tensor, weights: Tensor, alpha: float, context: int) -> Tensor:
    return torch.where(weights > 0, (1 - _gamma(scores, alpha, context)) * softmax_weights(scores), 0)


def _gamma(scores: Tensor, alpha: float, context: int) -> Tensor | float:
    return -alpha / (context or visible_keys(scores))


CLIPPED: dict[str, Any] = {
    "weights": clipped_weights,
    "diagonal": clipped_diagonal,
    "detached": clipped_detached,
    "bounded": True,
    "tile": "clipped",
}


# --- softpick ---------------------------------------------------------------------------------------------------------

SOFTPICK_EPSILON = 1e-6


def softpick_weights(scores: Tensor) -> Tensor:
    """`ReLU(eˣ − 1) / (Σ |eˣ − 1| + ε)`, ε = 1e-6: scores up to 0 get nothing, but keep others from getting all.

    Zuhri, Fuadi & Aji, "Softpick" (2025), whose ε is added after the shift by the largest score, and so means another
    number for each row.
    """
    _, terms, total = _softpick_terms(scores)
    return F.relu(terms) / total


def softpick_diagonal(scores: Tensor, weights: Tensor) -> Tensor:
    exp_x, _, total = _softpick_terms(scores)
    return torch.where(scores > 0, exp_x / total * (1 - weights), 0)


def softpick_detached(scores: Tensor, weights: Tensor) -> Tensor:
    exp_x, _, total = _softpick_terms(scores)
    return torch.where(scores > 0, exp_x / total, 0)


def _softpick_terms(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """eˣ, eˣ − 1 and Σ |eˣ − 1| + ε, all times e⁻ᵐ, where m is the row's largest score, or 0 if all are below."""
    x = scores.masked_fill(scores.isneginf(), 0)  # e⁰ − 1 = 0: a key that is not visible adds nothing
    m = F.pad(x.detach(), (0, 1)).amax(-1, keepdim=True)
    exp_x, small = (x - m).exp(), x < 1
    # Where the difference would cancel, by expm1.
    terms = torch.where(small, torch.expm1(x.masked_fill(~small, 0)) * (-m).exp(), exp_x - (-m).exp())
    return exp_x, terms, terms.abs().sum(-1, keepdim=True) + SOFTPICK_EPSILON * (-m).exp()


SOFTPICK: dict[str, Any] = {
    "weights": softpick_weights,
    "diagonal": softpick_diagonal,
    "detached": softpick_detached,
    "bounded": True,
    "tile": "softpick",
}


# --- sigmoid and ReLU: no key competes with another -------------------------------------------------------------------


def sigmoid_weights(scores: Tensor, bias: float) -> Tensor:
    """`σ(x + bias)`. With bias −log T the row mass of equal scores, 0, is about 1 at T keys (Ramapuram et al. 2024)."""
    return torch.sigmoid(scores + bias)


def sigmoid_slope(scores: Tensor, weights: Tensor, bias: float) -> Tensor:
    return weights * torch.sigmoid(-(scores + bias))  # σ(−x) = 1 − σ(x) without cancellation


SIGMOID: dict[str, Any] = {
    "weights": sigmoid_weights,
    "diagonal": sigmoid_slope,
    "detached": sigmoid_slope,
    "bounded": True,
    "tile": "sigmoid",
}


def relu_weights(scores: Tensor) -> Tensor:
    """`ReLU(x) / n`, where n is the number of keys that the row sees (Wortsman et al. 2023)."""
    return F.relu(scores) / visible_keys(scores)


def relu_slope(scores: Tensor, weights: Tensor) -> Tensor:
    return (scores > 0) / visible_keys(scores)


RELU: dict[str, Any] = {
    "weights": relu_weights,
    "diagonal": relu_slope,
    "detached": relu_slope,
    "tile": "relu",
}


# --- entmax -----------------------------------------------------------------------------------------------------------


def running_sums(x: Tensor, dim: int, by_product: bool | None = None) -> Tensor:
    """`x.cumsum(dim)`; by a product with a triangle of ones where only deterministic algorithms may run on a GPU, whose
    cumsum is none."""
    if by_product is None:
        by_product = x.is_cuda and torch.are_deterministic_algorithms_enabled()
    if not by_product:
        return x.cumsum(dim)
    last = x.movedim(dim, -1)
    n = last.size(-1)
    with torch.autocast(x.device.type, enabled=False):
        return (last @ torch.ones(n, n, dtype=x.dtype, device=x.device).triu()).movedim(-1, dim)


def entmax15_weights(scores: Tensor) -> Tensor:
    """`[x/2 − τ]₊²` with the τ for which the row sums to 1: entmax with α = 1.5, between softmax (1) and sparsemax (2).

    Exact, by sorting: Peters, Niculae & Martins, "Sparse Sequence-to-Sequence Models" (2019).
    """
    return _entmax15_roots(scores).square()


def entmax15_diagonal(scores: Tensor, weights: Tensor) -> Tensor:
    roots = weights.sqrt()
    return roots * (1 - roots / roots.sum(-1, keepdim=True))


def entmax15_detached(scores: Tensor, weights: Tensor) -> Tensor:
    return weights.sqrt()


def _entmax15_roots(scores: Tensor) -> Tensor:
    """`[x/2 − τ]₊`: with z = x/2 and its mean and squared deviations over the k keys that get a weight, the root of the
    quadratic `Σ (z − τ)² = 1` that lies below them all, `τ = mean − √((1 − Σ (z − mean)²) / k)`."""
    if not scores.size(-1):
        return scores
    # A key that gets a weight has z above the largest z less 1: what lies below −2 may as well lie there.
    z = ((scores - scores.detach().amax(-1, keepdim=True)) / 2).clamp(min=-2)
    with torch.no_grad():  # the k largest get a weight, for the largest k whose τ lies below all of them
        ordered = z.sort(-1, descending=True).values
        k = torch.arange(1, z.size(-1) + 1, dtype=z.dtype, device=z.device)
        mean = running_sums(ordered, -1) / k
        deviations = running_sums(ordered.square(), -1) - k * mean.square()
        tau = mean - ((1 - deviations) / k).clamp(min=0).sqrt()
        kept = z >= ordered.gather(-1, (tau <= ordered).sum(-1, keepdim=True) - 1)
    k = kept.sum(-1, keepdim=True)
    mean = torch.where(kept, z, 0).sum(-1, keepdim=True) / k
    deviations = torch.where(kept, z - mean, 0).square().sum(-1, keepdim=True)
    return torch.where(kept, z - mean + ((1 - deviations) / k).clamp(min=0).sqrt(), 0).clamp(min=0)


ENTMAX15: dict[str, Any] = {
    "weights": entmax15_weights,
    "diagonal": entmax15_diagonal,
    "detached": entmax15_detached,
    "bounded": True,
}
