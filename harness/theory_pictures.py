"""The pictures of measure/theory: what its sections say, drawn."""

import math
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from harness.figures import RUN_STYLES, new_figure
from measure.divergence import jensen_shannon, kl_divergence, renyi, total_variation
from measure.theory import closed_forms, f_divergences, fits, information, language_models, latent, tools
from measure.theory.language_models import STUDENT, TEACHER, hot_limit, soften
from measure.theory.tools import bernoulli


def curve(axes: Axes, x: Tensor, y: Tensor, style: int, label: str) -> None:
    """One of several curves in a panel: told apart by colour, dash and marker."""
    every = max(1, len(x) // 7)
    axes.plot(x, y, **RUN_STYLES[style], markevery=(style * every // 5, every), label=label)


def level(axes: Axes, y: float, label: str, x: float = 0.02, rise: float = 2) -> None:
    """A thin horizontal line with its name at the share `x` of the width, `rise` points above it."""
    axes.axhline(y, color="#555555", linewidth=0.9, zorder=1)
    axes.annotate(label, (x, y), (0, rise), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8)


def draw_gibbs() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    t = torch.linspace(0.05, 4, 200)
    curve(left, t, t - 1, 0, "t − 1")
    curve(left, t, t.log(), 1, "ln t")
    left.fill_between(t, t.log(), t - 1, color="#DDDDDD", label="gap, never negative", zorder=0)
    left.set(title="ln t ≤ t − 1, equal at t = 1", xlabel="t")
    left.legend()
    pairs = tools.dirichlet(42, 5, 20_000)
    kl = kl_divergence(pairs[0::2], pairs[1::2])
    right.hist(kl.numpy(), bins=60, color="#0072B2")
    mean, least = kl.mean().item(), kl.min().item()
    right.axvline(mean, color="black", linestyle="--", linewidth=1.2, label=f"mean {mean:.3f}")
    right.axvline(least, color="black", linestyle=":", linewidth=1.2, label=f"least {least:.4f}")
    right.set(title="KL ≥ 0", xlabel="KL(p‖q) of a random pair, nats", ylabel="pairs out of 10,000", yscale="log")
    right.legend()
    return figure


def draw_asymmetry() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    theta = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    p, fair = bernoulli(theta), bernoulli(torch.full_like(theta, 0.5))
    forward, reverse = kl_divergence(p, fair), kl_divergence(fair, p)
    curve(left, theta, forward, 0, "KL(θ‖½)")
    curve(left, theta, reverse, 1, "KL(½‖θ)")
    curve(left, theta, jensen_shannon(p, fair), 2, "Jensen-Shannon")
    level(left, math.log(2), "ln 2", x=0.45)
    left.set(title="Bernoulli(θ) against a fair coin", xlabel="θ", ylabel="nats", ylim=(0, 1.5))
    left.legend(loc="upper center")
    curve(right, theta, reverse - forward, 0, "KL(½‖θ) − KL(θ‖½)")
    curve(right, theta, (2 * theta - 1) ** 4 / 6, 1, "(2θ − 1)⁴/6")
    right.set(title="The asymmetry, and its least", xlabel="θ", ylabel="nats", ylim=(0, 1))
    right.legend(loc="upper center")
    return figure


def draw_two_fits() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    target = tools.on_grid(fits.MIXTURE.log_prob(tools.GRID))
    covering = fits.fit_gaussian(fits.kl_to(target), 0.5, 2)
    seeking, stuck = (fits.fit_gaussian(fits.kl_from(target), start, 1) for start in (3, 0))
    x = torch.linspace(-9, 9, 361, dtype=torch.float64)
    left.fill_between(x, fits.MIXTURE.log_prob(x).exp(), color="#CCCCCC", label="mixture", zorder=0)
    labels = "covers: least KL(mixture‖fit)", "seeks, from 3: least KL(fit‖mixture)", "the same from 0: stays there"
    for i, (label, (mean, std, _)) in enumerate(zip(labels, (covering, seeking, stuck), strict=True)):
        curve(left, x, torch.distributions.Normal(mean, std).log_prob(x).exp(), i, label)
    left.set(title="A Gaussian fitted to two", xlabel="x", ylabel="density", ylim=(0, 0.66))
    left.legend(loc="upper left", fontsize=8)
    means = torch.linspace(-4, 4, 41, dtype=torch.float64)
    stds = torch.linspace(0.6, 4.2, 37, dtype=torch.float64)
    gaussians = tools.gaussian(means[:, None], stds[:, None, None])
    kl = kl_divergence(gaussians, target.expand_as(gaussians))
    filled = right.contourf(means, stds, kl, levels=torch.linspace(0.6, 2, 15), cmap="viridis", extend="max")
    figure.colorbar(filled, label="KL(fit‖mixture), nats")
    (mean, std, _), (saddle_mean, saddle_std) = seeking, fits.stationary_point(fits.kl_from(target), 1.5, 2)
    minima = [(mean, std), (-mean, std), stuck[:2]]
    saddles = [(saddle_mean, saddle_std), (-saddle_mean, saddle_std)]
    for label, marker, points in (("minimum", "o", minima), ("saddle", "X", saddles)):
        xs, ys = zip(*points, strict=True)
        right.plot(xs, ys, marker, color="white", markersize=8, markeredgecolor="black", label=label)
    right.set(title="Why it stays: three minima", xlabel="μ", ylabel="σ")
    right.legend(loc="lower center", frameon=True)
    return figure


def draw_vae() -> Figure:
    figure, (surface, means, stds) = new_figure(1, 3)
    mean, std = torch.linspace(-3, 3, 121), torch.linspace(0.15, 3, 115)
    kl = closed_forms.vae_kl(mean, std[:, None] ** 2)
    filled = surface.contourf(mean, std, kl, levels=16, cmap="viridis")
    figure.colorbar(filled, label="KL, nats")
    surface.plot(0, 1, "o", color="white", markeredgecolor="black", markersize=7)
    surface.annotate("0 at μ = 0, σ = 1", (0, 1), (0, 8), textcoords="offset points", color="white", ha="center")
    surface.set(title="KL(N(μ,σ²)‖N(0,1))", xlabel="μ", ylabel="σ")
    for i, value in enumerate((1, 0.5, 0.2)):
        curve(means, mean, closed_forms.vae_kl(mean, value**2), i, f"σ = {value}")
    means.set(title="Slices along μ", xlabel="μ", ylabel="KL, nats", ylim=(0, 7.5))
    means.legend(loc="upper center")
    for i, value in enumerate((0, 1, 2)):
        curve(stds, std, closed_forms.vae_kl(value, std**2), i, f"μ = {value}")
    stds.set(title="Slices along σ", xlabel="σ", ylabel="KL, nats", ylim=(0, 7.5))
    stds.legend(loc="upper center")
    return figure


def draw_f_divergences() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    theta = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    p, fair = bernoulli(theta), bernoulli(torch.full_like(theta, 0.5))
    for i, (name, f) in enumerate(f_divergences.F_FAMILY.items()):
        curve(left, theta, f_divergences.f_divergence(f, p, fair), i, name)
    left.set(
        title="One family: Σ q f(p/q), θ against ½", xlabel="θ", ylabel="divergence (KL, J.-S. in nats)", ylim=(0, 1.6)
    )
    left.legend(ncols=2, loc="upper center", fontsize=8)
    curve(right, theta, kl_divergence(p, fair) / 2, 0, "½ KL")
    curve(right, theta, total_variation(p, fair) ** 2, 1, "TV²")
    curve(right, theta, kl_divergence(p, fair) / 2 - total_variation(p, fair) ** 2, 2, "gap")
    right.set(title="Pinsker: TV² ≤ ½ KL", xlabel="θ", ylabel="½ KL in nats, TV²", ylim=(0, None))
    right.legend(loc="upper center")
    return figure


def draw_rlhf() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    task = language_models.REFERENCE_POLICY, language_models.REWARDS
    beta = torch.logspace(-1.5, 1.5, 200, dtype=torch.float64)
    reward, kl = language_models.reward_and_kl(language_models.optimal_policy(*task, beta), *task)
    curve(left, beta, reward, 0, "reward E[r]")
    curve(left, beta, reward - beta * kl, 1, "value E[r] − βKL = β ln Z")
    curve(left, beta, kl, 2, "KL(π*‖π_ref), nats")
    left.set(title="The best policy at a price β", xlabel="β, reward a nat", ylabel="reward, or nats", xscale="log")
    left.set_ylim(top=4.1)
    left.legend(fontsize=8)
    right.plot(kl, reward, color="#0072B2")
    for value, style in ((1, RUN_STYLES[1]), (0.5, RUN_STYLES[2])):
        at_reward, at_kl = language_models.reward_and_kl(language_models.optimal_policy(*task, value), *task)
        right.plot(at_kl, at_reward, **style | {"linestyle": ""}, markersize=8, label=f"β = {value}: slope {value}")
        tangent = torch.tensor([at_kl - 0.25, at_kl + 0.25])
        right.plot(tangent, at_reward + value * (tangent - at_kl), color="black", linewidth=1, linestyle=":")
    right.axvline(-math.log(0.12), color="#555555", linewidth=0.9)
    right.annotate("−ln .12", (-math.log(0.12), 1.3), (-4, 0), textcoords="offset points", ha="right", fontsize=8)
    right.set(title="The frontier", xlabel="KL(π*‖π_ref), nats", ylabel="reward E[r]")
    right.legend(loc="lower center")
    return figure


def draw_distillation() -> Figure:
    figure, (labels, entropies, kls) = new_figure(1, 3)
    tau = torch.logspace(-0.5, 2, 200, dtype=torch.float64)
    teacher, student = soften(TEACHER, tau), soften(STUDENT, tau)
    for i, probability in enumerate(teacher.exp().T):
        curve(labels, tau, probability, i, f"z = {TEACHER[i]:g}".replace("-", "−"))
    labels.set(title="Soft labels of the teacher", xlabel="temperature τ", ylabel="probability", xscale="log")
    labels.legend(fontsize=8)
    curve(entropies, tau, information.entropy(teacher), 0, "teacher")
    level(entropies, math.log(5), "ln 5, the uniform distribution's")
    entropies.set(title="Their entropy", xlabel="temperature τ", ylabel="nats", xscale="log", ylim=(0, 1.8))
    curve(kls, tau, tau**2 * kl_divergence(teacher, student), 0, "τ² KL(teacher‖student)")
    curve(kls, tau, tau**2 * kl_divergence(student, teacher), 1, "τ² KL(student‖teacher)")
    level(kls, hot_limit(TEACHER, STUDENT).item(), "½ Var(z_T − z_S)", x=0.6, rise=-10)
    kls.set(title="What the student is asked for", xlabel="temperature τ", ylabel="nats", xscale="log", ylim=(0, None))
    kls.legend(loc="lower right")
    return figure


def draw_elbo() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    alpha = torch.linspace(0, 1.6, 161, dtype=torch.float64)
    reconstruction, kl = latent.elbo_parts(alpha)
    curve(left, alpha, reconstruction, 0, "reconstruction E[ln p(x|z)]")
    curve(left, alpha, -kl, 1, "−KL(q‖prior)")
    curve(left, alpha, reconstruction - kl, 2, "ELBO, their sum")
    level(left, latent.log_evidence().item(), "ln p(x)")
    left.set(title="The ELBO's parts", xlabel="α of the encoder N(αx, ½)", ylabel="nats", ylim=(-10, 0))
    left.legend(loc="lower center", fontsize=8)
    curve(right, alpha, latent.log_evidence() - (reconstruction - kl), 0, "ln p(x) − ELBO")
    curve(right, alpha, latent.elbo_gap(alpha), 1, "KL(q‖posterior)")
    best = latent.elbo_gap(0.8)
    right.annotate("α = .8, the best", (0.8, best), (0, 22), textcoords="offset points", ha="center", fontsize=8)
    right.set(title="Its gap is a KL", xlabel="α", ylabel="nats", ylim=(0, 7))
    right.legend(loc="upper center")
    return figure


def draw_renyi() -> Figure:
    figure, (axes,) = new_figure()
    orders = torch.linspace(0.01, 6, 61, dtype=torch.float64)
    for i, theta in enumerate((0.95, 0.8, 0.6)):
        p, q = bernoulli(theta), bernoulli(0.5)
        curve(axes, orders, torch.stack([renyi(p, q, order) for order in orders.tolist()]), i, f"θ = {theta}")
        axes.plot(1, kl_divergence(p, q), "*", color="black", markersize=11, label="KL, at α = 1" if i == 2 else None)
    axes.set(title="Rényi: Bernoulli(θ) against ½", xlabel="order α", ylabel="nats", ylim=(0, 0.85))
    axes.legend(ncols=2, loc="upper left", fontsize=8)
    return figure


def draw_collapse() -> Figure:
    figure, (left, right) = new_figure(1, 2)
    beta = torch.logspace(-1, 1, 200, dtype=torch.float64)
    for i, (v, variance) in enumerate(((1, 0.25), (1, 0.85), (4, 0.25))):
        curve(left, beta, latent.collapse_rate(v, variance, beta), i, f"v = {v}, σ² = {variance}")
        at = torch.logspace(-0.8, 0.8, 5, dtype=torch.float64).tolist()
        found = [latent.best_rate(v, variance, b) for b in at]
        label = "an optimiser's" if i == 2 else None
        left.plot(at, found, "o", markerfacecolor="none", markeredgecolor="black", markersize=9, label=label)
    left.set(title="What the code keeps: ½ ln(v/βσ²), or 0", xlabel="β", ylabel="KL, nats", xscale="log")
    left.legend(fontsize=8)
    steps = torch.arange(100)
    curve(right, steps, latent.descend(latent.ANNEALED, 1, 0.85), 0, "β from 0, 1 at step 50")
    curve(right, steps, latent.descend(torch.ones(100), 1, 0.85), 1, "β = 1 from the start")
    level(right, latent.collapse_rate(1, 0.85, 1).item(), "½ ln(v/σ²)")
    right.set(title="Annealing β: v = 1, σ² = .85", xlabel="step of gradient descent", ylabel="KL, nats")
    right.legend(loc="center right", fontsize=8, handlelength=2.5)
    return figure


PANELS: dict[str, Callable[[], Figure]] = {
    "gibbs": draw_gibbs,
    "asymmetry": draw_asymmetry,
    "two_fits": draw_two_fits,
    "vae": draw_vae,
    "f_divergences": draw_f_divergences,
    "rlhf": draw_rlhf,
    "distillation": draw_distillation,
    "elbo": draw_elbo,
    "renyi": draw_renyi,
    "collapse": draw_collapse,
}
