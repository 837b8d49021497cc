"""Reading metrics.jsonl: names of runs, and last lines that were cut off."""

import json
import math
from pathlib import Path

from harness import curves


def record(step: int) -> dict:
    loss = 1 + 4 * math.exp(-step / 100)
    return {
        "step": step,
        "train/loss": loss,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5 + 1 / (1 + step),
        "train/tokens_per_second": 51234.5,
        "val/loss": loss + 0.1,
        "val/perplexity": math.exp(loss + 0.1),
        "val/bits_per_byte": (loss + 0.1) / math.log(2),
        "weight_kurtosis/a": 0.1,
        "weight_kurtosis/b": step / 10,
        "weight_kurtosis/c": 0.3,
        "weight_kurtosis/constant": None,
        "activation_kurtosis/val/h.0": -0.5 + step,
    }


def write_run(folder: Path, records: list[dict] | None = None, end: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in records or map(record, range(0, 300, 10))]
    (folder / "metrics.jsonl").write_text("".join(lines) + end)
    return str(folder)


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert list(curves.metrics_files(runs)) == ["a/run", "b/run"]


def test_an_unfinished_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 0, "train/loss": 5.0}], end='{"step": 10, "train/lo')
    steps, _ = curves.read_run(Path(run, "metrics.jsonl"))["train/loss"]
    assert steps.tolist() == [0]


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 0, "train/loss": 5.0}], end='{"step": 10, "train/loss": 4.0}')
    steps, _ = curves.read_run(Path(run, "metrics.jsonl"))["train/loss"]
    assert steps.tolist() == [0, 10]


def test_a_kurtosis_group_is_its_median_and_largest_without_what_does_not_exist(tmp_path):
    series = curves.read_run(Path(write_run(tmp_path / "run"), "metrics.jsonl"))
    steps, values = series["median weight_kurtosis"]
    assert values.tolist() == [sorted((0.1, step / 10, 0.3))[1] for step in steps]  # "constant" is null throughout
    assert series["max weight_kurtosis"][1].tolist() == [max(0.3, step / 10) for step in steps]
    assert "weight_kurtosis/constant" not in series
