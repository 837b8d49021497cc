"""KL where a latent variable is learned: the ELBO (section 11), and posterior collapse (15)."""

import math
from collections.abc import Callable, Iterator

import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from measure.theory.checks import NUMERICAL, Check, as_tensor, at_most, equal, figures
from measure.theory.closed_forms import gaussian_kl, vae_kl
from measure.theory.tools import curvature, expectation, minimise, slope

OBSERVED, DECODER_VARIANCE, ENCODER_VARIANCE = 2.0, 0.25, 0.5
"""x; the decoder is N(z, ¼), the encoder N(αx, ½), the prior N(0, 1)"""


def elbo_parts(alpha) -> tuple[Tensor, Tensor]:
    """E_{q(z|x)}[ln p(x|z)] and KL(q(z|x)‖p(z)) for the encoder's slope α (…); the ELBO is their difference."""
    mean = as_tensor(alpha) * OBSERVED
    square_error = (OBSERVED - mean) ** 2 + ENCODER_VARIANCE
    reconstruction = -square_error / (2 * DECODER_VARIANCE) - math.log(2 * math.pi * DECODER_VARIANCE) / 2
    return reconstruction, vae_kl(mean, ENCODER_VARIANCE)


def log_evidence() -> Tensor:
    """ln p(x): integrated over z, x is N(0, 1 + v) with v the decoder's variance."""
    return Normal(as_tensor(0), as_tensor(math.sqrt(1 + DECODER_VARIANCE))).log_prob(as_tensor(OBSERVED))


def elbo_gap(alpha) -> Tensor:
    """KL(q(z|x)‖p(z|x)), (…); the posterior is N(x/(1 + v), v/(1 + v)) with v the decoder's variance."""
    posterior_mean, posterior_variance = OBSERVED / (1 + DECODER_VARIANCE), DECODER_VARIANCE / (1 + DECODER_VARIANCE)
    std = math.sqrt(ENCODER_VARIANCE), math.sqrt(posterior_variance)
    return gaussian_kl(as_tensor(alpha) * OBSERVED, std[0], posterior_mean, std[1])


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


def beta_vae(x: Tensor, data_variance: float, decoder_variance: float) -> tuple[Tensor, Tensor]:
    """A linear VAE, encoder N(ax, s²), decoder N(wz, σ²), data of variance v: its expected distortion
    E[(x − wz)²]/(2σ²) and rate E[KL(q(z|x)‖p(z))], for x = (a, w, ln s²). (Lucas et al. 2019.)"""
    slope_in, slope_out, log_variance = x
    noise = log_variance.exp()
    distortion = (1 - slope_in * slope_out) ** 2 * data_variance + slope_out**2 * noise
    return distortion / (2 * decoder_variance), vae_kl(slope_in * math.sqrt(data_variance), noise)


def collapse_rate(data_variance, decoder_variance, beta) -> Tensor:
    """The rate at the optimum of `distortion + β rate`: max(0, ½ ln(v/(βσ²))), elementwise."""
    return (as_tensor(data_variance) / (as_tensor(beta) * decoder_variance)).log().div(2).clamp(min=0)


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
    x, rates = as_tensor([1e-6, 1e-6, 0]), []
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
    eigenvalues = [(beta + 4) / 2 - math.hypot((beta - 4) / 2, 4) for beta in (1, 3.99, 4.01)]
    yield equal("… its least curvature in closed form", least, eigenvalues)
    # Below βσ² = v the collapsed point is a saddle, which gradient descent leaves the more slowly the larger β is:
    # within 100 steps it finds the other branch if β comes up from 0, and not yet if β is 1 from the start.
    kept = collapse_rate(1, 0.85, 1)
    yield equal("β annealed from 0 to 1: KL over ½ ln(v/σ²)", descend(ANNEALED, 1, 0.85)[-1] / kept, 1, 0.005)
    yield at_most("β = 1 from the start: KL over ½ ln(v/σ²)", descend(torch.ones(100), 1, 0.85)[-1] / kept, 0.001)
