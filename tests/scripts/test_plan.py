"""scripts/plan.py: where the memory goes, and what to change where it does not fit, which then does."""

import json
import re
import shlex

import pytest

from harness.errors import run_cli
from scripts import plan as script
from tests.helpers import ROOT, save_model, tiny_gpt

LLAMA = str(ROOT / "configs/llama_124m.yaml")
WIDE = ("--model.n_layer", "32", "--model.n_embd", "4096", "--model.n_head", "32", "--model.n_inner", "14336")


def printed(capsys, *arguments: str) -> str:
    assert run_cli(lambda: script.main(list(arguments))) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert run_cli(lambda: script.main(list(arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_json_adds_up(capsys):
    found = json.loads(printed(capsys, LLAMA, "--gpus", "8", "--disk", "2", "--bandwidth", "50", "--json"))
    assert found["peak"]["bytes"] == pytest.approx(
        sum(found["peak"]["kinds"].values()), abs=len(found["peak"]["kinds"])
    )
    weights = 4 * found["parameters"]
    assert found["peak"]["kinds"]["parameters"] == found["peak"]["kinds"]["DDP's buckets"] == weights
    assert found["fits"] is True
    assert found["would_fit"] == []
    (moved,) = found["moved"].values()
    assert moved == {"bytes": round(2 * 7 / 8 * weights), "seconds": pytest.approx(2 * 7 / 8 * weights / 50e9)}
    assert found["checkpoint"]["optimizer_bytes"] == 2 * weights
    assert found["checkpoint"]["seconds"] == pytest.approx(3 * weights / 2e9)
    assert found["tokens"] == 600000 * 480 * 1024


def test_what_it_says_would_fit_does(capsys):
    out = printed(capsys, LLAMA, *WIDE, "--gpus", "16")
    assert "does NOT fit into 90% of 80 GiB" in out
    ways = re.findall(r"This would: (.*) \(([\d.]+) GiB\)", out)
    assert {"true" in options for options, _ in ways} == {True, False}  # activations computed again, and kept
    for options, size in ways:
        assert float(size) <= 72
        again = printed(capsys, LLAMA, *WIDE, *shlex.split(options))
        assert "It fits into 90% of 80 GiB" in again
        peak = re.search(r"the peak: .*  ([\d.]+)$", again, re.M)
        assert peak
        assert float(peak[1]) == pytest.approx(float(size), abs=0.06)  # digits of either
        assert "all-gather" in again


def test_a_model_that_training_starts_from_is_the_one_planned(capsys, tmp_path):
    model = tiny_gpt(n_embd=12)
    path = save_model(model, tmp_path / "ckpt.pt")
    found = json.loads(printed(capsys, LLAMA, "--training.init_from", str(path), "--json"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_mistakes_are_one_line(capsys, tmp_path):
    assert "--memory 0: must be positive" in refused(capsys, LLAMA, "--memory", "0")
    assert "training.batch_size: 480 sequences cannot be shared out among 7" in refused(capsys, LLAMA, "--gpus", "7")
    unknown = refused(capsys, LLAMA, "--model.vocab_size", "null", "--data.corpus", str(tmp_path))
    assert "is not prepared" in unknown
    assert "--model.vocab_size" in unknown
