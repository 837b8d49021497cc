"""Figures are written whole, tables are aligned, runs are told apart."""

import math
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.figures import (
    RUN_STYLES,
    draw_heads,
    duration,
    new_figure,
    print_table,
    save_figure,
    scale_tails,
    share_scales,
)


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    old = tmp_path / "curves.png"
    old.write_bytes(b"old")
    figure, _ = new_figure()

    def full_disk(path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError):
        save_figure(figure, old)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert old.read_bytes() == b"old"


def test_unknown_picture_type_raises():
    with pytest.raises(UserError, match=r"\.docx"):
        save_figure(new_figure()[0], "curves.docx")


@pytest.mark.parametrize("other", ["linestyle", "marker"])
def test_run_styles_all_differ(other):
    assert len({(style["color"], style[other]) for style in RUN_STYLES}) == len(RUN_STYLES)


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([30.0, 33.0, 36.0], "linear", 3),  # a residual stream without outliers
        ([-1.0, 0.5, 78.0], "symlog", 5),
        ([30.0, 3000.0], "symlog", 4),
        ([math.nan, 2.0], "linear", 3),
        ([math.nan], "linear", 2),
        ([], "linear", 2),
    ],
)
def test_an_axis_for_tails_is_bent_only_where_it_must_be_and_has_ticks_all_along(values, scale, ticks):
    figure, (panel,) = new_figure()
    panel.plot(range(len(values)), values)
    scale_tails(panel)
    figure.canvas.draw()
    low, high = panel.get_ylim()
    seen = [tick for tick in panel.get_yticks() if low <= tick <= high]
    assert panel.get_yscale() == scale
    assert len(seen) >= ticks
    assert 0 in seen


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 4), (2, 1), (3, 3)])
def test_layers_and_heads_have_ticks_at_integers_alone(layers, heads):
    figure, (panel,) = new_figure()
    draw_heads(panel, [{"layer": y, "head": x, "a": x / 7} for y in range(layers) for x in range(heads)], "a", "share")
    figure.canvas.draw()
    for axis, limits, count in ((panel.xaxis, panel.get_xlim(), heads), (panel.yaxis, panel.get_ylim(), layers)):
        assert [t for t in axis.get_ticklocs() if min(limits) <= t <= max(limits)] == list(range(count))


def test_pictures_to_be_compared_have_one_scale():
    figures = []
    for size in (1.0, 40.0, math.nan):  # of the last one nothing could be measured
        figure, (heat, curve) = new_figure(1, 2)
        draw_heads(heat, [{"layer": 0, "head": h, "a": size * (h + 1)} for h in range(2)], "a", "nats", 1)
        curve.plot([0, size], [1, size])
        scale_tails(curve)
        figures.append(figure)
    share_scales(figures)
    for figure in figures:
        heat, curve, bar = figure.axes
        assert heat.images[0].get_clim() == (1, 80)
        assert bar.get_ylim() == (1, 80)
        assert curve.get_yscale() == "symlog"
        assert [curve.get_xlim(), curve.get_ylim()] == [figures[1].axes[1].get_xlim(), figures[1].axes[1].get_ylim()]
    # 1, 2 and 40 are dark on this scale, 80 is light: their figures are told from the ground
    colors = [text.get_color() for figure in figures for text in figure.axes[0].texts if text.get_text() != "×"]
    assert colors == ["white"] * 3 + ["black"]


def test_table_aligns_text_left_and_numbers_right(capsys):
    print_table([{"name": "a", "x": 1.23456}, {"name": "long", "x": None}, {"name": "b", "x": 123456.7}], ["name", "x"])
    assert capsys.readouterr().out == "name       x\na      1.235\nlong       –\nb     123457\n"


def test_a_duration_is_in_the_unit_in_which_it_is_read():
    given = {6.8e-6: "6.8 µs", 0.1311: "131 ms", 0.9999: "1000 ms", 1.49: "1.49 s", 119: "119 s", 120: "2 min"}
    given |= {7200: "2 h", 86400: "24 h", 1e6: "11.6 days", 1e9: "11574 days"}
    assert {seconds: duration(seconds) for seconds in given} == given
