"""Reading metrics.jsonl: names of runs, and last lines that were cut off."""

from pathlib import Path

import numpy as np
import pytest

from harness import curves
from measure.activations import EARLY
from tests.helpers import write_curves


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_curves(tmp_path / parent / "run") for parent in ("a", "b")]
    assert list(curves.metrics_files(runs)) == ["a/run", "b/run"]


def test_an_unfinished_last_line_is_left_out(tmp_path):
    run = write_curves(tmp_path / "run", [{"step": 0, "train/loss": 5.0}], end='{"step": 10, "train/lo')
    steps, _ = curves.read_run(Path(run, "metrics.jsonl"))["train/loss"]
    assert steps.tolist() == [0]


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path):
    run = write_curves(tmp_path / "run", [{"step": 0, "train/loss": 5.0}], end='{"step": 10, "train/loss": 4.0}')
    steps, _ = curves.read_run(Path(run, "metrics.jsonl"))["train/loss"]
    assert steps.tolist() == [0, 10]


def test_a_kurtosis_group_is_its_median_and_largest_without_what_does_not_exist(tmp_path):
    series = curves.read_run(Path(write_curves(tmp_path / "run"), "metrics.jsonl"))
    steps, values = series["median weight_kurtosis"]
    assert values.tolist() == [sorted((0.1, step / 10, 0.3))[1] for step in steps]  # "constant" is null throughout
    assert series["max weight_kurtosis"][1].tolist() == [max(0.3, step / 10) for step in steps]
    assert "weight_kurtosis/constant" not in series


def config(seed: int, **model) -> dict:
    return {
        "run": {"name": "any", "seed": seed},
        "model": model,
        "training": {"overwrite": seed == 1},
        "tracking": {"log_interval": seed},
    }


def test_seeds_of_a_variant_are_runs_of_one_config_whose_seeds_differ():
    configs = {
        "softmax_s1": config(1, n_layer=2),
        "softmax1_s1": config(1, n_layer=2, normalizer="softmax1"),
        "softmax_s12": config(12, n_layer=2),
        "before": config(1, n_layer=3),  # the same seed: these two are to be compared
        "after": config(1, n_layer=3),
        "a": config(5),
        "b": config(6),
        "softmax_3": config(3, n_layer=9),  # another variant of the same name
        "softmax_4": config(4, n_layer=9),
        "unknown": None,
        "unknown_2": None,
    }
    assert curves.variants(configs) == {
        "softmax, 2 seeds": ["softmax_s1", "softmax_s12"],
        **{name: [name] for name in ("softmax1_s1", "before", "after")},
        "a, b: 2 seeds": ["a", "b"],
        "softmax_3, softmax_4: 2 seeds": ["softmax_3", "softmax_4"],
        **{name: [name] for name in ("unknown", "unknown_2")},
    }


@pytest.mark.parametrize("content", [None, "run: [", "3", "run: softmax"])
def test_a_config_that_is_missing_or_broken_is_not_known(content, tmp_path):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert curves.config_beside(tmp_path / "metrics.jsonl") is None
    (tmp_path / "config.yaml").write_text("run: {seed: 5}")
    assert curves.config_beside(tmp_path / "metrics.jsonl") == {"run": {"seed": 5}}


def test_seeds_are_drawn_as_their_mean_in_a_band_where_all_have_values():
    def series(*values: float) -> curves.Series:
        return {"val/loss": (np.arange(len(values)) * 10.0, np.array(values))}

    runs = {"a_1": series(4, 2, 1), "a_2": series(6, 3), "b": series(5, 5, 5)}
    panels = curves.standard_panels(runs)
    figure = curves.draw(runs, panels, {"a, 2 seeds": ["a_1", "a_2"], "b": ["b"]})
    axes = figure.axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 5], [10, 2.5]], [[0, 5], [10, 5], [20, 5]]]
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(0, 4), (0, 6), (10, 2), (10, 3)}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a, 2 seeds", "b"]
    assert legend.get_title().get_text() == "of seeds, the mean in a band from the least to the largest"


@pytest.mark.parametrize("others", [("val/loss", "val/bits_per_byte"), ()])
def test_the_whole_validation_set_has_a_point_of_its_own(tmp_path, others):
    records = [{"step": step} | dict.fromkeys(others, 3.0) for step in (0, 10)]
    records.append({"step": 10, "val_full/loss": 2.0, "val_full/bits_per_byte": 1.0, "val_full/perplexity": 8.0})
    runs = {"run": curves.read_run(Path(write_curves(tmp_path / "run", records), "metrics.jsonl"))}
    panels = curves.standard_panels(runs)
    assert [panel.title for panel in panels] == ["Loss", "Validation bits per byte"]
    axes = curves.draw(runs, panels, {"run": ["run"]}).axes[0]
    assert axes.lines[-1].get_xydata().tolist() == [[10, 2]]
    assert axes.lines[-1].get_marker() == "*"
    assert "whole validation set" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert {row["last value"] for row in curves.last_values(runs, panels)} == {
        "step",
        "val_full/loss",
        "val_full/bits_per_byte",
        *others,
    }


def test_a_kurtosis_far_from_0_fills_its_panel_and_steps_are_counted_in_integers():
    runs = {"run": {"median weight_kurtosis": (np.array([0.0, 1.0, 2.0]), np.array([80.0, 300.0, 90.0]))}}
    figure = curves.draw(runs, curves.standard_panels(runs), {"run": ["run"]})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_ylim()[0] > 50
    assert [tick for tick in axes.get_xticks() if 0 <= tick <= 2] == [0, 1, 2]


def test_the_legend_names_the_queries_that_are_left_out():
    (panel,) = (panel for panel in curves.PANELS if panel.main.endswith("_late"))
    assert panel.legend[0] == f"without the first {EARLY} queries"
