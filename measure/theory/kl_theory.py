"""The theory of the KL divergence, verified: what this project takes for granted about it, in 17 sections.

A check tests a statement: it computes both of its sides by different routes, or, where the statement comes with
figures, compares what it computed with them, to the digits given. `SECTIONS` holds the checks, each section's after the
functions they test; `scripts/kl_theory.py` runs them and draws the panels. Everything is in float64 and in nats. A
density stands for itself as the probabilities of the cells of a fine grid: one `kl_divergence` serves them all.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate, optimize, stats
from torch import Tensor, distributions
from torch.distributions import Bernoulli, Categorical, MixtureSameFamily, MultivariateNormal, Normal, Poisson
from torch.nn import functional as F

from measure.divergence import hellinger, jensen_shannon, kl_divergence, renyi, total_variation

LN_2 = math.log(2)

# Tolerances: float64's epsilon is 2.2e-16, and no sum here has more than 10⁴ terms of size 1.
ROUNDING = 1e-11
# What a quadrature, a root finder or an optimiser may leave: one in the sixth digit, as the figures.
NUMERICAL = 1e-6

# --- checks ---------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One statement, tested: each number of `found` stands in `relation` (=, ≤, ≥) to its `due`, up to `tolerance`."""

    name: str
    found: list[float]
    relation: str
    due: list[float]
    tolerance: list[float]

    @property
    def passed(self) -> bool:
        excess = [f - d for f, d in zip(self.found, self.due, strict=True)]
        excess = {"=": [abs(e) for e in excess], "≤": excess, "≥": [-e for e in excess]}[self.relation]
        return all(e <= t for e, t in zip(excess, self.tolerance, strict=True))  # a NaN is not ≤ anything: it fails


def figures(name: str, found, due: str, units: int = 1) -> Check:
    """`found`, one number or several, are those in `due`, "0.25 1.50", up to `units` of the last digit of each."""
    numbers = due.split()
    digits = [len(number.partition(".")[2]) for number in numbers]
    return Check(name, _floats(found), "=", [float(number) for number in numbers], [units * 10.0**-d for d in digits])


def equal(name: str, found, due, tolerance: float = ROUNDING) -> Check:
    """Both sides of an equation, numbers or tensors; of many cases the one furthest off is shown."""
    found, due = torch.broadcast_tensors(_tensor(found), _tensor(due))
    worst = (found - due).abs().argmax()  # takes a NaN for the largest
    return Check(name, _floats(found.flatten()[worst]), "=", _floats(due.flatten()[worst]), [tolerance])


def at_least(name: str, found: Tensor, due: float, tolerance: float = ROUNDING) -> Check:
    """An inequality; of many cases the least is shown."""
    return Check(name, _floats(found.min()), "≥", [due], [tolerance])


def at_most(name: str, found: Tensor, due: float, tolerance: float = ROUNDING) -> Check:
    """An inequality; of many cases the largest is shown."""
    return Check(name, _floats(found.max()), "≤", [due], [tolerance])


def _floats(value) -> list[float]:
    return [float(v) for v in value] if isinstance(value, tuple | list) else _tensor(value).flatten().tolist()


