"""Fits by least KL: a Gaussian to a mixture, in either direction (section 4), and maximum likelihood (8)."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from measure.divergence import kl_divergence
from measure.theory.checks import NUMERICAL, Check, as_tensor, equal, figures
from measure.theory.information import entropy
from measure.theory.tools import GRID, LN_2, curvature, gaussian, kl_by_quadrature, minimise, on_grid, slope

MIXTURE = MixtureSameFamily(Categorical(torch.ones(2)), Normal(as_tensor([-3, 3]), as_tensor([1, 1])))


def log_mixture(x: np.ndarray) -> np.ndarray:
    """MIXTURE's log-density once more, by scipy."""
    return np.logaddexp(stats.norm.logpdf(x, -3), stats.norm.logpdf(x, 3)) - LN_2


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


def check_two_fits() -> Iterator[Check]:
    """Two fits of a Gaussian to ½N(−3,1) + ½N(3,1): KL(mixture‖fit) covers both modes, KL(fit‖mixture) seeks one"""
    target = on_grid(MIXTURE.log_prob(GRID))
    covering = fit_gaussian(kl_to(target), 0.5, 2)
    yield figures("covering: μ, σ", covering[:2], "0.000000 3.162278")
    # The quadrature below and the entropies, ½ ln 20πe − H(mixture), give 0.4619946: the figure is nearly 4 units off.
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
    kl, x, step = kl_from(target), as_tensor(stuck[:2]), 1e-4 * torch.eye(2, dtype=torch.float64)
    bends = curvature(kl, x)
    yield equal("seeking from μ = 0: a minimum, signs of curvature", bends.sign(), [1, 1])
    by_differences = [(slope(kl, x + h) - slope(kl, x - h)) / (2 * h.sum()) @ h / h.sum() for h in step]
    yield equal("… the curvatures' sum by differences of the gradient", bends.sum(), sum(by_differences), NUMERICAL)
    between = stationary_point(kl, 1.5, 2)
    yield equal("between it and the mode: gradient 0", slope(kl, between), 0)
    yield equal("between it and the mode: a saddle, signs of curvature", curvature(kl, between).sign(), [-1, 1])


def negative_log_likelihood(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """−(1/n) Σ ln N(x; μ, σ²): the cross entropy of the sample with the Gaussian."""
    return -Normal(mean, std).log_prob(sample).mean()


def check_maximum_likelihood() -> Iterator[Check]:
    """Maximum likelihood: the Gaussian of least divergence from a sample has its moments"""
    random = np.random.RandomState(42)  # the generator that the figures were made with
    sample = torch.from_numpy(np.concatenate([random.normal(-1, 0.8, 500), random.normal(2, 0.5, 500)]))
    moments = torch.stack([sample.mean(), sample.std(correction=0)])

    def objective(x):
        return negative_log_likelihood(sample, x[0], x[1])

    yield equal("zero gradient at the sample's moments", slope(objective, moments), 0)
    # Of −ln N at the moments: 1/σ² along μ, 2/σ² along σ.
    yield equal("… a minimum: curvature (1, 2)/σ²", curvature(objective, moments) * moments[1] ** 2, [1, 2])
    found = minimise(lambda x: objective(torch.stack([x[0], x[1].exp()])), [0, 0])
    yield figures("the minimum found from (0, 1): μ, σ", (found[0], found[1].exp()), "0.510692 1.640887")
    smoothed = MixtureSameFamily(Categorical(torch.ones(1000)), Normal(sample, as_tensor(0.3)))
    target = on_grid(smoothed.log_prob(GRID))
    mean, std, kl = fit_gaussian(kl_to(target), 0, 2)
    yield figures("KL(smoothed sample‖fit), h = .3: σ", std, "1.668086")
    yield equal("… σ² = the sample's + h²", std**2, moments[1] ** 2 + 0.3**2, NUMERICAL)
    yield equal("… μ = the sample's", mean, moments[0], NUMERICAL)
    differential_entropy = entropy(target) + (GRID[1] - GRID[0]).log()
    yield equal(
        "… KL = ½ ln 2πeσ² − H", kl, math.log(2 * math.pi * math.e * std**2) / 2 - differential_entropy, NUMERICAL
    )
