"""Reading metrics.jsonl: names of runs, and last lines that were cut off."""

from pathlib import Path

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


def test_the_legend_names_the_queries_that_are_left_out():
    (panel,) = (panel for panel in curves.PANELS if panel.main.endswith("_late"))
    assert panel.legend[0] == f"without the first {EARLY} queries"