def _tensor(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


# --- tools ----------------------------------------------------------------------------------------------------------

GRID = torch.linspace(-40, 40, 1601, dtype=torch.float64)
"""Points 0.05 apart. The sum over them of a Gaussian of deviation σ is its integral up to exp(−2π²σ²/0.05²): exact."""


def categorical(*probabilities: float) -> Tensor:
    """Log-probabilities (n,)."""
    return _tensor(probabilities).log()


def bernoulli(theta) -> Tensor:
    """Log-probabilities (…, 2) of 1 and of 0, for θ (…) the probability of 1."""
    theta = _tensor(theta)
    return torch.stack([theta, 1 - theta], -1).log()


def on_grid(log_density: Tensor) -> Tensor:
    """Log-probabilities (…, n) of the cells around the points of a grid, from the log-density at the points."""
    return log_density.log_softmax(-1)


def dirichlet(seed: int, n: int, count: int) -> Tensor:
    """Log-probabilities (count, n) drawn from Dir(1ₙ), by NumPy's legacy generator: the figures were made with it."""
    return torch.from_numpy(np.random.RandomState(seed).dirichlet(np.ones(n), count)).log()


def minimise(objective: Callable[[Tensor], Tensor], start) -> Tensor:
    """The point (n,) near `start` (n,) where the objective is least: BFGS with autograd's gradients."""

    def value_and_gradient(x):
        x = torch.tensor(x, requires_grad=True)
        value = objective(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    start = np.asarray(start, dtype=np.float64)
    result = optimize.minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    return torch.from_numpy(result.x)


def slope(function: Callable[[Tensor], Tensor], x) -> Tensor:
    """Derivative of an elementwise function, or gradient of a scalar one, at x."""
    x = _tensor(x).clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def expectation(log_density: Callable, function: Callable) -> Tensor:
    """∫ p(x) f(x) dx from ln p and f of numpy arrays, by Gauss-Legendre quadrature with 600 nodes from −40 to 40."""
    integral, _ = integrate.fixed_quad(lambda x: np.exp(log_density(x)) * function(x), -40, 40, n=600)
    return _tensor(integral)


def kl_by_quadrature(log_p: Callable, log_q: Callable) -> Tensor:
    """∫ p (ln p − ln q) dx of two log-densities of numpy arrays."""
    return expectation(log_p, lambda x: log_p(x) - log_q(x))


# --- 1 coding, 2 Gibbs ----------------------------------------------------------------------------------------------


def entropy(log_p: Tensor) -> Tensor:
    """H(p) = −Σ p ln p."""
    return Categorical(logits=log_p).entropy()


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """H(p, q) = −Σ p ln q: the length, in nats, of a code made for q on data from p."""
    return F.cross_entropy(log_q, log_p.exp())


def check_coding() -> Iterator[Check]:
    """Coding: a code made for q costs KL(p‖q) too much on data from p"""
    p, q = categorical(0.5, 0.3, 0.2), categorical(0.7, 0.2, 0.1)
    yield equal("H(p,q) = H(p) + KL(p‖q)", cross_entropy(p, q), entropy(p) + kl_divergence(p, q))
    yield figures("KL(p‖q) in nats", kl_divergence(p, q), "0.0920329")
    yield figures("KL(p‖q) in bits", kl_divergence(p, q) / LN_2, "0.132775")
    yield figures("KL(q‖p)", kl_divergence(q, p), "0.0851228")
    yield figures("H(p)", entropy(p), "1.029653")
    yield figures("H(p,q)", cross_entropy(p, q), "1.121686")


def log_gap(t: Tensor) -> Tensor:
    """(t − 1) − ln t, which is never negative."""
    return (t - 1) - t.log()


def check_gibbs() -> Iterator[Check]:
    """Gibbs' inequality: KL ≥ 0, because ln t ≤ t − 1"""
    pairs = dirichlet(42, 5, 20_000)
    p, q = pairs[0::2], pairs[1::2]
    kl = kl_divergence(p, q)
    yield at_least("KL ≥ 0 on 10,000 random pairs, the least", kl, 0)
    yield figures("min, max, mean of these", (kl.min(), kl.max(), kl.mean()), "0.00662364 5.447494 0.798688")
    yield equal("KL(p‖p) = 0", kl_divergence(p, p), 0)
    yield equal("KL(p‖q) = Σ p ((t−1) − ln t) with t = q/p", (p.exp() * log_gap((q - p).exp())).sum(-1), kl)
    t = torch.logspace(-3, 3, 6001, dtype=torch.float64)
    yield at_least("ln t ≤ t − 1 for t from 0.001 to 1000, the least gap", log_gap(t), 0)
    yield equal("… equality at t = 1", log_gap(_tensor(1)), 0)
    yield equal("… and nowhere else: where the least gap is", t[log_gap(t).argmin()], 1)
    yield figures("(t−1) − ln t at t = 0.01, 4", log_gap(_tensor([0.01, 4])), "3.615170 1.613706")


# --- 3 asymmetry, 4 two fits ----------------------------------------------------------------------------------------


def check_asymmetry() -> Iterator[Check]:
    """Asymmetry: KL(p‖q) ≠ KL(q‖p); Jensen-Shannon is symmetric and bounded"""
    ends, fair = bernoulli([0.1, 0.9]), bernoulli([0.5, 0.5])
    yield figures("KL(θ‖½) at θ = 0.1, 0.9", kl_divergence(ends, fair), "0.368064 0.368064")
    yield figures("KL(½‖θ) at θ = 0.1, 0.9", kl_divergence(fair, ends), "0.510826 0.510826")
    yield figures("JS(θ, ½) at θ = 0.1, 0.9", jensen_shannon(ends, fair), "0.101749 0.101749")
    # With x = 2θ − 1: KL(½‖θ) − KL(θ‖½) = x⁴/6 + …, all further terms positive.
    theta = torch.cat([torch.linspace(0.01, 0.45, 45), torch.linspace(0.55, 0.99, 45)]).double()
    p, fair = bernoulli(theta), bernoulli(torch.full_like(theta, 0.5))
    asymmetry = (kl_divergence(fair, p) - kl_divergence(p, fair)) / (2 * theta - 1) ** 4
    yield at_least("KL(½‖θ) > KL(θ‖½) for θ ≠ ½, by more than (2θ−1)⁴/6", asymmetry, 1 / 6)
    every = bernoulli(torch.linspace(0, 1, 101).double())
    js = jensen_shannon(every[:, None].expand(-1, 101, 2), every.expand(101, -1, 2))
    yield equal("JS(p,q) = JS(q,p)", js, js.T)
    m = torch.logaddexp(p, fair) - LN_2
    of_entropies = entropy(m) - (entropy(p) + entropy(fair)) / 2
    yield equal("JS = H(m) − ½H(p) − ½H(q) with m = ½p + ½q", jensen_shannon(p, fair), of_entropies)
    yield at_most("JS ≤ ln 2 for all pairs on a grid, the largest", js, LN_2)
    yield equal("… equality for disjoint distributions", js[0, -1], LN_2)


MIXTURE = MixtureSameFamily(Categorical(torch.ones(2)), Normal(_tensor([-3, 3]), _tensor([1, 1])))


def log_mixture(x: np.ndarray) -> np.ndarray:
    """MIXTURE's log-density once more, by scipy."""
    return np.logaddexp(stats.norm.logpdf(x, -3), stats.norm.logpdf(x, 3)) - LN_2


def gaussian(mean: Tensor, std: Tensor) -> Tensor:
    """Log-probabilities on GRID; of many, with a last dimension of 1 for it."""
    return on_grid(Normal(mean, std).log_prob(GRID))


def kl_from(target: Tensor) -> Callable[[Tensor], Tensor]:
    """KL(N(μ,σ²)‖target) as a function of x = (μ, σ)."""
    return lambda x: kl_divergence(gaussian(x[0], x[1]), target)


def kl_to(target: Tensor) -> Callable[[Tensor], Tensor]:
    """KL(target‖N(μ,σ²)) as a function of x = (μ, σ)."""
    return lambda x: kl_divergence(target, gaussian(x[0], x[1]))


def fit_gaussian(kl: Callable[[Tensor], Tensor], mean: float, std: float) -> tuple[float, float, float]:
    """μ, σ and KL at the minimum of a `kl_from` or a `kl_to` that descent from (mean, std) ends in."""
    x = minimise(lambda x: kl(torch.stack([x[0], x[1].exp()])), [mean, math.log(std)])
    x = torch.stack([x[0], x[1].exp()])
    return *x.tolist(), kl(x).item()


def stationary_point(kl: Callable[[Tensor], Tensor], mean: float, std: float) -> list[float]:
    """(μ, σ) near those given where the gradient is zero, be it a minimum or a saddle."""
    return optimize.root(lambda x: slope(kl, x).numpy(), [mean, std], tol=1e-12).x.tolist()


def curvature(function: Callable[[Tensor], Tensor], x) -> Tensor:
    """The eigenvalues of the Hessian of a scalar function at x (n,), in rising order: all > 0 at a minimum."""
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, _tensor(x)))


