"""KL among its relatives: the f-divergences with Pinsker's inequality (section 6), and Rényi's divergences (12)."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from measure.divergence import hellinger, jensen_shannon, kl_divergence, renyi, total_variation
from measure.theory.checks import NUMERICAL, Check, at_least, at_most, equal, figures
from measure.theory.tools import LN_2, bernoulli, dirichlet

F_FAMILY: dict[str, Callable[[Tensor], Tensor]] = {
    "KL": lambda t: torch.xlogy(t, t),
    "reverse KL": lambda t: -t.log(),
    "Jensen-Shannon": lambda t: (torch.xlogy(t, t) - (t + 1) * ((t + 1) / 2).log()) / 2,
    "H², no ½": lambda t: (t.sqrt() - 1) ** 2,
    "total variation": lambda t: (t - 1).abs() / 2,
    "χ²": lambda t: (t - 1) ** 2,
}
"""The convex f, with f(1) = 0, of each divergence (Csiszár 1967; Ali & Silvey 1966)."""
DIRECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "KL": lambda log_p, log_q: kl_divergence(log_p, log_q),
    "reverse KL": lambda log_p, log_q: kl_divergence(log_q, log_p),
    "Jensen-Shannon": lambda log_p, log_q: jensen_shannon(log_p, log_q),
    "H², no ½": lambda log_p, log_q: 2 * hellinger(log_p, log_q) ** 2,
    "total variation": lambda log_p, log_q: total_variation(log_p, log_q),
    "χ²": lambda log_p, log_q: renyi(log_p, log_q, 2).expm1(),
}
"""The same divergences by their own definitions; χ² = Σ p²/q − 1 from Rényi's of order 2."""


def f_divergence(f: Callable[[Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ q f(p/q), (...); q > 0."""
    return (log_q.exp() * f((log_p - log_q).exp())).sum(-1)


def check_f_divergences() -> Iterator[Check]:
    """f-divergences: one family; Pinsker's inequality"""
    p, q = bernoulli(0.101), bernoulli(0.5)
    due = dict(zip(F_FAMILY, ("0.365873", "0.506406", "0.101076", "0.209661", "0.399000", "0.636804"), strict=True))
    pairs = dirichlet(6, 5, 2000)
    many = pairs[0::2], pairs[1::2]
    for name, f in F_FAMILY.items():
        yield figures(f"{name} from its f, θ = 0.101 against ½", f_divergence(f, p, q), due[name])
        # χ² reaches 10³ on these pairs: relative to 1 + its value
        of_f, direct = f_divergence(f, *many), DIRECT[name](*many)
        yield equal(f"… = {name} by its definition, 1,000 pairs", of_f / (1 + direct), direct / (1 + direct))
    yield equal(
        "H with the ½: 2H² = Σ(√p − √q)²", 2 * hellinger(p, q) ** 2, ((p / 2).exp() - (q / 2).exp()).square().sum()
    )
    theta = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    p, q = bernoulli(theta), bernoulli(torch.full_like(theta, 0.5))
    tv, kl = total_variation(p, q), kl_divergence(p, q)
    yield at_least("Pinsker, TV² ≤ ½KL, θ against ½: the least gap", kl / 2 - tv**2, 0)
    yield at_least("Pinsker on 1,000 pairs: the least gap", kl_divergence(*many) / 2 - total_variation(*many) ** 2, 0)
    near = (theta - 0.5).abs().argsort()[1]
    yield equal("… sharp: TV²/½KL → 1 as p → q", tv[near] ** 2 / (kl[near] / 2), 1, 1e-5)
    theta = torch.linspace(0, 1, 101, dtype=torch.float64)
    yield at_most(
        "JS ≤ ln 2, θ against 1 − θ: the largest", jensen_shannon(bernoulli(theta), bernoulli(1 - theta)), LN_2
    )


def check_renyi() -> Iterator[Check]:
    """Rényi's divergences: monotone in the order, KL at order 1, additive"""
    p, q = bernoulli(0.8), bernoulli(0.5)

    def at(order: float) -> Tensor:
        return renyi(p, q, order)

    yield figures(
        "Bern(.8)‖Bern(.5) at α = ½, 1, 2, 5", [at(a) for a in (0.5, 1, 2, 5)], "0.105361 0.192745 0.307485 0.414462"
    )
    orders = [*np.linspace(0.1, 2, 20), *np.linspace(4, 50, 24)]
    yield at_least("monotone in α from 0.1 to 50, least step", torch.stack([at(a) for a in orders]).diff(), 0)
    # the two sides' first orders cancel in their mean
    yield equal("α → 1: KL", (at(1 - 1e-4) + at(1 + 1e-4)) / 2, kl_divergence(p, q), NUMERICAL)
    closed = math.log(0.8**3 / 0.5**2 + 0.2**3 / 0.5**2) / 2
    yield equal("α = 3: ln Σ p³/q² over 2", at(3), closed)
    p_2, q_2 = dirichlet(12, 4, 2)
    p_both, q_both = ((a[:, None] + b).flatten() for a, b in ((p, p_2), (q, q_2)))
    for order in (0.5, 1, 2):
        apart = at(order) + renyi(p_2, q_2, order)
        yield equal(f"additive over independent pairs, α = {order:g}", renyi(p_both, q_both, order), apart)
