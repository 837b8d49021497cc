"""The geometry of KL: I-projection and Bregman divergences (section 13), and exponential families (14)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, distributions
from torch.distributions import Bernoulli, Poisson

from measure.divergence import kl_divergence
from measure.theory.checks import Check, as_tensor, equal, figures
from measure.theory.closed_forms import GAUSSIAN_PAIRS, gaussian_kl
from measure.theory.tools import dirichlet, slope


def tilt(log_p: Tensor, statistic: Tensor, strength) -> Tensor:
    """ln q with q ∝ p e^{λs}, (n,), for the statistic s (n,) and the strength λ."""
    return (log_p + strength * statistic).log_softmax(-1)


def i_projection(log_p: Tensor, statistic: Tensor, mean: float) -> tuple[float, Tensor]:
    """λ and ln q*: of all q with E_q[s] = mean, the one of least KL(q‖p), which is a tilt of p (Csiszár 1975)."""

    def excess(strength: float) -> float:
        return (tilt(log_p, statistic, strength).exp() @ statistic - mean).item()

    strength = optimize.brentq(excess, -50, 50, xtol=1e-14)
    return strength, tilt(log_p, statistic, strength)


def bregman(generator: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """F(x) − F(y) − ∇F(y)·(x − y), (…), of a convex F: (…, n) → (…); the gradient by autograd."""
    return generator(x) - generator(y) - (slope(generator, y) * (x - y)).sum(-1)


def negative_entropy(p: Tensor) -> Tensor:
    """Σ p ln p, (…, n) → (…)."""
    return torch.xlogy(p, p).sum(-1)


def check_projection_and_bregman() -> Iterator[Check]:
    """I-projection is an exponential tilt, with Pythagoras' theorem; KL is a Bregman divergence"""
    statistic, uniform = torch.arange(5.0, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64).log()
    strength, q = i_projection(uniform, statistic, 1.2)
    yield figures("uniform on 0..4 onto mean 1.2: λ*", strength, "-0.431315")
    yield figures("… q*", q.exp(), "0.396194 0.257389 0.167214 0.108631 0.070573")
    constraints = [
        {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        {"type": "eq", "fun": lambda x: x @ statistic.numpy() - 1.2, "jac": lambda x: statistic.numpy()},
    ]
    found = optimize.minimize(
        lambda x: (x * np.log(x / 0.2)).sum(),
        np.full(5, 0.2),
        jac=lambda x: np.log(x / 0.2) + 1,
        bounds=[(1e-9, 1)] * 5,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    yield equal("… is what constrained optimisation finds", torch.from_numpy(found.x), q.exp(), 1e-6)
    r = as_tensor([0.279363, 0.294944, 0.380593, 0.036529, 0.008570])
    r = (r / r.sum()).log()  # the digits given sum to 0.999999
    parts = kl_divergence(r, uniform), kl_divergence(r, q), kl_divergence(q, uniform)
    yield figures("Pythagoras: KL(r‖p), KL(r‖q*), KL(q*‖p)", parts, "0.363714 0.197706 0.166008")
    # Any r of mean 1.2: a random one, tilted.
    others = [i_projection(log_p, statistic, 1.2)[1] for log_p in dirichlet(13, 5, 20)]
    sides = [(kl_divergence(o, uniform), kl_divergence(o, q) + kl_divergence(q, uniform)) for o in others]
    left, right = (torch.stack(side) for side in zip(*sides, strict=True))
    yield equal("KL(r‖p) = KL(r‖q*) + KL(q*‖p), 20 random r of that mean", left, right)
    pairs = dirichlet(7, 4, 10)
    of_entropy = bregman(negative_entropy, pairs[0::2].exp(), pairs[1::2].exp())
    yield figures(
        "Bregman divergence of Σ p ln p, five pairs", of_entropy, "1.671107 0.450439 1.706874 0.182420 0.673149"
    )
    yield equal("… = KL(p‖q)", of_entropy, kl_divergence(pairs[0::2], pairs[1::2]))


class ExponentialFamily(NamedTuple):
    """p(x) ∝ h(x) e^{θ·T(x) − A(θ)}."""

    natural: Callable[..., Tensor]
    """its usual parameters → θ (…, k)"""
    log_partition: Callable[[Tensor], Tensor]
    """A: (…, k) → (…)"""


FAMILIES = {
    "Bernoulli": ExponentialFamily(
        lambda theta: torch.special.logit(theta).unsqueeze(-1), lambda eta: torch.logaddexp(eta, eta * 0).sum(-1)
    ),
    "Gaussian": ExponentialFamily(
        lambda mean, std: torch.stack([mean / std**2, -0.5 / std**2], -1),
        lambda eta: -(eta[..., 0] ** 2) / (4 * eta[..., 1]) - (-2 * eta[..., 1]).log() / 2,
    ),
    "Poisson": ExponentialFamily(lambda rate: rate.log().unsqueeze(-1), lambda eta: eta.exp().sum(-1)),
}


def exponential_family_kl(family: ExponentialFamily, p: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    """KL(p‖q) = B_A(θ_q, θ_p): the Bregman divergence of the log-partition, with the arguments exchanged."""
    return bregman(family.log_partition, family.natural(*q), family.natural(*p))


def check_exponential_families() -> Iterator[Check]:
    """Exponential families: KL is the Bregman divergence of the log-partition"""
    p, q = as_tensor([0.2, 0.8, 0.1]), as_tensor([0.5, 0.3, 0.9])
    kl = exponential_family_kl(FAMILIES["Bernoulli"], (p,), (q,))
    yield figures("Bernoulli (.2,.5), (.8,.3), (.1,.9)", kl, "0.192745 0.534111 1.757780")
    yield equal("Bernoulli: = torch.distributions", kl, distributions.kl_divergence(Bernoulli(p), Bernoulli(q)))
    m1, s1, m2, s2 = as_tensor(GAUSSIAN_PAIRS).T
    kl = exponential_family_kl(FAMILIES["Gaussian"], (m1, s1), (m2, s2))
    yield figures("Gaussians of section 5", kl, "0.500000 0.806853 0.876390")
    yield equal("Gaussian: = the closed form", kl, gaussian_kl(m1, s1, m2, s2))
    p, q = as_tensor([3]), as_tensor([2])
    kl = exponential_family_kl(FAMILIES["Poisson"], (p,), (q,))
    yield figures("Poisson (3‖2)", kl, "0.216395")
    yield equal("Poisson: = torch.distributions", kl, distributions.kl_divergence(Poisson(p), Poisson(q)))