def check_two_fits() -> Iterator[Check]:
    """Two fits of a Gaussian to ½N(−3,1) + ½N(3,1): KL(mixture‖fit) covers both modes, KL(fit‖mixture) seeks one"""
    target = on_grid(MIXTURE.log_prob(GRID))
    covering = fit_gaussian(kl_to(target), 0.5, 2)
    yield figures("covering: μ, σ", covering[:2], "0.000000 3.162278")
    # 0.4619946 to seven digits: so say the quadrature below, and the entropies, ½ ln 20πe − H(mixture).
    yield figures("covering: KL(mixture‖fit)", covering[2], "0.461998", units=4)
    by_quadrature = kl_by_quadrature(log_mixture, stats.norm(*covering[:2]).logpdf)
    yield equal("covering: KL = quadrature", covering[2], by_quadrature, NUMERICAL)
    yield equal("covering: σ² = the mixture's variance", covering[1] ** 2, MIXTURE.variance, NUMERICAL)
    seeking = fit_gaussian(kl_from(target), 3, 1)
    yield figures("seeking from μ = 3: μ, σ, KL(fit‖mixture)", seeking, "2.98430 1.02337 0.688768")
    by_quadrature = kl_by_quadrature(stats.norm(*seeking[:2]).logpdf, log_mixture)
    yield equal("seeking: KL = quadrature", seeking[2], by_quadrature, NUMERICAL)
    mirrored = fit_gaussian(kl_from(target), -3, 1)
    yield equal("seeking from μ = −3: the mirror image", mirrored, (-seeking[0], *seeking[1:]), NUMERICAL)
    stuck = fit_gaussian(kl_from(target), 0, 1)
    yield equal("seeking from μ = 0: stays there", stuck[0], 0, NUMERICAL)
    by_quadrature = kl_by_quadrature(stats.norm(*stuck[:2]).logpdf, log_mixture)
    yield equal("seeking from μ = 0: KL = quadrature", stuck[2], by_quadrature, NUMERICAL)
    # Stationary by symmetry, and a local minimum: to reach a mode, the fit would have to climb over the saddle between.
    kl, x, step = kl_from(target), _tensor(stuck[:2]), 1e-4 * torch.eye(2, dtype=torch.float64)
    bends = curvature(kl, x)
    yield equal("seeking from μ = 0: a minimum, signs of curvature", bends.sign(), [1, 1])
    by_differences = [(slope(kl, x + h) - slope(kl, x - h)) / (2 * h.sum()) @ h / h.sum() for h in step]
    yield equal("… the curvatures' sum by differences of the gradient", bends.sum(), sum(by_differences), NUMERICAL)
    between = stationary_point(kl, 1.5, 2)
    yield equal("between it and the mode: gradient 0", slope(kl, between), 0)
    yield equal("between it and the mode: a saddle, signs of curvature", curvature(kl, between).sign(), [-1, 1])


# --- 5 Gaussians, 6 f-divergences -----------------------------------------------------------------------------------


