"""The GPU report's dry run: the same code on small shapes, from the command line to the tables."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from harness.bench_attention import FIRST, names
from harness.corpus_writing import write_corpus
from harness.errors import run_cli
from harness.gpu_report import Task, blocks, models, training, with_error
from harness.gpu_report.document import markdown, wrong_rows
from harness.gpu_report.exactness import BACKENDS, VARIANTS
from harness.gpu_report.plan import SECTIONS
from harness.gpu_report.process import run_section
from harness.gpu_report.steps import judged
from harness.tokenizer import Bytes
from model import NORMALIZERS
from scripts import gpu_report
from scripts.gpu_report import unused
from tests.helpers import ROOT


def run_here(monkeypatch, *arguments) -> int:
    """The exit status of the script, run in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *map(str, arguments)])
    return run_cli(gpu_report.main) or 0


def report_in(folder: Path) -> tuple[dict, str]:
    (path,) = folder.glob("*_cpu.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture
def without_processes(monkeypatch, forked_workers):
    """Sections and the programs that they start run in this process, which has imported what they need; what one of its
    own adds has tests of its own. What the sections measure still has one each."""

    def section(name, options, limit, work) -> dict:
        rows = [*SECTIONS[name].run(Task(**options, seconds=limit))]
        return {"section": name, "seconds": 0.0, "error": None, "rows": json.loads(json.dumps(rows, allow_nan=False))}

    def together(commands) -> None:
        for _, *words in commands:
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as end:
                runpy.run_path(words[0], run_name="__main__")
            assert not end.value.code

    monkeypatch.setattr(gpu_report, "run_section", section)
    monkeypatch.setattr(training, "together", together)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the processes that measure
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which a deterministic run sets, and leaves
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.chdir(ROOT)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_dry_run_of_the_whole_report(tmp_path, without_processes, monkeypatch, capsys):
    """One test, since the run takes half a minute."""
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(900))
    write_corpus(tmp_path / "corpus", [("train", text), ("val", text[:2000])], Bytes(), source="a test")
    # Without those whose code is that of others, on other shapes and variants.
    sections = [name for name in SECTIONS if name not in ("exactness_shapes", "steps_variants", "steps_tuned")]
    options = ("--cpu", "--seed", "1", "--sections", *sections)
    assert run_here(monkeypatch, *options, "--out", tmp_path, "--corpus", tmp_path / "corpus") == 0
    report, document = report_in(tmp_path)
    printed = capsys.readouterr().out
    assert [section["section"] for section in report["sections"]] == sections
    assert document == markdown(report)
    for section in report["sections"]:
        title = SECTIONS[section["section"]].title
        assert section["rows"]
        assert f"## {title}" in document
        assert f"\n{title}, " in printed
    rows = {section["section"]: section["rows"] for section in report["sections"]}
    every_variant_is_exact_on_every_backend(rows["exactness"])
    every_kind_of_variant_steps_beside_the_baseline(rows["steps"])
    blocks_are_timed_beside_those_in_use(rows["blocks"])
    small_models_have_the_gradients_of_a_cpu(rows["models"])
    runs_go_on_as_if_they_had_not_stopped(rows["resumed"])
    models_are_trained_and_diagnosed_and_nanogpts_loop_agrees(rows["training"])
    the_markdown_has_a_row_for_each_measurement(report, document)


def every_variant_is_exact_on_every_backend(rows):
    assert {row["verdict"] for row in rows} == {"ok"}
    kinds = {name: NORMALIZERS[normalizer].tile for name, (normalizer, _) in VARIANTS.items()}
    softmaxes = {name for name, kind in kinds.items() if kind == "softmax"}
    tiles = {name for name, kind in kinds.items() if kind} - softmaxes
    compiled = softmaxes & set(names(FIRST))
    expected = {"cuda_flash": softmaxes, "cuda_flash, compiled": compiled, "cuda_triton": tiles}
    for backend, variants in (expected | {"materialized": set(VARIANTS)}).items():
        assert backend in BACKENDS
        assert {row["variant"] for row in rows if row["backend"] == backend} == variants


