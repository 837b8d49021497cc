"""Every statement holds, and every check notices when a function under it is off by a little."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from measure import divergence, theory
from measure.theory import (
    checks,
    closed_forms,
    f_divergences,
    fits,
    geometry,
    information,
    language_models,
    latent,
    tools,
)
from measure.theory.checks import at_least, at_most, equal, figures

NUMBERS = [pytest.param(n, marks=pytest.mark.slow) if n == 15 else n for n in range(1, 18)]

# What is under test: every function that computes something, the divergences included; not what builds the checks.
MODULES = (tools, information, fits, closed_forms, f_divergences, geometry, language_models, latent)
FUNCTIONS = {
    name: f
    for module in MODULES
    for name, f in vars(module).items()
    if inspect.isfunction(f) and f.__module__ != checks.__name__ and f not in theory.SECTIONS
    if f.__module__.startswith("measure.")
}


def replace(patch: pytest.MonkeyPatch, name: str, f: Callable) -> None:
    """`f` in place of the function of that name, wherever a section calls it."""
    for module in MODULES:
        if hasattr(module, name):
            patch.setattr(module, name, f)


SMALL = (lambda x: 1.01 * x, lambda x: x + 1e-3)
# What a check of an order or of a sign needs to notice; a ripple makes what is monotone no longer so.
OTHERS = (lambda x: x + 1e-3, lambda x: -x, lambda x: x + 0.01 * torch.sin(1000 * x))


def changed(value, how: Callable[[Tensor], Tensor]):
    """What a function returns, changed a little; log-probabilities stay such: 1 % goes to the uniform distribution."""
    if callable(value):
        return perturbed(value, how)
    if isinstance(value, tuple | list):
        return type(value)(changed(v, how) for v in value)
    if isinstance(value, Tensor) and value.dim() and (value.detach().logsumexp(-1).abs() < 1e-9).all():
        return (0.99 * value.exp() + 0.01 / value.size(-1)).log()
    if isinstance(value, Tensor):
        return how(value)
    return how(torch.as_tensor(value, dtype=torch.float64)).numpy()[()]


def perturbed(f: Callable, how: Callable[[Tensor], Tensor]) -> Callable:
    return lambda *args, **kwargs: changed(f(*args, **kwargs), how)


def skewed(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A divergence that is no longer symmetric: 1 % of its first argument moved."""
    return lambda log_p, log_q: f(changed(log_p, how=None), log_q)


def broken(section: int, monkeypatch, name: str, f: Callable) -> set[str]:
    """The checks of a section that do not pass with `f` in place of the function of that name."""
    with monkeypatch.context() as patch:
        replace(patch, name, f)
        try:
            return {check.name for check in theory.SECTIONS[section - 1]() if not check.passed}
        except (ValueError, RuntimeError) as refusal:  # what a perturbed function returns, the next one may refuse
            return {str(refusal)}


@pytest.mark.parametrize("section", NUMBERS)
def test_every_check_notices_and_no_function_goes_unnoticed(section, monkeypatch):
    called = set()

    def recorded(name: str) -> Callable:
        return lambda *args, **kwargs: called.add(name) or FUNCTIONS[name](*args, **kwargs)

    with monkeypatch.context() as patch:
        for name in FUNCTIONS:
            replace(patch, name, recorded(name))
        unmoved = {check.name for check in theory.SECTIONS[section - 1]()}

    for name in sorted(called - {"dirichlet"}):  # it draws cases, and where no figure depends on them any will do
        for how in SMALL:
            if fails := broken(section, monkeypatch, name, perturbed(FUNCTIONS[name], how)):
                break
        assert fails, f"no check notices {name}"
        unmoved -= fails
    for how in OTHERS:
        for name in sorted(called):
            if unmoved:
                unmoved -= broken(section, monkeypatch, name, perturbed(FUNCTIONS[name], how))
    if unmoved and "jensen_shannon" in called:
        unmoved -= broken(section, monkeypatch, "jensen_shannon", skewed(divergence.jensen_shannon))
    assert not unmoved, "checks that nothing breaks"


@pytest.mark.parametrize("name", f_divergences.F_FAMILY)
def test_each_f_and_each_definition_is_under_a_check(name, monkeypatch):
    def fails() -> set[str]:
        return {check.name for check in f_divergences.check_f_divergences() if not check.passed}

    with monkeypatch.context() as patch:
        patch.setitem(f_divergences.F_FAMILY, name, perturbed(f_divergences.F_FAMILY[name], lambda x: 1.01 * x))
        assert fails() == {f"{name} from its f, θ = 0.101 against ½", f"… = {name} by its definition, 1,000 pairs"}
    monkeypatch.setitem(f_divergences.DIRECT, name, perturbed(f_divergences.DIRECT[name], lambda x: 1.01 * x))
    assert fails() == {f"… = {name} by its definition, 1,000 pairs"}


@pytest.mark.parametrize("name", geometry.FAMILIES)
@pytest.mark.parametrize("part", ["natural", "log_partition"])
def test_each_exponential_family_is_under_a_check(name, part, monkeypatch):
    family = geometry.FAMILIES[name]
    wrong = family._replace(**{part: perturbed(getattr(family, part), lambda x: 1.01 * x)})
    monkeypatch.setitem(geometry.FAMILIES, name, wrong)
    fails = {check.name for check in geometry.check_exponential_families() if not check.passed}
    assert len(fails) == 2
    assert all(fail.startswith((name, "…")) for fail in fails)


def test_figures_are_compared_to_the_digits_shown():
    assert figures("", 0.12345, "0.123").passed
    assert figures("", [1, 2.0004], "1 2.000").passed
    assert not figures("", 0.1252, "0.123").passed
    assert not figures("", [1.5, 2.0], "0 2.000").passed
    assert not figures("", math.nan, "0.123").passed
    assert figures("", 0.1269, "0.123", units=4).passed
    with pytest.raises(ValueError, match="shorter"):
        _ = figures("", [1, 2, 3], "1 2").passed


def test_equalities_and_inequalities_show_the_worst_case():
    found = torch.tensor([1.0, 2.5, 3.0])
    check = equal("", found, [1, 2, 3])
    assert (check.found, check.due, check.passed) == ([2.5], [2], False)
    assert equal("", found, found).passed
    assert not equal("", torch.tensor([1, math.nan]), 1).passed
    assert not equal("", math.nan, math.nan).passed
    assert at_least("", found, 1).passed
    assert at_least("", found, 1.1).found == [1]
    assert not at_least("", found, 1.1).passed
    assert at_most("", found, 3).passed
    assert at_most("", found, 2.9).found == [3]
    assert not at_most("", found, 2.9).passed
    assert not at_least("", torch.tensor([1, math.nan]), 0).passed
    assert not at_most("", torch.tensor([1, math.nan]), 2).passed