def gaussian_kl(mean_p, std_p, mean_q, std_q) -> Tensor:
    """KL(N(μ₁,σ₁²)‖N(μ₂,σ₂²)) = ln(σ₂/σ₁) + (σ₁² + (μ₁ − μ₂)²)/(2σ₂²) − ½; numbers or tensors, elementwise."""
    mean_p, std_p, mean_q, std_q = map(_tensor, (mean_p, std_p, mean_q, std_q))
    return (std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5


def vae_kl(mean, variance) -> Tensor:
    """KL(N(μ,σ²)‖N(0,1)) = ½(μ² + σ² − 1 − ln σ²): what a VAE's code costs (Kingma & Welling 2014)."""
    mean, variance = _tensor(mean), _tensor(variance)
    return (mean**2 + variance - 1 - variance.log()) / 2


GAUSSIAN_PAIRS = ((1, 1, 0, 1), (0, 2, 0, 1), (2, 0.5, 1, 1.5))
"""(μ₁, σ₁, μ₂, σ₂)"""


def check_gaussians() -> Iterator[Check]:
    """Gaussians: one closed form, whichever way it is computed; the VAE's term"""
    parameters = _tensor(GAUSSIAN_PAIRS)
    closed = gaussian_kl(*parameters.T)
    yield figures("KL of (1,1,0,1), (0,2,0,1), (2,.5,1,1.5)", closed, "0.500000 0.806853 0.876390")
    by_quadrature = [
        kl_by_quadrature(stats.norm(m1, s1).logpdf, stats.norm(m2, s2).logpdf) for m1, s1, m2, s2 in GAUSSIAN_PAIRS
    ]
    yield equal("closed form = quadrature", closed, by_quadrature, NUMERICAL)
    on_cells = torch.stack([kl_divergence(gaussian(m1, s1), gaussian(m2, s2)) for m1, s1, m2, s2 in parameters])
    yield equal("closed form = sum over the cells of a grid", closed, on_cells)
    m1, s1, m2, s2 = parameters.T
    yield equal(
        "closed form = torch.distributions", closed, distributions.kl_divergence(Normal(m1, s1), Normal(m2, s2))
    )
    mean, std = _tensor([1, 2, 0.5]), _tensor([1, 0.5, 1.5])
    terms = vae_kl(mean, std**2)
    yield figures("VAE term of (μ,σ) = (1,1), (2,.5), (.5,1.5)", terms, "0.500000 2.318147 0.344535")
    yield equal("VAE term = KL to N(0,1)", terms, gaussian_kl(mean, std, 0, 1))
    p = MultivariateNormal(mean, scale_tril=std.diag())
    q = MultivariateNormal(torch.zeros_like(mean), torch.eye(3, dtype=torch.float64))
    yield equal("diagonal Gaussian in 3 dimensions = sum", terms.sum(), distributions.kl_divergence(p, q))


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


# --- 7 chain rule and data processing, 8 maximum likelihood ---------------------------------------------------------


def chain_rule(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-probabilities (n, m) → KL of the marginals of x (n), mean over p of the KL of y given x."""
    marginals = log_p.logsumexp(-1), log_q.logsumexp(-1)
    conditionals = (log_p - marginals[0][:, None]).log_softmax(-1), (log_q - marginals[1][:, None]).log_softmax(-1)
    return kl_divergence(*marginals), (marginals[0].exp() * kl_divergence(*conditionals)).sum()


def through(log_p: Tensor, channel: Tensor) -> Tensor:
    """Log-probabilities (…, n) of what comes out of a channel (n, m), whose rows sum to 1."""
    return (log_p.exp() @ channel).log()


def check_chain_and_processing() -> Iterator[Check]:
    """The chain rule; data processing: no channel adds divergence"""
    p, q = _tensor([[0.4, 0.1], [0.1, 0.4]]).log(), torch.full((2, 2), 0.25, dtype=torch.float64).log()
    marginal, conditional = chain_rule(p, q)
    joint = kl_divergence(p.flatten(), q.flatten())
    yield figures("joint = marginal + conditional", (joint, marginal, conditional), "0.192745 0.000000 0.192745")
    p, q = dirichlet(7, 12, 2)
    joint = kl_divergence(p, q)
    yield equal("chain rule on a random 3 × 4 joint", joint, sum(chain_rule(p.view(3, 4), q.view(3, 4))))
    yield equal("… and with x and y exchanged", joint, sum(chain_rule(p.view(3, 4).T, q.view(3, 4).T)))
    p, q = categorical(0.5, 0.3, 0.2), categorical(0.2, 0.3, 0.5)
    channel = _tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    after = kl_divergence(through(p, channel), through(q, channel))
    yield figures("KL before T", kl_divergence(p, q), "0.274887")
    yield figures("KL after T", after, "0.0909298")
    identity, noise = torch.eye(3, dtype=torch.float64), torch.linspace(0, 1, 1000).double().view(-1, 1, 1)
    channels = torch.lerp(identity, dirichlet(17, 3, 3000).exp().view(1000, 3, 3), noise)
    outputs = [through(x.expand(1000, 1, 3), channels).squeeze(1) for x in (p, q)]
    yield at_most(
        "1,000 channels, from clean to random: the largest KL after",
        kl_divergence(*outputs),
        kl_divergence(p, q).item(),
    )
    kept = kl_divergence(*(through(x, identity[[2, 0, 1]]) for x in (p, q)))
    yield equal("… equality for one that can be undone", kept, kl_divergence(p, q))


def negative_log_likelihood(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """−(1/n) Σ ln N(x; μ, σ²): the cross entropy of the sample with the Gaussian."""
    return -Normal(mean, std).log_prob(sample).mean()


def check_maximum_likelihood() -> Iterator[Check]:
    """Maximum likelihood: the Gaussian of least divergence from a sample has its moments"""
    random = np.random.RandomState(42)  # the figures' generator
    sample = torch.from_numpy(np.concatenate([random.normal(-1, 0.8, 500), random.normal(2, 0.5, 500)]))
    moments = torch.stack([sample.mean(), sample.std(correction=0)])

    def objective(x):
        return negative_log_likelihood(sample, x[0], x[1])

    yield equal("zero gradient at the sample's moments", slope(objective, moments), 0)
    # Of −ln N at the moments: 1/σ² along μ, 2/σ² along σ.
    yield equal("… a minimum: curvature (1, 2)/σ²", curvature(objective, moments) * moments[1] ** 2, [1, 2])
    found = minimise(lambda x: objective(torch.stack([x[0], x[1].exp()])), [0, 0])
    yield figures("the minimum found from (0, 1): μ, σ", (found[0], found[1].exp()), "0.510692 1.640887")
    smoothed = MixtureSameFamily(Categorical(torch.ones(1000)), Normal(sample, _tensor(0.3)))
    target = on_grid(smoothed.log_prob(GRID))
    mean, std, kl = fit_gaussian(kl_to(target), 0, 2)
    yield figures("KL(smoothed sample‖fit), h = .3: σ", std, "1.668086")
    yield equal("… σ² = the sample's + h²", std**2, moments[1] ** 2 + 0.3**2, NUMERICAL)
    yield equal("… μ = the sample's", mean, moments[0], NUMERICAL)
    differential_entropy = entropy(target) + (GRID[1] - GRID[0]).log()
    yield equal(
        "… KL = ½ ln 2πeσ² − H", kl, math.log(2 * math.pi * math.e * std**2) / 2 - differential_entropy, NUMERICAL
    )


# --- 9 RLHF, 10 distillation ----------------------------------------------------------------------------------------

REFERENCE_POLICY, REWARDS = categorical(0.35, 0.25, 0.2, 0.12, 0.08), _tensor([1, 2.5, -0.5, 3, 0.5])


def optimal_policy(log_reference: Tensor, rewards: Tensor, beta) -> Tensor:
    """ln π* with π* ∝ π_ref e^{r/β}, (…, n) for β (…)."""
    return (log_reference + rewards / _tensor(beta).unsqueeze(-1)).log_softmax(-1)


def optimal_value(log_reference: Tensor, rewards: Tensor, beta) -> Tensor:
    """β ln Z with Z = E_ref[e^{r/β}], (…) for β (…)."""
    beta = _tensor(beta)
    return beta * (log_reference + rewards / beta.unsqueeze(-1)).logsumexp(-1)


def reward_and_kl(log_policy: Tensor, log_reference: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """E_π[r] and KL(π‖π_ref), each (…)."""
    kl = kl_divergence(log_policy, log_reference.expand_as(log_policy))
    return (log_policy.exp() * rewards).sum(-1), kl


def check_rlhf() -> Iterator[Check]:
    """RLHF: the policy of most reward at a price on its KL from the reference"""
    task = REFERENCE_POLICY, REWARDS
    policy = optimal_policy(*task, 1)
    reward, kl = reward_and_kl(policy, *task)
    yield figures("β = 1: E[r], KL, E[r] − βKL", (reward, kl, reward - kl), "2.372430 0.476237 1.896193")
    yield figures("β = ½: E[r], KL", reward_and_kl(optimal_policy(*task, 0.5), *task), "2.722541 0.963301")
    beta = torch.logspace(2, -2, 201, dtype=torch.float64)
    rewards, kls = reward_and_kl(optimal_policy(*task, beta), *task)
    yield equal("value at π* = β ln Z, β from 100 to 0.01", rewards - beta * kls, optimal_value(*task, beta))

    def loss(logits):
        reward, kl = reward_and_kl(logits.log_softmax(-1), *task)
        return kl - reward

    found = minimise(loss, REFERENCE_POLICY).log_softmax(-1)
    yield equal("π* is what an optimiser finds", found.exp(), policy.exp(), NUMERICAL)
    others = torch.lerp(policy, dirichlet(9, 5, 1000), torch.linspace(0, 1, 1000).double()[:, None]).log_softmax(-1)
    reward, kl = reward_and_kl(others, *task)
    shortfall = optimal_value(*task, 1) - (reward - kl)
    yield at_least("none of 1,000 other policies beats it: the least shortfall", shortfall, 0)
    yield equal("… which is βKL(π‖π*)", shortfall, kl_divergence(others, policy.expand_as(others)))
    yield at_least("frontier: as β falls the reward rises, least step", rewards.diff(), 0)
    yield at_least("frontier: … and so does the KL, least step", kls.diff(), 0)
    d_reward = slope(lambda b: reward_and_kl(optimal_policy(*task, b), *task)[0], beta)
    d_kl = slope(lambda b: reward_and_kl(optimal_policy(*task, b), *task)[1], beta)
    middle = (beta > 0.1) & (beta < 10)  # at the ends both derivatives underflow
    yield equal("frontier: its slope dE/dKL is β", (d_reward / d_kl)[middle], beta[middle], NUMERICAL)
    yield equal("β → 0: KL → −ln .12, all on the best answer", kls[-1], -math.log(0.12), NUMERICAL)


def soften(logits: Tensor, temperature) -> Tensor:
    """Log-probabilities (…, n) of logits (n,) at temperatures (…)."""
    return (logits / _tensor(temperature).unsqueeze(-1)).log_softmax(-1)


def hot_limit(teacher: Tensor, student: Tensor) -> Tensor:
    """What τ² KL at temperature τ tends to: half the variance, over equal weights, of the difference of the logits."""
    return (teacher - student).var(correction=0) / 2


TEACHER, STUDENT = _tensor([3, 1.5, 0.5, -0.5, -1.5]), _tensor([2, 1, 0.5, -0.3, -1.2])


def check_distillation() -> Iterator[Check]:
    """Distillation: what temperature does to soft labels (Hinton et al. 2015)"""

    def at(temperature):
        teacher, student = soften(TEACHER, temperature), soften(STUDENT, temperature)
        return entropy(teacher), kl_divergence(teacher, student), kl_divergence(student, teacher)

    yield figures("τ = 1: H(T), KL(T‖S), KL(S‖T)", at(1), "0.814107 0.0703182 0.0833116")
    yield figures("τ = 5: H(T), KL(T‖S), KL(S‖T)", at(5), "1.559992 0.00511369 0.00508037")
    entropies, _, _ = at(torch.logspace(-1, 2, 301))
    yield at_least("H(T) rises with τ from 0.1 to 100, least step", entropies.diff(), 0)
    hot = 1e4  # where the next terms, of relative order 1/τ, are below 1e-4
    h, forward, reverse = at(hot)
    yield equal("τ → ∞: H(T) → ln 5", h, math.log(5), NUMERICAL)
    limit = hot_limit(TEACHER, STUDENT)
    yield figures("½ Var_uniform(z_T − z_S)", limit, "0.118000")
    yield equal("τ → ∞: τ²KL(T‖S) → ½ Var", hot**2 * forward, limit, 1e-4)
    yield equal("τ → ∞: τ²KL(S‖T) → ½ Var", hot**2 * reverse, limit, 1e-4)

    def order(temperature: float) -> float:
        _, forward, reverse = at(temperature)
        return (forward - reverse).item()

    signs = [math.copysign(1, order(temperature)) for temperature in (3.3, 3.35)]
    yield equal("KL(T‖S) < KL(S‖T) at τ = 3.3, > at 3.35: signs", signs, [-1, 1])
    # They are equal at 3.3269; from 3.28 to 3.37 they differ by less than one in 2,000.
    crossing = optimize.brentq(order, 1, 5, xtol=1e-12) if order(1) < 0 < order(5) else math.nan
    yield equal("… they are equal near τ = 3.28", crossing, 3.28, 0.05)


# --- 11 ELBO, 12 Rényi ----------------------------------------------------------------------------------------------

OBSERVED, DECODER_VARIANCE, ENCODER_VARIANCE = 2.0, 0.25, 0.5
"""x; the decoder is N(z, ¼), the encoder N(αx, ½), the prior N(0, 1)"""


def elbo_parts(alpha) -> tuple[Tensor, Tensor]:
    """E_{q(z|x)}[ln p(x|z)] and KL(q(z|x)‖p(z)) for the encoder's slope α (…); the ELBO is their difference."""
    mean = _tensor(alpha) * OBSERVED
    square_error = (OBSERVED - mean) ** 2 + ENCODER_VARIANCE
    reconstruction = -square_error / (2 * DECODER_VARIANCE) - math.log(2 * math.pi * DECODER_VARIANCE) / 2
    return reconstruction, vae_kl(mean, ENCODER_VARIANCE)


def log_evidence() -> Tensor:
    """ln p(x): integrated over z, x is N(0, 1 + v) with v the decoder's variance."""
    return Normal(_tensor(0), _tensor(math.sqrt(1 + DECODER_VARIANCE))).log_prob(_tensor(OBSERVED))


def elbo_gap(alpha) -> Tensor:
    """KL(q(z|x)‖p(z|x)), (…); the posterior is N(x/(1 + v), v/(1 + v)) with v the decoder's variance."""
    posterior_mean, posterior_variance = OBSERVED / (1 + DECODER_VARIANCE), DECODER_VARIANCE / (1 + DECODER_VARIANCE)
    std = math.sqrt(ENCODER_VARIANCE), math.sqrt(posterior_variance)
    return gaussian_kl(_tensor(alpha) * OBSERVED, std[0], posterior_mean, std[1])


def check_elbo() -> Iterator[Check]:
    """The ELBO: its gap to the evidence is a KL"""
    evidence = log_evidence()
    decoder = stats.norm(OBSERVED, math.sqrt(DECODER_VARIANCE))  # of x around z, so of z around x
    yield equal("ln p(x) = ln ∫ p(z) p(x|z) dz", evidence, expectation(stats.norm.logpdf, decoder.pdf).log(), NUMERICAL)
    alpha = torch.linspace(-1, 2, 301, dtype=torch.float64)
    reconstruction, kl = elbo_parts(alpha)
    yield equal("ELBO + KL(q‖posterior) = ln p(x), α from −1 to 2", reconstruction - kl + elbo_gap(alpha), evidence)
    encoder = stats.norm(0.8 * OBSERVED, math.sqrt(ENCODER_VARIANCE)).logpdf
    by_quadrature = expectation(encoder, decoder.logpdf)
    yield equal("reconstruction at α = .8 = quadrature", elbo_parts(0.8)[0], by_quadrature, NUMERICAL)
    best = minimise(lambda a: elbo_parts(a[0])[1] - elbo_parts(a[0])[0], [0])
    yield figures("α of the largest ELBO", best, "0.800000")
    reconstruction, kl = elbo_parts(0.8)
    parts = (kl, reconstruction, reconstruction - kl)
    yield figures("α = .8: KL, reconstruction, ELBO", parts, "1.376574 -1.545791 -2.922365")
    yield figures("ln p(x), KL(q‖posterior)", (evidence, elbo_gap(0.8)), "-2.630510 0.291855")


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
    product = [(a[:, None] + b).flatten() for a, b in ((p, p_2), (q, q_2))]
    for order in (0.5, 1, 2):
        apart = at(order) + renyi(p_2, q_2, order)
        yield equal(f"additive over independent pairs, α = {order:g}", renyi(*product, order), apart)


# --- 13 projection and Bregman, 14 exponential families -------------------------------------------------------------


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
    r = _tensor([0.279363, 0.294944, 0.380593, 0.036529, 0.008570])
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
    p, q = _tensor([0.2, 0.8, 0.1]), _tensor([0.5, 0.3, 0.9])
    kl = exponential_family_kl(FAMILIES["Bernoulli"], (p,), (q,))
    yield figures("Bernoulli (.2,.5), (.8,.3), (.1,.9)", kl, "0.192745 0.534111 1.757780")
    yield equal("Bernoulli: = torch.distributions", kl, distributions.kl_divergence(Bernoulli(p), Bernoulli(q)))
    m1, s1, m2, s2 = _tensor(GAUSSIAN_PAIRS).T
    kl = exponential_family_kl(FAMILIES["Gaussian"], (m1, s1), (m2, s2))
    yield figures("Gaussians of section 5", kl, "0.500000 0.806853 0.876390")
    yield equal("Gaussian: = the closed form", kl, gaussian_kl(m1, s1, m2, s2))
    p, q = _tensor([3]), _tensor([2])
    kl = exponential_family_kl(FAMILIES["Poisson"], (p,), (q,))
    yield figures("Poisson (3‖2)", kl, "0.216395")
    yield equal("Poisson: = torch.distributions", kl, distributions.kl_divergence(Poisson(p), Poisson(q)))


# --- 15 posterior collapse ------------------------------------------------------------------------------------------


def beta_vae(x: Tensor, data_variance: float, decoder_variance: float) -> tuple[Tensor, Tensor]:
    """A linear VAE, encoder N(ax, s²), decoder N(wz, σ²), data of variance v: its expected distortion
    E[(x − wz)²]/(2σ²) and rate E[KL(q(z|x)‖p(z))], for x = (a, w, ln s²). (Lucas et al. 2019.)"""
    slope_in, slope_out, log_variance = x
    noise = log_variance.exp()
    distortion = (1 - slope_in * slope_out) ** 2 * data_variance + slope_out**2 * noise
    return distortion / (2 * decoder_variance), vae_kl(slope_in * math.sqrt(data_variance), noise)


def collapse_rate(data_variance, decoder_variance, beta) -> Tensor:
    """The rate at the optimum of `distortion + β rate`: max(0, ½ ln(v/(βσ²))), elementwise."""
    return (_tensor(data_variance) / (_tensor(beta) * decoder_variance)).log().div(2).clamp(min=0)


def beta_vae_loss(data_variance: float, decoder_variance: float, beta: float) -> Callable[[Tensor], Tensor]:
    """Distortion + β rate as a function of x = (a, w, ln s²)."""

    def loss(x):
        distortion, rate = beta_vae(x, data_variance, decoder_variance)
        return distortion + beta * rate

    return loss


def best_rate(data_variance: float, decoder_variance: float, beta: float) -> float:
    """The rate where an optimiser ends."""
    x = minimise(beta_vae_loss(data_variance, decoder_variance, beta), [0.5, 0.5, -0.5])
    return beta_vae(x, data_variance, decoder_variance)[1].item()


def descend(betas: Tensor, data_variance: float, decoder_variance: float) -> Tensor:
    """The rate before each step of gradient descent, by 0.8, under the schedule `betas` (n,) → (n,); from a = w = 1e-6,
    s² = 1, next to the collapsed point."""
    x, rates = _tensor([1e-6, 1e-6, 0]), []
    for beta in betas.tolist():
        rates.append(beta_vae(x, data_variance, decoder_variance)[1])
        x = x - 0.8 * slope(beta_vae_loss(data_variance, decoder_variance, beta), x)
    return torch.stack(rates)


ANNEALED = torch.linspace(0, 2, 100).clamp(max=1)
"""β at each step: up from 0 for half of them, then 1"""


def check_posterior_collapse() -> Iterator[Check]:
    """Posterior collapse: a linear β-VAE keeps ½ ln(v/(βσ²)) nats, and none from βσ² = v on"""
    betas = (0.5, 1, 2, 4)
    rates = [best_rate(1, 0.25, beta) for beta in betas]
    yield figures("optimiser, (v,σ²) = (1,.25), β = ½, 1, 2, 4", rates, "1.039721 0.693147 0.346574 0.000000")
    closed = collapse_rate(1, 0.25, betas)
    yield figures("max(0, ½ ln(v/βσ²)) there", closed, "1.039721 0.693147 0.346574 0.000000")
    yield figures("optimiser, (v,σ²) = (4,.01), β = 1", best_rate(4, 0.01, 1), "2.995732")
    yield figures("closed form there", collapse_rate(4, 0.01, 1), "2.995732")
    yield equal(
        "optimiser, (v,σ²) = (1,.25), β = 5: collapsed", best_rate(1, 0.25, 5), collapse_rate(1, 0.25, 5), NUMERICAL
    )
    least = torch.stack([curvature(beta_vae_loss(1, 0.25, beta), [0, 0, 0])[0] for beta in (1, 3.99, 4.01)])
    yield equal("a = w = 0 is stable from βσ² = v on: signs of curvature", least.sign(), [-1, -1, 1])
    # There the Hessian over (a, w) is [[βv, −v/σ²], [−v/σ², 1/σ²]], whose determinant is v/σ² (β − v/σ²).
    closed = [(beta + 4) / 2 - math.hypot((beta - 4) / 2, 4) for beta in (1, 3.99, 4.01)]
    yield equal("… its least curvature in closed form", least, closed)
    # Below βσ² = v the collapsed point is a saddle, which gradient descent leaves the more slowly the larger β is:
    # within 100 steps it finds the other branch if β comes up from 0, and not yet if β is 1 from the start.
    kept = collapse_rate(1, 0.85, 1)
    yield equal("β annealed from 0 to 1: KL over ½ ln(v/σ²)", descend(ANNEALED, 1, 0.85)[-1] / kept, 1, 0.005)
    yield at_most("β = 1 from the start: KL over ½ ln(v/σ²)", descend(torch.ones(100), 1, 0.85)[-1] / kept, 0.001)


# --- 16 DPO, 17 closed forms ----------------------------------------------------------------------------------------


def implicit_reward(log_ratio, beta: float) -> Tensor:
    """β ln(π/π_ref)."""
    return beta * _tensor(log_ratio)


def dpo_loss(preferred, other, beta: float) -> Tensor:
    """−ln σ(β(Δ_w − Δ_l)) of the log-ratios Δ = ln(π/π_ref) of both answers, (…). (Rafailov et al. 2023.)"""
    return -F.logsigmoid(implicit_reward(preferred, beta) - implicit_reward(other, beta))


def check_dpo() -> Iterator[Check]:
    """DPO: a loss on preferences alone, whose rewards are log-ratios to the reference"""
    beta = 0.1

    def loss_and_gradient(preferred, other):
        gradient = slope(lambda x: dpo_loss(x[0], x[1], beta), [preferred, other])
        return dpo_loss(preferred, other, beta), *gradient

    yield figures("Δ = .1, .1: loss, gradients", loss_and_gradient(0.1, 0.1), "0.693147 -0.050000 0.050000")
    yield figures("Δ = .8, −.3: loss, gradients", loss_and_gradient(0.8, -0.3), "0.639659 -0.047253 0.047253")
    yield figures("Δ = .8, −.3: implicit rewards", implicit_reward([0.8, -0.3], beta), "0.080000 -0.030000")
    margins = torch.cartesian_prod(*2 * [torch.linspace(-5, 5, 41, dtype=torch.float64)])
    up, down = slope(lambda x: dpo_loss(x[:, 0], x[:, 1], beta), margins).T
    yield at_most("the gradient pushes the preferred up, all Δ: largest", up, 0, 0)
    yield at_least("… and the other down: least", down, 0, 0)
    reward = implicit_reward(margins, beta)
    surprise = torch.sigmoid(reward[:, 1] - reward[:, 0])
    yield equal("… by β times the probability given to the wrong order", down, beta * surprise)
    preferred = (reward[:, 0].exp() / reward.exp().sum(1)).log()
    yield equal("loss = −ln of Bradley-Terry's probability", dpo_loss(*margins.T, beta), -preferred)

    def policy_loss(logits):
        ratios = logits.log_softmax(-1) - REFERENCE_POLICY
        return dpo_loss(ratios[1], ratios[2], beta)

    step = -0.1 * slope(policy_loss, REFERENCE_POLICY)
    moved = (REFERENCE_POLICY + step).log_softmax(-1) - REFERENCE_POLICY
    yield equal("one step on a policy of five answers moves only the two", step.sign(), _tensor([0, 1, -1, 0, 0]))
    yield equal("… up and down: signs of the change of ln π", moved[[1, 2]].sign(), [1, -1])
    # Where π is the RLHF optimum, its log-ratios are the rewards themselves up to the constant β ln Z.
    implicit = implicit_reward(optimal_policy(REFERENCE_POLICY, REWARDS, beta) - REFERENCE_POLICY, beta)
    constant = optimal_value(REFERENCE_POLICY, REWARDS, beta)
    yield equal("implicit rewards of RLHF's optimum are its rewards", implicit + constant, REWARDS)


def bernoulli_kl(theta, phi) -> Tensor:
    """θ ln(θ/φ) + (1 − θ) ln((1 − θ)/(1 − φ)), (…)."""
    theta, phi = _tensor(theta), _tensor(phi)
    return theta * (theta / phi).log() + (1 - theta) * ((1 - theta) / (1 - phi)).log()


def poisson_kl(rate_p, rate_q) -> Tensor:
    """λ₁ ln(λ₁/λ₂) − λ₁ + λ₂, (…)."""
    rate_p, rate_q = _tensor(rate_p), _tensor(rate_q)
    return rate_p * (rate_p / rate_q).log() - rate_p + rate_q


def check_closed_forms() -> Iterator[Check]:
    """Closed forms: Bernoulli, Gaussian, Poisson, categorical, VAE, each against the sum or integral and torch's"""
    torch_kl = distributions.kl_divergence
    closed = bernoulli_kl(0.7, 0.4)
    yield figures("Bern(.7‖.4)", closed, "0.183787")
    yield equal("Bernoulli: closed form = sum", closed, kl_divergence(bernoulli(0.7), bernoulli(0.4)))
    yield equal("Bernoulli: = torch", closed, torch_kl(Bernoulli(_tensor(0.7)), Bernoulli(_tensor(0.4))))
    closed = gaussian_kl(2, 1.5, 0, 1)
    yield figures("N(2,1.5²)‖N(0,1)", closed, "2.219535")
    on_cells = kl_divergence(gaussian(_tensor(2), _tensor(1.5)), gaussian(_tensor(0), _tensor(1)))
    yield equal("Gaussian: closed form = sum over a grid", closed, on_cells)
    yield equal("Gaussian: = torch", closed, torch_kl(Normal(_tensor(2), _tensor(1.5)), Normal(_tensor(0), _tensor(1))))
    closed, counts = poisson_kl(3, 2), torch.arange(100.0, dtype=torch.float64)
    p, q = Poisson(_tensor(3)), Poisson(_tensor(2))
    yield figures("Poisson(3‖2)", closed, "0.216395")
    # beyond 100 counts lies less than 1e-100
    yield equal(
        "Poisson: closed form = sum", closed, kl_divergence(on_grid(p.log_prob(counts)), on_grid(q.log_prob(counts)))
    )
    yield equal("Poisson: = torch", closed, torch_kl(p, q))
    p, q = dirichlet(17, 6, 2)
    yield equal("categorical: = torch", kl_divergence(p, q), torch_kl(Categorical(logits=p), Categorical(logits=q)))
    yield equal("categorical: = scipy", kl_divergence(p, q), stats.entropy(p.exp(), q.exp()))
    closed = vae_kl(1.5, 2)
    yield figures("VAE(1.5, σ² = 2)", closed, "1.278426")
    on_cells = kl_divergence(gaussian(_tensor(1.5), _tensor(math.sqrt(2))), gaussian(_tensor(0), _tensor(1)))
    yield equal("VAE: closed form = sum over a grid", closed, on_cells)
    p = Normal(_tensor(1.5), _tensor(math.sqrt(2)))
    yield equal("VAE: = torch", closed, torch_kl(p, Normal(_tensor(0), _tensor(1))))


# --- all of them ----------------------------------------------------------------------------------------------------

SECTIONS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_coding,
    check_gibbs,
    check_asymmetry,
    check_two_fits,
    check_gaussians,
    check_f_divergences,
    check_chain_and_processing,
    check_maximum_likelihood,
    check_rlhf,
    check_distillation,
    check_elbo,
    check_renyi,
    check_projection_and_bregman,
    check_exponential_families,
    check_posterior_collapse,
    check_dpo,
    check_closed_forms,
)
"""The checks of section 1, 2, …; what a section is about is its function's docstring."""
