"""Closed forms, each against a sum or an integral and torch's: Gaussians and a VAE's term (section 5), others (17)."""

import math
from collections.abc import Iterator

import torch
from scipy import stats
from torch import Tensor, distributions
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal, Poisson

from measure.divergence import kl_divergence
from measure.theory.checks import NUMERICAL, Check, as_tensor, equal, figures
from measure.theory.tools import bernoulli, dirichlet, gaussian, kl_by_quadrature, on_grid


def gaussian_kl(mean_p, std_p, mean_q, std_q) -> Tensor:
    """KL(N(μ₁,σ₁²)‖N(μ₂,σ₂²)) = ln(σ₂/σ₁) + (σ₁² + (μ₁ − μ₂)²)/(2σ₂²) − ½; numbers or tensors, elementwise."""
    mean_p, std_p, mean_q, std_q = map(as_tensor, (mean_p, std_p, mean_q, std_q))
    return (std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5


def vae_kl(mean, variance) -> Tensor:
    """KL(N(μ,σ²)‖N(0,1)) = ½(μ² + σ² − 1 − ln σ²): what a VAE's code costs (Kingma & Welling 2014)."""
    mean, variance = as_tensor(mean), as_tensor(variance)
    return (mean**2 + variance - 1 - variance.log()) / 2


GAUSSIAN_PAIRS = ((1, 1, 0, 1), (0, 2, 0, 1), (2, 0.5, 1, 1.5))
"""(μ₁, σ₁, μ₂, σ₂)"""


def check_gaussians() -> Iterator[Check]:
    """Gaussians: one closed form, whichever way it is computed; the VAE's term"""
    parameters = as_tensor(GAUSSIAN_PAIRS)
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
    mean, std = as_tensor([1, 2, 0.5]), as_tensor([1, 0.5, 1.5])
    terms = vae_kl(mean, std**2)
    yield figures("VAE term of (μ,σ) = (1,1), (2,.5), (.5,1.5)", terms, "0.500000 2.318147 0.344535")
    yield equal("VAE term = KL to N(0,1)", terms, gaussian_kl(mean, std, 0, 1))
    p = MultivariateNormal(mean, scale_tril=std.diag())
    q = MultivariateNormal(torch.zeros_like(mean), torch.eye(3, dtype=torch.float64))
    yield equal("diagonal Gaussian in 3 dimensions = sum", terms.sum(), distributions.kl_divergence(p, q))


def bernoulli_kl(theta, phi) -> Tensor:
    """θ ln(θ/φ) + (1 − θ) ln((1 − θ)/(1 − φ)), (…)."""
    theta, phi = as_tensor(theta), as_tensor(phi)
    return theta * (theta / phi).log() + (1 - theta) * ((1 - theta) / (1 - phi)).log()


def poisson_kl(rate_p, rate_q) -> Tensor:
    """λ₁ ln(λ₁/λ₂) − λ₁ + λ₂, (…)."""
    rate_p, rate_q = as_tensor(rate_p), as_tensor(rate_q)
    return rate_p * (rate_p / rate_q).log() - rate_p + rate_q


def check_closed_forms() -> Iterator[Check]:
    """Closed forms: Bernoulli, Gaussian, Poisson, categorical, VAE, each against the sum or integral and torch's"""
    torch_kl = distributions.kl_divergence
    closed = bernoulli_kl(0.7, 0.4)
    yield figures("Bern(.7‖.4)", closed, "0.183787")
    yield equal("Bernoulli: closed form = sum", closed, kl_divergence(bernoulli(0.7), bernoulli(0.4)))
    yield equal("Bernoulli: = torch", closed, torch_kl(Bernoulli(as_tensor(0.7)), Bernoulli(as_tensor(0.4))))
    closed = gaussian_kl(2, 1.5, 0, 1)
    yield figures("N(2,1.5²)‖N(0,1)", closed, "2.219535")
    on_cells = kl_divergence(gaussian(as_tensor(2), as_tensor(1.5)), gaussian(as_tensor(0), as_tensor(1)))
    yield equal("Gaussian: closed form = sum over a grid", closed, on_cells)
    yield equal(
        "Gaussian: = torch", closed, torch_kl(Normal(as_tensor(2), as_tensor(1.5)), Normal(as_tensor(0), as_tensor(1)))
    )
    closed, counts = poisson_kl(3, 2), torch.arange(100.0, dtype=torch.float64)
    p, q = Poisson(as_tensor(3)), Poisson(as_tensor(2))
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
    on_cells = kl_divergence(gaussian(as_tensor(1.5), as_tensor(math.sqrt(2))), gaussian(as_tensor(0), as_tensor(1)))
    yield equal("VAE: closed form = sum over a grid", closed, on_cells)
    code = Normal(as_tensor(1.5), as_tensor(math.sqrt(2)))
    yield equal("VAE: = torch", closed, torch_kl(code, Normal(as_tensor(0), as_tensor(1))))
