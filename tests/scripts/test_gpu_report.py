"""The GPU report's dry run: the same code on small shapes, from the command line to the tables."""

import json
from pathlib import Path

import pytest

from harness.corpus_writing import write_corpus
from harness.gpu_report.document import markdown
from harness.gpu_report.exactness import BACKENDS, VARIANTS
from harness.gpu_report.plan import SECTIONS
from harness.tokenizer import Bytes
from tests.helpers import run_python


def run_script(*arguments, cwd):
    return run_python("scripts/gpu_report.py", *arguments, cwd=cwd)


def report_in(folder: Path) -> tuple[dict, str]:
    (path,) = folder.glob("*_cpu.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[dict, str, str]:
    """The whole report of a dry run: its JSON, its Markdown, and what was printed."""
    folder = tmp_path_factory.mktemp("gpu_report")
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(900))
    documents = [("train", text), ("val", text[:2000])]
    write_corpus(folder / "corpus", documents, Bytes(), source="a test")
    done = run_script("--cpu", "--out", folder, "--corpus", folder / "corpus", cwd=folder)
    report, document = report_in(folder)
    failed = {section["section"]: section["error"] for section in report["sections"] if section["error"]}
    assert not failed
    assert done.returncode == 0, done.stderr
    return report, document, done.stdout


@pytest.mark.slow
def test_every_section_comes_to_its_end(dry_run):
    report, document, printed = dry_run
    assert [section["section"] for section in report["sections"]] == list(SECTIONS)
    for section in report["sections"]:
        assert section["rows"]
        title = SECTIONS[section["section"]].title
        assert f"## {title}" in document
        assert f"\n{title}, " in printed
    assert document == markdown(report)


@pytest.mark.slow
def test_every_variant_is_exact_on_every_backend(dry_run):
    rows = [row for section in dry_run[0]["sections"][1::3] for row in section["rows"] if "verdict" in row]
    assert {row["verdict"] for row in rows} == {"ok"}
    for backend in ("cuda_flash", "cuda_flash, compiled", "materialized"):
        assert backend in BACKENDS
        found = {row["variant"] for row in rows if row["backend"] == backend}
        assert found == set(VARIANTS)


@pytest.mark.slow
def test_every_variant_steps_beside_the_baseline(dry_run):
    sections = {section["section"]: section["rows"] for section in dry_run[0]["sections"]}
    rows = sections["steps"] + sections["steps_variants"]
    assert {row["variant"].split("/")[-1] for row in rows} == {"nanoGPT's loop", "full", "diagonal", "ste"}
    for row in rows:
        assert row["tokens/s"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["error, ms"] >= 0
    curves = [row for row in sections["training"] if row["what"] == "curve"]
    assert {row["normalizer"] for row in curves} == {"softmax", "softmax1"}
    assert {row["script"] for row in sections["training"] if row["what"] == "summary"} == {
        "activation_kurtosis",
        "quantization",
    }


@pytest.mark.slow
def test_the_markdown_has_a_row_for_each_measurement(dry_run):
    report, document, _ = dry_run
    lines = document.splitlines()
    for section in report["sections"]:
        for row in section["rows"]:
            if "attention" in row:
                start = f"| {row['attention']} | {row['forward + backward, ms']:.2f} ms, "
                assert any(line.startswith(start) for line in lines)
            if "variant" in row and "ms" in row:
                assert any(line.startswith(f"| {row['variant']} | {row['ms']:.1f} ± ") for line in lines)


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
