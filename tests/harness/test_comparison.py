"""The picture of several checkpoints: which values it shows, and a panel for each that differs."""

from dataclasses import replace

import pytest

from harness.comparison import draw, headlines, without_losses_of_few_windows
from harness.diagnostics.weight_kurtosis import DIAGNOSTIC


def test_a_diagnostics_own_headlines_or_its_first_four():
    values = ["step", *(f"plain/{n}" for n in range(6)), "chosen/a", "chosen/b"]
    diagnostics = [
        replace(DIAGNOSTIC, name="plain", headlines={}),
        replace(DIAGNOSTIC, name="chosen", headlines={"b": "nats; lower is better"}),
    ]
    own = {f"plain/{n}": "" for n in range(4)} | {"chosen/b": "nats; lower is better"}
    assert headlines(values, diagnostics) == own


@pytest.mark.parametrize("count", [2, 12])  # more than there are styles
def test_a_panel_a_value_that_differs_and_a_marker_a_checkpoint(count):
    rows = [{"checkpoint": f"run{i}", "x/same": 1.0, "x/other": float(i), "x/gone": None} for i in range(count)]
    rows[0]["x/gone"] = 2.0
    names = {row["checkpoint"]: [row["checkpoint"]] for row in rows}
    figure = draw(rows, {"x/same": "", "x/other": "nats; lower is better", "x/gone": ""}, names)
    shown = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.axison}
    assert set(shown) == {"other", "gone"}
    panel = shown["other"]
    assert [line.get_xdata()[0] for line in panel.lines] == list(range(count))
    assert [float(text.get_text()) for text in panel.texts] == list(range(count))
    assert panel.get_xlim()[0] == 0
    assert "lower is better" in panel.get_xlabel()
    named = next(panel for panel in figure.axes if panel.get_yticklabels()[0].get_text())
    assert [label.get_text() for label in named.get_yticklabels()] == list(names)


def test_seeds_are_one_line_with_their_mean_and_from_the_least_to_the_largest():
    rows = [{"checkpoint": name, "x/a": value} for name, value in (("a1", -1.0), ("a2", 3.0), ("b", 7.0), ("a3", 4.0))]
    panel, *_ = draw(rows, {"x/a": ""}, {"a, 3 seeds": ["a1", "a2", "a3"], "b": ["b"]}).axes
    assert [line.get_xdata()[0] for line in panel.lines] == [2, 7]
    (band,) = panel.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (-1, 4)
    assert [text.get_text() for text in panel.texts] == ["2.000 (−1.000 to 4.000)", "7.000"]
    assert panel.get_xlim()[0] < -1


def test_beside_perplexity_the_losses_of_few_windows_are_left_out():
    values = ["step", "perplexity/loss", "perplexity/perplexity", "a/loss", "a/perplexity", "a/perplexity_rise W8"]
    assert without_losses_of_few_windows(values) == [*values[:3], values[-1]]
    assert without_losses_of_few_windows(values[3:]) == values[3:]
