"""Every statement holds, and every check notices when a function under it is off by a little."""

import contextlib
import inspect
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from harness.errors import run_cli
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
from scripts import kl_theory as script

NUMBERS = range(1, 18)

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


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[int, str, Path]:
    """One run of the script: exit status, what it printed, its folder."""
    out = tmp_path_factory.mktemp("kl_theory")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run_cli(lambda: script.main(["--out", str(out)]))
    return status, printed.getvalue(), out


def test_one_run_prints_a_line_a_check_and_leaves_json_and_pictures(whole_run):
    status, printed, out = whole_run
    entry = json.loads((out / "kl_theory.json").read_text())
    lines = re.findall(r"^(PASS|FAIL)  §(\d+) .*  found \S.*  due \S", printed, re.MULTILINE)
    assert status == 0
    assert lines == [("PASS", str(row["section"])) for row in entry["rows"]]
    assert entry["script"] == "kl_theory"
    assert entry["summary"] == {"checks": len(lines), "passed": len(lines), "failed": 0}
    assert len(lines) >= 40
    assert {row["section"] for row in entry["rows"]} == set(NUMBERS)
    names = [(row["section"], row["name"]) for row in entry["rows"]]
    assert len(set(names)) == len(names)
    assert all(math.isfinite(number) for row in entry["rows"] for number in row["found"] + row["due"])
    assert {path.stem for path in out.glob("*.png")} == set(script.PANELS)
    assert len(script.PANELS) == 10
    for path in out.glob("*.png"):
        height, width, _ = plt.imread(path).shape
        assert min(height, width) > 400


def test_a_false_statement_is_a_fail_and_exit_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(theory, "SECTIONS", theory.SECTIONS[:1])
    monkeypatch.setattr(script, "PANELS", {})
    replace(monkeypatch, "kl_divergence", lambda p, q: 1.01 * divergence.kl_divergence(p, q))
    assert run_cli(lambda: script.main(["--out", str(tmp_path)])) == 1
    assert re.search(r"^FAIL  §1 .*KL\(p‖q\) in nats.*0\.0929.*0\.0920329", capsys.readouterr().out, re.MULTILINE)
    summary = json.loads((tmp_path / "kl_theory.json").read_text())["summary"]
    assert summary["failed"] == 4  # every line with a KL in it; the two entropies stand
    assert summary["passed"] == 2


def test_an_exception_is_a_fail_and_the_next_section_goes_on(monkeypatch, tmp_path, capsys):
    def stops():
        """Stops after its first check"""
        yield equal("one is one", 1, 1)
        raise ZeroDivisionError("no\nrest")

    def never():
        """Has figures that are too few"""
        yield figures("two figures of three", [1, 2, 3], "1 2")

    def holds():
        """Holds"""
        yield equal("two is two", 2, 2)

    monkeypatch.setattr(theory, "SECTIONS", (stops, never, holds))
    monkeypatch.setattr(script, "PANELS", {})
    assert run_cli(lambda: script.main(["--out", str(tmp_path)])) == 1
    lines = re.findall(r"^(PASS|FAIL)  §(\d) +(.*?)  +(.*)", capsys.readouterr().out, re.MULTILINE)
    assert [(status, section, name) for status, section, name, _ in lines] == [
        ("PASS", "1", "one is one"),
        ("FAIL", "1", "what follows “one is one”"),
        ("FAIL", "2", "its first check"),
        ("PASS", "3", "two is two"),
    ]
    assert lines[1][3] == "stopped by ZeroDivisionError: no rest"
    assert "stopped by ValueError: zip()" in lines[2][3]
    entry = json.loads((tmp_path / "kl_theory.json").read_text())
    assert entry["summary"] == {"checks": 4, "passed": 2, "failed": 2}
    assert entry["rows"][1]["error"] == "ZeroDivisionError: no rest"


def test_a_file_in_the_way_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(theory, "SECTIONS", theory.SECTIONS[:1])
    (tmp_path / "file").write_text("")
    assert run_cli(lambda: script.main(["--out", str(tmp_path / "file")])) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


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
