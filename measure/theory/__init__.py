"""The theory of the KL divergence, verified: what the diagnostics take for granted about it, in 17 sections.

A check tests a statement: it computes both of its sides by different routes, or, where the statement comes with
figures, compares what it computed with them, to the digits given. `SECTIONS` holds the checks, each section's in a
module of its subject, after the functions that they test; `scripts/kl_theory.py` runs them and draws the pictures.
Everything is in float64 and in nats.
"""

from collections.abc import Callable, Iterator

from measure.theory.checks import Check
from measure.theory.closed_forms import check_closed_forms, check_gaussians
from measure.theory.f_divergences import check_f_divergences, check_renyi
from measure.theory.fits import check_maximum_likelihood, check_two_fits
from measure.theory.geometry import check_exponential_families, check_projection_and_bregman
from measure.theory.information import check_asymmetry, check_chain_and_processing, check_coding, check_gibbs
from measure.theory.language_models import check_distillation, check_dpo, check_rlhf
from measure.theory.latent import check_elbo, check_posterior_collapse

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
