"""The picture of several checkpoints: which values it shows, and a panel for each that differs."""

from dataclasses import replace

import pytest

from harness.comparison import draw, headlines
from harness.diagnostics.weight_kurtosis import DIAGNOSTIC


def test_a_diagnostics_own_headlines_or_its_first_four():
    values = ["step", *(f"plain/{n}" for n in range(6)), "chosen/a", "chosen/b"]
    diagnostics = [
        replace(DIAGNOSTIC, name="plain", headlines=()),
        replace(DIAGNOSTIC, name="chosen", headlines=("b",)),
    ]
    assert headlines(values, diagnostics) == ["plain/0", "plain/1", "plain/2", "plain/3", "chosen/b"]


@pytest.mark.parametrize("count", [2, 12])  # more than there are styles
def test_a_panel_a_value_that_differs_and_a_marker_a_checkpoint(count):
    rows = [{"checkpoint": f"run{i}", "x/same": 1.0, "x/other": float(i), "x/gone": None} for i in range(count)]
    rows[0]["x/gone"] = 2.0
    figure = draw(rows, ["x/same", "x/other", "x/gone"])
    shown = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.axison}
    assert set(shown) == {"other", "gone"}
    assert [line.get_xdata()[0] for line in shown["other"].lines] == list(range(count))
