"""What is read of a grid's cells, and by which names."""

import json

import pytest
import yaml

from harness.errors import UserError
from harness.experiments.grid import Experiment, load_experiment
from harness.experiments.results import read_results
from harness.experiments.state import as_run
from tests.helpers import ROOT

TOKENS = 4 * 8  # of a step


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    grid = {"question": "?", "base": str(ROOT / "configs" / "backcopy_softmax.yaml"), "seeds": [2, 1]}
    grid |= {"config": {"training": {"max_steps": 40, "batch_size": 4}, "model": {"block_size": 8}}}
    grid |= {"variants": {"slow": None, "fast": None}, "diagnostics": {"every": 20, "activation_kurtosis": None}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return load_experiment(tmp_path / "grid.yaml", tmp_path)


def write_cell(cell, rate: float, sink: float, last: int = 40) -> None:
    """Losses fall by 0.1 a step from 10; the sink rate is `sink` at the end and a tenth of it at step 20."""
    cell.folder.mkdir(parents=True)
    lines = [{"step": 0, "val/loss": 10.0}]
    for step in range(10, last + 1, 10):  # the first ten steps were slower
        pace = rate / 9 if step == 10 else rate
        lines.append({"step": step, "train/tokens_per_second": pace, "val/loss": 10 - step / 10})
    lines[-1]["val_full/loss"] = cell.seed + rate
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (cell.folder / "steps").mkdir()
    (cell.folder / "steps" / "20.pt").touch()
    (cell.folder / "diagnostics" / "along").mkdir(parents=True)
    for name, step, value in (("", 40, sink), ("along", 20, sink / 10)):
        row = {"layer": 0, "head": 1, "sink_rate": value}
        content = {"step": step, "summary": {"sink_rate": value, "null_mass": None}, "rows": [], "heads": [row]}
        (cell.folder / "diagnostics" / name / "activation_kurtosis.json").write_text(json.dumps(content))


@pytest.fixture
def written(experiment) -> Experiment:
    for cell in experiment.cells:
        write_cell(cell, rate=TOKENS / (2 if cell.variant == "slow" else 1), sink=0.1 * cell.seed)
    return experiment


def test_values_at_the_end_and_along_training(written):
    results = read_results(written)
    assert [run.problem for run in results.runs] == [None] * 4
    assert results.values("val_full/loss", "slow") == {1: 1 + TOKENS / 2, 2: 2 + TOKENS / 2}
    assert results.values("activation_kurtosis/sink_rate", "fast") == {1: 0.1, 2: 0.2}
    assert results.values("activation_kurtosis/sink_rate@20", "fast") == pytest.approx({1: 0.01, 2: 0.02})
    assert results.values("activation_kurtosis/sink_rate@max", "fast") == {1: 0.1, 2: 0.2}
    assert results.values("val/loss@mean", "slow") == pytest.approx({1: 8, 2: 8})
    assert results.runs[0].along["activation_kurtosis/sink_rate"] == [(20, pytest.approx(0.02)), (40, 0.2)]
    assert results.runs[0].heads == [{"layer": 0, "head": 1, "sink_rate": 0.2}]
    measures = results.measures()
    assert measures[0] == "activation_kurtosis/sink_rate"
    assert "activation_kurtosis/null_mass" not in measures


def test_at_equal_time_the_slower_variant_has_made_fewer_steps(written):
    """The fast one ends after 40 steps of a second; the slow one has then made 20 of its two-second steps."""
    results = read_results(written)
    assert results.seconds_a_step("slow") == 2
    assert results.values("val/loss@equal_time", "fast") == pytest.approx({1: 6, 2: 6})
    assert results.values("val/loss@equal_time", "slow") == pytest.approx({1: 8, 2: 8})


def test_an_unfinished_cell_and_a_missing_or_torn_diagnostic_are_told_and_have_no_values(experiment):
    untouched, unfinished, unmeasured, torn = experiment.cells
    write_cell(unfinished, TOKENS, 0.5, last=30)
    for cell in (unmeasured, torn):
        write_cell(cell, TOKENS, 0.5)
    (unmeasured.folder / "diagnostics" / "activation_kurtosis.json").unlink()
    (torn.folder / "diagnostics" / "activation_kurtosis.json").write_text('{"summary": ')
    results = read_results(experiment)
    problems = {run.name: run.problem for run in results.runs}
    assert problems[untouched.name] == "not trained"
    assert problems[unfinished.name] == "trained to step 30 of 40"
    assert problems[unmeasured.name] == "activation_kurtosis was not measured"
    assert "activation_kurtosis.json is no result of activation_kurtosis" in str(problems[torn.name])
    assert results.values("val_full/loss", "slow") == {}
    assert set(results.values("val_full/loss", "fast")) == {1, 2}
    with pytest.raises(UserError, match="no run has a value of activation_kurtosis/sink_rate"):
        results.values("activation_kurtosis/sink_rate", "fast")


def test_an_unknown_measure_is_told_with_those_that_there_are(written):
    results = read_results(written)
    with pytest.raises(UserError, match="no run has a value of val_full/los; there are val_full/loss"):
        results.values("val_full/los", "slow")
    with pytest.raises(UserError, match="after @ stands a step, min, max, mean or equal_time"):
        results.values("val/loss@end", "slow")


def test_at_equal_time_only_the_variants_compared_count(written):
    assert read_results(written).values("val/loss@equal_time", "slow", ["slow"]) == pytest.approx({1: 6, 2: 6})


def test_a_cell_of_another_config_a_broken_curve_and_other_options_have_no_values(written):
    changed, broken, empty, other = written.cells
    config = changed.config.to_dict()
    config["optimizer"]["lr"] = 0.5
    (changed.folder / "config.yaml").write_text(yaml.safe_dump(config))
    (broken.folder / "metrics.jsonl").write_text('{"step": 10, "val/loss"\n{"step": 20}\n')
    (empty.folder / "metrics.jsonl").write_text("")
    words, path = next(written.measurements[0].commands(other))
    record = {str(path): as_run([*words, "--seed", "2"])}
    (written.folder / "measured.json").write_text(json.dumps(record))
    results = read_results(written)
    problems = [str(run.problem) for run in results.runs]
    assert problems[0] == "it was trained with another config: optimizer.lr 0.5 → 0.001"
    assert "metrics.jsonl:1: not JSON" in problems[1]
    assert "no metrics in it yet" in problems[2]
    assert problems[3] == "activation_kurtosis was measured with other options: run the experiment again"
    assert results.values("val_full/loss", "slow") == {}
