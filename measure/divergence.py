"""How far two distributions lie apart, and how far a step moves one.

Everything takes log-probabilities (..., n), as `log_softmax` gives them, and reduces their last dimension: batched, in
the dtype it is given, differentiable. log 0 = −inf is welcome. Values are in nats, divergences from p to q.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

AGGREGATES = ("mean", "rmse", "p95", "max")


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p‖q) = Σ p log(p/q)`, (..., n) and (..., n) → (...). 0 log 0 is 0; where p > 0 = q it is inf.

    Summed as `Σ p log(p/q) − p + q` (Csiszár's extension to any measures, the same on distributions): its terms
    `p (e^x − 1 − x)`, x = log(q/p), are all ≥ 0 and of second order in x, so that neighbours keep their digits, and
    with p = q the gradient is exactly 0. `F.kl_div` gives NaN for p = 0 and cancels where p is close to q.

    ValueError for mismatched shapes and, where no gradient flows, for rows that do not sum to 1. (In training the sums
    are not checked, since to look at them would make the device wait.)
    """
    p, q = _checked(log_p, log_q)
    x = (log_q - log_p).masked_fill(p == 0, 0)
    near = (x < 1) & (p > 0)  # q − p is p (e^x − 1), but for q ≫ p, where e^x may overflow
    excess = torch.where(near, p * torch.expm1(x.clamp(max=1)), q - p)
    return (excess - p * x).sum(-1).clamp(min=0)  # a term may be below 0: expm1 may round to a unit below x


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`½ KL(p‖m) + ½ KL(q‖m)` with `m = ½(p + q)`, (...): symmetric, and at most ln 2 (J. Lin 1991)."""
    _check_shapes(log_p, log_q)
    neither = (log_p == -math.inf) & (log_q == -math.inf)  # where logaddexp has no gradient
    log_m = torch.logaddexp(log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)) - math.log(2)
    log_m = log_m.masked_fill(neither, -math.inf)
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`½ Σ |p − q|`, (...), in [0, 1]: the most that the probability of any event differs by."""
    p, q = _checked(log_p, log_q)
    return (p - q).abs().sum(-1) / 2


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`H = √(½ Σ (√p − √q)²)`, (...): the distance, with the ½ that keeps it in [0, 1]. Its gradient at p = q is 0."""
    _checked(log_p, log_q)
    return torch.linalg.vector_norm(torch.exp(log_p / 2) - torch.exp(log_q / 2), dim=-1) / math.sqrt(2)


def renyi(log_p: Tensor, log_q: Tensor, order: float) -> Tensor:
    """Rényi's `log(Σ p^α q^(1−α)) / (α − 1)` of order α ≥ 0, (...): nondecreasing in α.

    0 is `−log q(p > 0)`, 1 is KL(p‖q), inf is `max log(p/q)`. Orders from 1 up are inf where p > 0 = q; below 1 only
    where p and q share nothing. ValueError for a negative order.
    """
    if not order >= 0:
        raise ValueError(f"order {order}: at least 0")
    if order == 1:
        return kl_divergence(log_p, log_q)
    p, _ = _checked(log_p, log_q)
    absent = log_p == -math.inf
    x = (log_q - log_p).masked_fill(absent, 0)
    if order == math.inf:
        return (-x).masked_fill(absent, -math.inf).amax(-1)
    t = 1 - order
    log_sum = torch.logsumexp((log_p + t * x).masked_fill(absent, -math.inf), -1)
    # The sum is 1 + u; close to 1 its logarithm has lost digits that u, with KL for −Σ p x, still has.
    u = (p * _phi2(t * x)).sum(-1) - t * kl_divergence(log_p, log_q)
    return torch.where(u.abs() < 0.5, torch.log1p(u), log_sum) / -t


def aggregate(kl: Tensor, how: str, dim: int = -1) -> Tensor:
    """One number for the divergences along `dim`: their "mean", "rmse" `√(mean kl²)`, "p95" (linear interpolation, as
    NumPy's) or "max".

    Differentiable. Where all are 0 they are at their minimum, and the gradient is 0. ValueError for anything else in
    `how`, and for no divergences at all.
    """
    if how not in AGGREGATES:
        raise ValueError(f"unknown aggregate {how!r}: choose from {', '.join(AGGREGATES)}")
    if kl.dim() == 0 or kl.size(dim) == 0:
        raise ValueError(f"nothing to aggregate along dimension {dim} of {tuple(kl.shape)}")
    kl = torch.where((kl == 0).all(dim, keepdim=True), kl.detach(), kl)
    if how == "mean":
        return kl.mean(dim)
    if how == "rmse":
        return torch.linalg.vector_norm(kl, dim=dim) / math.sqrt(kl.size(dim))
    if how == "max":
        return kl.amax(dim)
    # Not torch.quantile: it makes NaN of inf, and takes neither half precision nor more than 2²⁴ elements.
    ordered, place = kl.sort(dim).values, 0.95 * (kl.size(dim) - 1)
    below, above = ordered.select(dim, math.floor(place)), ordered.select(dim, math.ceil(place))
    weight = place % 1
    return below * (1 - weight) + above * weight if weight else below


class Ray(NamedTuple):
    """What `kl_along_ray` finds for each row, float64. `forward` is KL(α⁰‖α(τ)), `reverse` KL(α(τ)‖α⁰)."""

    forward: Tensor
    reverse: Tensor
    quadratic: Tensor
    """½ τ² Var, the second-order model of both"""
    variance: Tensor
    """of the slopes under α⁰"""
    spread: Tensor
    """Δ = max a − min a"""
    radius: Tensor
    """π/Δ, within which the Taylor series in τ converges; inf where Δ = 0"""
    remainder_forward: Tensor
    """forward − quadratic, computed without the cancellation of that difference"""
    remainder_reverse: Tensor
    bound_forward: Tensor
    """τ³Δ³/(36√3): no remainder is larger in magnitude"""
    bound_reverse: Tensor
    """τ³Δ³/(18√3)"""
    tightness_forward: Tensor
    """|remainder| / bound; NaN where the bound is 0"""
    tightness_reverse: Tensor


def kl_along_ray(alpha0: Tensor, slopes: Tensor, tau: float | Tensor) -> Ray:
    """How far `α(τ) ∝ α⁰ e^{τa}` lies from the probabilities α⁰ (..., n), a the slopes (..., n), τ a number or (...).

    With `K(τ) = log E_{α⁰}[e^{τa}]`: `KL(α⁰‖α(τ)) = K(τ) − τK′(0) = ∫₀^τ (τ−s) K″(s) ds` and
    `KL(α(τ)‖α⁰) = τK′(τ) − K(τ) = ∫₀^τ s K″(s) ds`. Both are ½τ²Var to second order, and `|K‴| ≤ Δ³/(6√3)`, the largest
    third central moment on an interval of length Δ, bounds what that leaves. A row with Δ = 0 does not move.

    Always in float64. All n slopes count in Δ, also where α⁰ is 0: give entries that are no part of a row the slope of
    one that is. ValueError for mismatched shapes, α⁰ that is negative or does not sum to 1 within its dtype's rounding,
    slopes that are not finite, τ < 0 (negate the slopes instead).
    """
    alpha0, slopes, tau = _checked_ray(alpha0, slopes, tau)
    c = slopes - slopes.amin(-1, keepdim=True)  # K(τ) − τK′(0) and τK′ − K do not depend on a shift of a
    spread = c.amax(-1)
    c = c - (alpha0 * c).sum(-1, keepdim=True)  # centred: E[c] = 0
    variance = (alpha0 * c * c).sum(-1)
    x = tau.unsqueeze(-1) * c

    # e^K = E[e^x] = 1 + u and τK′ = E[x e^x] / E[e^x] = w / (1 + u), from terms that are all ≥ 0 since E[x] = 0.
    u = (alpha0 * _phi2(x)).sum(-1)
    w = (alpha0 * x * torch.expm1(x)).sum(-1)
    forward = torch.log1p(u)
    reverse = w / (1 + u) - forward
    if (overflow := ~w.isfinite()).any():
        x_o = x[overflow]
        scores = alpha0.expand_as(x)[overflow].log() + x_o
        forward[overflow] = scores.logsumexp(-1)
        reverse[overflow] = (scores.softmax(-1) * x_o).sum(-1) - forward[overflow]

    quadratic = tau**2 * variance / 2
    step = tau * spread
    # A difference of the two is off by ε·quadratic, and quadratic ≤ step²/8 is at most 8/step of the bound: good above
    # step = 1. Below, the quadratic term is taken out of every part beforehand, which leaves terms of third order.
    third = (alpha0 * _phi3(x)).sum(-1)
    series_forward = third + _log1p_minus(u)
    series_reverse = (alpha0 * x * _phi2(x)).sum(-1) - third - w * u / (1 + u) - _log1p_minus(u)
    remainder_forward = torch.where(step < 1, series_forward, forward - quadratic)
    remainder_reverse = torch.where(step < 1, series_reverse, reverse - quadratic)

    bound_forward = step**3 / (36 * math.sqrt(3))
    bound_reverse = 2 * bound_forward
    rays = (
        *(forward, reverse, quadratic, variance, spread, math.pi / spread, remainder_forward, remainder_reverse),
        *(bound_forward, bound_reverse, remainder_forward.abs() / bound_forward),
        remainder_reverse.abs() / bound_reverse,
    )
    return Ray(*torch.broadcast_tensors(*rays))


def _phi2(x: Tensor) -> Tensor:
    """`e^x − 1 − x` to a few units of its last digit: a difference of neighbours is off by ε max(1, x) only, which from
    |x| = 1 on is small against the result."""
    return torch.where(x.abs() < 1, x * x / 2 + _phi3(x), torch.expm1(x) - x)


def _phi3(x: Tensor) -> Tensor:
    """`e^x − 1 − x − x²/2` as `_phi2`; for |x| < 1 the series' next term, x¹⁹/19!, is below ε of the first."""
    inner = x.clamp(-1, 1)
    series: Tensor | float = 1.0
    for k in range(18, 3, -1):
        series = 1 + inner / k * series
    return torch.where(x.abs() < 1, inner**3 / 6 * series, torch.expm1(x) - x - x * x / 2)


def _log1p_minus(u: Tensor) -> Tensor:
    """`log(1 + u) − u` for 0 ≤ u < 0.15, from `log(1 + u) = 2 artanh s`, s = u/(2 + u), and `2s − u = −us`; the series'
    next term, s²⁰/21, is far below float64's ε of the first."""
    s = u / (2 + u)
    tail = sum(s ** (2 * k) / (2 * k + 3) for k in range(9))
    return -u * s + 2 * s**3 * tail


def _check_shapes(log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape != log_q.shape or log_p.dim() == 0:
        raise ValueError(f"log_p {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}: need one shape (..., n) for both")
    if not (log_p.is_floating_point() and log_q.is_floating_point()):
        raise ValueError(f"log-probabilities must be floating, not {log_p.dtype} and {log_q.dtype}")


def _checked(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p and q, from their logarithms. ValueError as in `kl_divergence`."""
    _check_shapes(log_p, log_q)
    p, q = log_p.exp(), log_q.exp()
    if not (p.requires_grad or q.requires_grad):
        for name, probabilities in (("log_p", p), ("log_q", q)):
            _check_sums(probabilities, f"the probabilities exp({name})")
    return p, q


def _checked_ray(alpha0: Tensor, slopes: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if alpha0.shape != slopes.shape or alpha0.dim() == 0:
        shapes = f"alpha0 {tuple(alpha0.shape)} and slopes {tuple(slopes.shape)}"
        raise ValueError(f"{shapes}: need one shape (..., n) for both")
    if (alpha0 < 0).any():
        raise ValueError(f"alpha0 holds {alpha0.min().item():g}: probabilities are at least 0")
    _check_sums(alpha0, "the probabilities alpha0")
    if not slopes.isfinite().all():
        raise ValueError(f"{int((~slopes.isfinite()).sum())} of the slopes are not finite")
    tau = torch.as_tensor(tau, dtype=torch.float64, device=alpha0.device)
    if not ((tau >= 0) & tau.isfinite()).all():
        raise ValueError(f"tau {tau.min().item():g}: finite and at least 0; the other way is along the slopes negated")
    alpha0 = alpha0.double()
    return alpha0 / alpha0.sum(-1, keepdim=True), slopes.double(), tau


def _check_sums(probabilities: Tensor, what: str) -> None:
    """ValueError unless the n probabilities of each row sum to 1 within 4 ε (1 + log n + √n).

    That is what rounding may do to them, with float32's ε even for float64, since they may have been computed in
    float32 before. Rounding each log p changes the sum by at most ε Σ p |log p| ≤ ε log n. The normaliser was itself a
    sum of n terms, whose rounding errors add up like a random walk, to about ε√n (for a log_softmax of 50,000 values to
    1e-5). The factor 4 allows four standard deviations of that walk."""
    n = probabilities.size(-1)
    sums = probabilities.sum(-1, dtype=torch.promote_types(probabilities.dtype, torch.float32))
    eps = max(torch.finfo(probabilities.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 4 * eps * (1 + math.log(max(n, 1)) + math.sqrt(n))
    off = (sums - 1).abs()
    if not (off <= tolerance).all():
        worst = sums.reshape(-1)[off.nan_to_num(nan=math.inf).argmax()].item()
        raise ValueError(f"{what} must sum to 1 over the last dimension, not to {worst:.9g}")
