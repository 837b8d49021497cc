"""The demonstration of the aggregates: its known figures, without a checkpoint."""

import json
import sys

import pytest

from harness.diagnostics import compare_kl_demo
from harness.diagnostics.compare_kl_demo import demo_logits, draw_demo
from harness.errors import run_cli
from measure.predictions import DIVERGENCES, aggregates, divergences
from scripts import compare_kl
from tests.helpers import covered


def test_the_demonstration_shows_that_the_mean_is_blind(tmp_path, monkeypatch, capsys):
    """The known figures, as a user gets it."""
    monkeypatch.chdir(tmp_path)
    compare_kl_demo.demo(["--demo"])
    shown = capsys.readouterr().out
    assert "loop: at τ = 0.5, on KL(other‖reference), the mean does not fire, while the rmse, p95 and max do" in shown
    assert "coherent: at τ = 0.5, on KL(other‖reference), no aggregate fires" in shown
    found = json.loads((tmp_path / "out" / "compare_kl" / "compare_kl.json").read_text())
    table = {
        (row["divergence"], row["student"]): [row[h] for h in ("mean", "rmse", "p95", "max")] for row in found["rows"]
    }
    for key, figures in {
        ("kl_reverse", "coherent"): (0.018414, 0.026453, 0.049048, 0.094606),
        ("kl_reverse", "loop"): (0.378732, 1.527331, 3.777035, 8.081302),
        ("jensen_shannon", "coherent"): (0.003376, 0.004899, 0.009035, 0.017815),
        ("jensen_shannon", "loop"): (0.044680, 0.173137, 0.637763, 0.691742),
    }.items():
        assert table[key] == pytest.approx(figures, abs=5.1e-7)
    assert table["kl_reverse", "loop / coherent"] == pytest.approx((20.57, 57.74, 77.01, 85.42), abs=5.1e-3)
    loop = [row["loop"] for row in found["by_position"]]
    assert loop[12:16] == pytest.approx((3.729396, 6.231040, 4.682172, 8.081302), abs=5.1e-7)
    assert not any(loop[:12] + loop[16:])
    assert (tmp_path / "out" / "compare_kl" / "compare_kl.png").stat().st_size > 0


def test_no_legend_of_its_picture_lies_on_a_title_or_a_curve():
    teacher, students = demo_logits()
    values = {name: divergences(teacher, logits, order=0.5)[0] for name, logits in students.items()}
    reverse = {name: found[list(DIVERGENCES).index("kl_reverse")] for name, found in values.items()}
    assert not covered(draw_demo(reverse, {name: aggregates(found) for name, found in values.items()}, 0.5))


def test_a_bad_tau_of_the_demonstration_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_kl.py", "--tau", "-1", "--demo"])
    assert run_cli(compare_kl.main) == 2
    assert capsys.readouterr().err == "error: --tau -1: at least 0 and finite\n"
    assert not list(tmp_path.iterdir())
