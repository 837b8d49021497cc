"""What the checks work with: distributions as log-probabilities, a grid for densities, derivatives and optimisers.

A density stands for itself as the probabilities of the cells of a fine grid: one `kl_divergence` serves them all.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import integrate, optimize
from torch import Tensor
from torch.distributions import Normal

from measure.theory.checks import as_tensor

LN_2 = math.log(2)

GRID = torch.linspace(-40, 40, 1601, dtype=torch.float64)
"""Points 0.05 apart. The sum over them of a Gaussian of deviation σ is its integral up to exp(−2π²σ²/0.05²): exact."""


def categorical(*probabilities: float) -> Tensor:
    """Log-probabilities (n,)."""
    return as_tensor(probabilities).log()


def bernoulli(theta) -> Tensor:
    """Log-probabilities (…, 2) of 1 and of 0, for θ (…) the probability of 1."""
    theta = as_tensor(theta)
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
    x = as_tensor(x).clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def expectation(log_density: Callable, function: Callable) -> Tensor:
    """∫ p(x) f(x) dx from ln p and f of numpy arrays, by Gauss-Legendre quadrature with 600 nodes from −40 to 40."""
    integral, _ = integrate.fixed_quad(lambda x: np.exp(log_density(x)) * function(x), -40, 40, n=600)
    return as_tensor(integral)


def kl_by_quadrature(log_p: Callable, log_q: Callable) -> Tensor:
    """∫ p (ln p − ln q) dx of two log-densities of numpy arrays."""
    return expectation(log_p, lambda x: log_p(x) - log_q(x))


def gaussian(mean: Tensor, std: Tensor) -> Tensor:
    """Log-probabilities on GRID; of many, with a last dimension of 1 for it."""
    return on_grid(Normal(mean, std).log_prob(GRID))


def curvature(function: Callable[[Tensor], Tensor], x) -> Tensor:
    """The eigenvalues of the Hessian of a scalar function at x (n,), in rising order: all > 0 at a minimum."""
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, as_tensor(x)))