def every_kind_of_variant_steps_beside_the_baseline(rows):
    names = {"nanoGPT's loop", "full", "full, 32 at a time"}
    assert {row["variant"].split("/")[-1] for row in rows} == names
    for row in rows:
        assert row["tokens/s"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["error, ms"] >= 0


def blocks_are_timed_beside_those_in_use(rows):
    found = [(row["kernel"], row["blocks"]) for row in rows if row["ms"] > 0]
    assert found == list(itertools.product(blocks.KERNELS, (blocks.IN_USE, "(16, 16, 4, 1)")))
    assert all(row["ratio"] == 1 for row in rows[::2])


def small_models_have_the_gradients_of_a_cpu(rows):
    assert [row["model"] for row in rows] == ["sink", "muon"]
    assert {row["verdict"] for row in rows} == {"ok"}
    assert all(0 < row["error"] <= row["allowed"] for row in rows)


def runs_go_on_as_if_they_had_not_stopped(rows):
    assert [row["run"] for row in rows] == [name for name, run in models.RUNS.items() if not run.compiled]
    assert {row["verdict"] for row in rows} == {"ok"}
    assert [row["error"] for row in rows] == [0, 0]


def models_are_trained_and_diagnosed_and_nanogpts_loop_agrees(rows):
    curves = [row for row in rows if row["what"] == "curve" and "train/loss" in row]
    assert {row["variant"] for row in curves} == {"softmax", "gate", "nanoGPT's loop"}
    assert {row["step"] for row in curves if row["variant"] != "gate"} == {1, 2, 3, 4}
    (apart,) = (row for row in rows if row["what"] == "apart")
    assert (apart["steps"], apart["verdict"]) == (4, "ok")
    summaries = {(row["variant"], row["script"]) for row in rows if row["what"] == "summary"}
    assert summaries == set(itertools.product(("softmax", "gate"), training.DIAGNOSTICS))


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
def test_a_section_that_fails_leaves_its_last_lines_and_the_next_one_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "val.bin").write_bytes(b"half a corpus")
    arguments = ("--cpu", "--out", tmp_path, "--corpus", tmp_path, "--sections", "training", "hardware")
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *arguments) == 1
    report, document = report_in(tmp_path)
    trained, hardware = report["sections"]
    last = trained["error"].splitlines()[-1]
    assert "is not prepared (no train.bin)" in last
    assert last in document
    assert last in capsys.readouterr().out
    assert hardware["error"] is None
    assert hardware["rows"]


def test_a_section_ends_at_its_limit(tmp_path, monkeypatch):
    arguments = ("--cpu", "--minutes", "0.005", "--out", tmp_path, "--sections", "hardware")
    assert run_here(monkeypatch, *arguments) == 1
    report, document = report_in(tmp_path)
    assert report["sections"][0]["error"].startswith("stopped at its limit of 0 s")
    assert "stopped at its limit" in document


def test_without_a_card_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: PyTorch sees no CUDA device")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_programs_run_together_and_the_last_lines_of_one_that_fails_are_told():
    programs = [[sys.executable, "-c", f"print('a\\n' * 20 + 'line {i}'); exit({i})"] for i in range(3)]
    training.together(programs[:1])
    with pytest.raises(RuntimeError, match=r"ended with status 1:\n(a\n){7}line 1$"):
        training.together(programs)


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


@pytest.mark.parametrize(("slope", "verdict"), [(0.0, "ok"), (0.001, "WRONG")])
def test_a_curve_that_leaves_nanogpts_is_found(slope, verdict):
    """Also where it swings around it, by more than it may lie apart."""
    theirs = {step: 5.0 for step in range(1, 81)}
    ours = {step: 5.0 + 0.1 * (-1) ** step + slope * step for step in theirs if step % 2 or step > 40}
    found = training.apart(ours, theirs)
    assert found["steps"] == 60
    assert found["mean"] == pytest.approx(slope * 73, abs=0.007)
    assert found["verdict"] == verdict


def test_a_curve_that_is_not_there_is_found():
    assert training.apart({1: 5.0, 2: 5.0}, {1: 5.0})["verdict"] == "WRONG"  # whose second loss is infinite


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
