"""Curves of made-up runs, without a display, and one clear line for each mistake."""

import json
import math
import sys
from pathlib import Path

import pytest

from harness import curves
from harness.errors import run_cli
from scripts import plot_metrics
from tests.helpers import curve_record, write_curves
from tests.processes import run_python

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def plot(monkeypatch, capsys, tmp_path):
    """plot(argument, …) → (exit status, stdout, stderr), run in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plot_metrics.py", *arguments])
        status = run_cli(plot_metrics.main)
        return status, *capsys.readouterr()

    return run


def assert_error(result: tuple[int, str, str], *parts: str) -> None:
    status, _, stderr = result
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for part in parts:
        assert part in stderr


def titles(monkeypatch) -> list[str]:
    """Collects the titles of the panels that the script draws."""
    seen = []
    draw_panel = curves.draw_panel
    monkeypatch.setattr(
        curves, "draw_panel", lambda axes, panel, runs: (seen.append(panel.title), draw_panel(axes, panel, runs))
    )
    return seen


def test_one_run(plot, tmp_path, monkeypatch):
    seen = titles(monkeypatch)
    status, stdout, stderr = plot(write_curves(tmp_path / "out" / "softmax"))
    assert (status, stderr) == (0, "")
    picture = tmp_path / "out" / "softmax" / "curves.png"
    assert picture.read_bytes().startswith(PNG)
    assert str(picture) in stdout
    assert sorted(file.name for file in picture.parent.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert seen == [
        "Loss",
        "Validation bits per byte",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Weights",
        "Attention probabilities, validation",
    ]
    table = dict(line.rsplit(None, 1) for line in stdout.split("\n\n")[0].splitlines())
    assert table["step"] == "290"
    assert table["train/tokens_per_second"] == "51234"
    assert table["median weight_kurtosis"] == "0.3"
    assert table["max weight_kurtosis"] == "29"


def test_several_runs_go_to_a_folder_of_their_own(plot, tmp_path):
    runs = [write_curves(tmp_path / "out" / name) for name in ("softmax", "softmax1")]
    status, stdout, _ = plot(runs[0], runs[1] + "/metrics.jsonl", runs[0])
    assert status == 0
    (picture,) = (tmp_path / "out/plot_metrics").iterdir()
    assert picture.read_bytes().startswith(PNG)
    assert picture.name.startswith("softmax+softmax1-")
    assert stdout.splitlines()[0].split() == ["last", "value", "softmax", "softmax1"]


def test_every_choice_of_runs_and_metrics_has_a_picture_of_its_own(plot, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "draw_panel", lambda *_: None)  # ten pictures: what is in them is of no concern
    few = [{"step": step, "train/loss": 1.0, "train/lr": 1.0, "val/loss": 1.0} for step in (0, 10)]
    a, b, c = (write_curves(tmp_path / name / "run", few) for name in "abc")
    for _ in range(2):  # the same question again replaces its own picture
        for arguments in ((a, b), (a, c), (a, b, "--metrics", "train/l"), (a,), (a, "--metrics", "train/l")):
            assert plot(*arguments)[0] == 0
    assert len(list((tmp_path / "out/plot_metrics").iterdir())) == 4
    assert len(list((tmp_path / "a/run").iterdir())) == 2


def test_what_is_no_run_is_passed_over_with_a_line(plot, tmp_path):
    run = write_curves(tmp_path / "out" / "run")
    (tmp_path / "out/compare_kl").mkdir()
    (tmp_path / "out/run.log").write_text("step 10")
    (tmp_path / "out/fresh").mkdir()
    (tmp_path / "out/fresh/metrics.jsonl").touch()
    status, stdout, _ = plot(*(f"out/{name}" for name in ("compare_kl", "fresh", "run", "run.log")))
    assert status == 0
    assert stdout.splitlines()[:3] == [
        "passed over: out/compare_kl/metrics.jsonl: no such file",
        "passed over: out/fresh/metrics.jsonl: no metrics in it yet",
        "passed over: out/run.log: no metrics.jsonl",
    ]
    assert Path(run, "curves.png").exists()


def test_perplexity_stands_in_for_bits_per_byte(plot, tmp_path, monkeypatch):
    seen = titles(monkeypatch)
    run = write_curves(tmp_path / "run", [{"step": 0, "val/perplexity": 65.0}, {"step": 5, "val/perplexity": 20.0}])
    assert plot(run)[0] == 0
    assert seen == ["Validation perplexity"]


def test_steps_may_miss_metrics_and_metrics_may_be_null_or_diverge(plot, tmp_path):
    lines = [
        {"step": 0, "train/loss": 5.0, "train/grad_norm": None},
        {"step": 10, "train/loss": math.nan, "val/loss": math.inf},
        {"step": 20, "train/loss": 4.0},
    ]
    run = write_curves(tmp_path / "run", lines)
    status, stdout, _ = plot(run)
    assert status == 0
    assert "grad_norm" not in stdout
    steps, values = curves.read_run(Path(run, "metrics.jsonl"))["train/loss"]
    assert steps.tolist() == [0, 10, 20]
    assert values[[0, 2]].tolist() == [5.0, 4.0]
    assert math.isnan(values[1])


def test_chosen_metrics(plot, tmp_path, monkeypatch):
    seen = titles(monkeypatch)
    run = write_curves(tmp_path / "run")
    assert plot(run, "--out", "new/few.pdf", "--metrics", "weight_kurtosis/", "train/l")[0] == 0
    assert seen == ["loss", "lr", "a", "b", "c"]  # "constant" has no finite value
    assert (tmp_path / "new/few.pdf").read_bytes().startswith(b"%PDF")
    assert_error(plot(run, "--metrics", "wieght"), "wieght", "weight_kurtosis/", "train/")


def test_too_many_panels(plot, tmp_path):
    many = {f"weight_kurtosis/{i}": 1.0 for i in range(100)}
    assert_error(plot(write_curves(tmp_path / "run", [{"step": 0} | many]), "--metrics", "weight"), "100", "longer")


@pytest.mark.parametrize(
    "line", ['{"step": 10, "train/lo', "[1, 2]", '{"train/loss": 3.0}', '{"step": 5, "train/loss": "high"}', "", "\0"]
)
def test_a_malformed_line_is_named(plot, tmp_path, line):
    run = write_curves(
        tmp_path / "run", [curve_record(0), curve_record(10)], end=line + "\n" + json.dumps(curve_record(30)) + "\n"
    )
    assert_error(plot(run), "metrics.jsonl:3:")


def test_missing_and_empty_runs(plot, tmp_path):
    run = write_curves(tmp_path / "run")
    assert_error(plot(run, "out/nowhere"), "out/nowhere: no such file")
    (tmp_path / "fresh").mkdir()
    assert_error(plot("fresh"), "fresh/metrics.jsonl: no such file")
    (tmp_path / "fresh/metrics.jsonl").touch()
    assert_error(plot("fresh"), "fresh/metrics.jsonl: no metrics")
    assert_error(plot(), "RUN", "--help")
    assert_error(plot(write_curves(tmp_path / "other", [{"step": 0, "mine/x": 1.0}])), "mine/", "--metrics")


def test_bad_places_for_the_picture(plot, tmp_path):
    run = write_curves(tmp_path / "run")
    assert_error(plot(run, "--out", "curves.jsonl"), "curves.jsonl", ".jsonl")
    assert_error(plot(run, "--out", "curves"), "curves", "name it like")
    assert_error(plot(run, "--out", "run/metrics.jsonl/curves.png"), "a file is in the way")
    (tmp_path / "folder.png").mkdir()
    assert_error(plot(run, "--out", "folder.png"), "is a folder")


@pytest.mark.slow
def test_runs_from_any_folder(tmp_path):
    run = write_curves(tmp_path / "run")
    done = run_python("scripts/plot_metrics.py", run, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
