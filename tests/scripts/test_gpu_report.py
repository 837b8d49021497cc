"""The GPU report's dry run: the same code on small shapes, from the command line to the tables."""

import json
import math
import sys
from pathlib import Path

import pytest

from harness.corpus_writing import write_corpus
from harness.gpu_report import with_error
from harness.gpu_report.document import markdown, wrong_rows
from harness.gpu_report.exactness import BACKENDS, VARIANTS
from harness.gpu_report.plan import SECTIONS
from harness.gpu_report.process import run_section
from harness.gpu_report.steps import judged
from harness.tokenizer import Bytes
from scripts.gpu_report import unused
from tests.helpers import run_python


def run_script(*arguments, cwd):
    return run_python("scripts/gpu_report.py", *arguments, cwd=cwd)


def report_in(folder: Path) -> tuple[dict, str]:
    (path,) = folder.glob("*_cpu.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_dry_run_of_the_whole_report(tmp_path):
    """One test, since the run takes a minute of two cores."""
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(900))
    write_corpus(tmp_path / "corpus", [("train", text), ("val", text[:2000])], Bytes(), source="a test")
    # Without those two whose code is that of others, on other shapes and variants.
    sections = [name for name in SECTIONS if name not in ("exactness_shapes", "steps_variants")]
    options = ("--cpu", "--seed", "1", "--sections", *sections)
    done = run_script(*options, "--out", tmp_path, "--corpus", tmp_path / "corpus", cwd=tmp_path)
    report, document = report_in(tmp_path)
    assert {section["section"]: section["error"] for section in report["sections"]} == dict.fromkeys(sections)
    assert done.returncode == 0, done.stderr
    assert document == markdown(report)
    for section in report["sections"]:
        title = SECTIONS[section["section"]].title
        assert section["rows"]
        assert f"## {title}" in document
        assert f"\n{title}, " in done.stdout
    rows = {section["section"]: section["rows"] for section in report["sections"]}
    every_variant_is_exact_on_every_backend(rows["exactness"])
    every_kind_of_variant_steps_beside_the_baseline(rows["steps"])
    two_models_are_trained_and_diagnosed(rows["training"])
    the_markdown_has_a_row_for_each_measurement(report, document)


def every_variant_is_exact_on_every_backend(rows):
    assert {row["verdict"] for row in rows} == {"ok"}
    for backend in ("cuda_flash", "cuda_flash, compiled", "materialized"):
        assert backend in BACKENDS
        assert {row["variant"] for row in rows if row["backend"] == backend} == set(VARIANTS)


def every_kind_of_variant_steps_beside_the_baseline(rows):
    names = {"nanoGPT's loop", "full", "full, 32 at a time"}
    assert {row["variant"].split("/")[-1] for row in rows} == names
    for row in rows:
        assert row["tokens/s"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["error, ms"] >= 0


def two_models_are_trained_and_diagnosed(rows):
    assert {row["normalizer"] for row in rows if row["what"] == "curve"} == {"softmax", "softmax1"}
    scripts = {row["script"] for row in rows if row["what"] == "summary"}
    assert scripts == {"activation_kurtosis", "quantization"}


def the_markdown_has_a_row_for_each_measurement(report, document):
    lines = document.splitlines()
    for row in (row for section in report["sections"] for row in section["rows"]):
        if "attention" in row:
            start = f"| {row['attention']} | {row['forward + backward, ms']:.2f} ms, "
            assert any(line.startswith(start) for line in lines)
        if "variant" in row and "ms" in row:
            start = f"| {row['variant']} | {with_error(row['ms'], row['error, ms'], 1)} | "
            assert any(line.startswith(start) for line in lines)


@pytest.mark.slow
def test_a_section_that_fails_leaves_its_last_lines_and_the_next_one_starts(tmp_path):
    (tmp_path / "val.bin").write_bytes(b"half a corpus")
    arguments = ("--cpu", "--out", tmp_path, "--corpus", tmp_path, "--sections", "steps", "hardware")
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report, document = report_in(tmp_path)
    steps, hardware = report["sections"]
    last = steps["error"].splitlines()[-1]
    assert "is not prepared (no train.bin)" in last
    assert last in document
    assert last in done.stdout
    assert hardware["error"] is None
    assert hardware["rows"]


@pytest.mark.slow
def test_a_section_ends_at_its_limit(tmp_path):
    done = run_script("--cpu", "--minutes", "0.01", "--out", tmp_path, "--sections", "hardware", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report, document = report_in(tmp_path)
    assert report["sections"][0]["error"].startswith("stopped at its limit of 0 s")
    assert "stopped at its limit" in document


@pytest.mark.slow
def test_without_a_card_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PyTorch sees no CUDA device")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_section_that_a_signal_ends_is_told(tmp_path, monkeypatch):
    program = tmp_path / "crash"
    program.write_text("#!/bin/sh\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    entry = run_section("hardware", {"cpu": True, "report": []}, 60.0, tmp_path)
    assert entry["error"] == "ended by signal 11"
    assert entry["rows"] == []


def test_a_section_without_time_is_not_started(tmp_path):
    assert run_section("hardware", {}, 0.0, tmp_path)["error"].startswith("not started")
    assert not list(tmp_path.iterdir())


def test_an_earlier_report_is_never_overwritten(tmp_path):
    stem = tmp_path / "2026-11-27_cpu"
    assert unused(stem) == stem
    stem.with_suffix(".json").write_text("{}")
    assert unused(stem).name == "2026-11-27_cpu-2"
    unused(stem).with_suffix(".json").write_text("{}")
    assert unused(stem).name == "2026-11-27_cpu-3"


def test_a_result_that_is_wrong_is_said_in_the_first_lines():
    row = {"variant": "softmax1/full", "note": "", "verdict": "WRONG"}
    report = {"card": "a card", "date": "today", "command": "c", "commit": "1", "seed": 0, "seconds": 1.0}
    report["sections"] = [{"section": "steps", "rows": [row], "error": None, "seconds": 1.0}]
    assert wrong_rows(report) == [row]
    assert "**1 results are not as they should be**" in markdown(report)


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (None, {"compiled_error": None}),
        (0.001, {"compiled_error": 0.001, "verdict": "ok"}),
        (0.5, {"compiled_error": 0.5, "verdict": "WRONG"}),
        (math.inf, {"compiled_error": "one gradient not finite", "verdict": "WRONG"}),
        (math.nan, {"compiled_error": "gradient not finite"}),
    ],
)
def test_a_compiled_gradient_is_judged(error, row):
    assert judged(error) == row
