"""scripts/kl_theory.py: a line a check, pictures, and exit status 1 where one fails."""

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from harness.errors import run_cli
from measure import divergence, theory
from measure.theory import (
    closed_forms,
    f_divergences,
    fits,
    geometry,
    information,
    language_models,
    latent,
    tools,
)
from measure.theory.checks import equal, figures
from scripts import kl_theory as script

# What is under test: every function that computes something, the divergences included; not what builds the checks.
MODULES = (tools, information, fits, closed_forms, f_divergences, geometry, language_models, latent)


def replace(patch: pytest.MonkeyPatch, name: str, f: Callable) -> None:
    """`f` in place of the function of that name, wherever a section calls it."""
    for module in MODULES:
        if hasattr(module, name):
            patch.setattr(module, name, f)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[int, str, Path]:
    """One run of the script: exit status, what it printed, its folder."""
    out = tmp_path_factory.mktemp("kl_theory")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run_cli(lambda: script.main(["--out", str(out)]))
    return status, printed.getvalue(), out


@pytest.mark.slow
def test_one_run_prints_a_line_a_check_and_leaves_json_and_pictures(whole_run):
    status, printed, out = whole_run
    entry = json.loads((out / "kl_theory.json").read_text())
    lines = re.findall(r"^(PASS|FAIL)  §(\d+) .*  found \S.*  due \S", printed, re.MULTILINE)
    assert status == 0
    assert lines == [("PASS", str(row["section"])) for row in entry["rows"]]
    assert entry["script"] == "kl_theory"
    assert entry["summary"] == {"checks": len(lines), "passed": len(lines), "failed": 0}
    assert len(lines) >= 40
    assert {row["section"] for row in entry["rows"]} == set(range(1, 18))
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
