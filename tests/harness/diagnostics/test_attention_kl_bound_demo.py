"""The demonstration of the KL bound: its known figures, without a checkpoint."""

import json
import sys

import numpy as np
import pytest

from harness.diagnostics.attention_kl_bound_demo import draw_demo, float64, random_cases
from harness.errors import run_cli
from scripts import attention_kl_bound
from tests.helpers import covered


def test_the_demonstration_needs_no_checkpoint(tmp_path, monkeypatch, capsys):
    """The known figures, and tightness down to τ = 1e-8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attention_kl_bound.py", "--demo"])
    assert not run_cli(attention_kl_bound.main)
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in ("0.00128341443", "0.467833617", "0.326989004", "0.999989976"))
    found = json.loads((tmp_path / "out" / "attention_kl_bound" / "attention_kl_bound.json").read_text())
    assert found["rows"][1] == pytest.approx(
        {
            "tau": 0.5,
            "kl_reverse": 0.034843166,
            "kl_forward": 0.033172060,
            "quadratic": 0.031261169,
            "bound_reverse": 0.008808601,
            "tightness_reverse": 0.406648,
            "tightness_forward": 0.433869,
        },
        abs=5e-7,
    )
    assert len(found["random_cases"]) == 100
    assert found["summary"]["random_cases_forward_max"] == pytest.approx(0.995373899, abs=1e-9)
    coin = {row["tau"]: row for row in found["bernoulli"]}
    assert coin[0.3]["tightness_reverse"] == pytest.approx(0.990386945, abs=1e-9)
    assert coin[1e-8]["tightness_reverse"] == pytest.approx(1, abs=20 * np.finfo(float).eps)
    assert (tmp_path / "out" / "attention_kl_bound" / "attention_kl_bound.png").stat().st_size > 0


def test_no_legend_of_its_picture_lies_on_a_title_or_a_curve():
    share = (3 + 3**0.5) / 6
    two_keys = float64(share, 1 - share), float64(0, 1)
    assert not covered(draw_demo(two_keys, two_keys, random_cases()))
