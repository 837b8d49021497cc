"""scripts/plan.py: where the memory goes, and what to change where it does not fit, which then does."""

import json
import re
import shlex

import pytest

from harness.config_files import load_config
from harness.errors import run_cli
from harness.resuming import first_shape
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
    assert found["peak"]["kinds"]["parameters"] == found["peak"]["kinds"]["gradients"] == weights
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
    assert "Assumed of each cuda: 80 GiB, 400 TFLOP/s" in out
    ways = re.findall(r"This would: (.*) \(([\d.]+) GiB\): a step [\d.]+ m?s of computing, [\d.]+ m?s of sending", out)
    assert {"true" in options for options, _ in ways} == {True, False}  # activations computed again, and kept
    for options, size in ways:
        assert float(size) <= 72
        again = printed(capsys, LLAMA, *WIDE, *shlex.split(options))
        assert "It fits into 90% of 80 GiB" in again
        peak = re.search(r"the peak: .*  ([\d.]+)$", again, re.M)
        assert peak
        assert float(peak[1]) == pytest.approx(float(size), abs=0.06)  # digits of either
        assert "all-gather" in again


def test_the_fastest_way_is_the_first(capsys):
    xl = ("--model.n_layer", "48", "--model.n_head", "25", "--model.n_embd", "1600", "--training.batch_size", "512")
    arguments = (str(ROOT / "configs/gpt2_124m_softmax.yaml"), *xl, "--gpus", "8", "--memory", "24", "--json")
    again, kept = json.loads(printed(capsys, *arguments))["would_fit"]
    assert (again["training.checkpoint_activations"], kept["training.checkpoint_activations"]) == (True, False)
    fast, slow = again["step_seconds"], kept["step_seconds"]
    assert fast["computing"] == pytest.approx(slow["computing"] * 4 / 3)
    assert fast["sending"] == pytest.approx(slow["sending"] / 8)  # 2 micro-steps of 32 in place of 16 of 4


def test_a_laptop_is_what_it_is_and_its_times_can_be_read(capsys, monkeypatch):
    monkeypatch.setattr(script, "free_memory", lambda: 6 * 2**30)
    monkeypatch.setattr(script, "peak_flops", lambda device, dtype: (1e12, "a product"))
    small = (str(ROOT / "configs/stdlib_softmax1.yaml"), "--model.vocab_size", "256", "--training.device", "cpu")
    out = printed(capsys, *small, "--gpus", "2")
    assert "Assumed of each cpu: 3 GiB, 0.2 TFLOP/s" in out
    assert "into 90% of 3 GiB" in out
    alone = printed(capsys, *small, "--flops", "0.01", "--memory", "5")
    assert "Assumed of each cpu: 5 GiB, 0.01 TFLOP/s" in alone
    assert re.search(r"^A step: 27\d ms of computing$", alone, re.M)
    assert re.search(r"^5,000 steps, 2.56e\+06 tokens: 2\d(\.\d)? min$", alone, re.M)  # nothing is sent: no range


def test_a_model_that_training_starts_from_is_the_one_planned(capsys, tmp_path):
    model = tiny_gpt(n_embd=12)
    path = save_model(model, tmp_path / "ckpt.pt")
    found = json.loads(printed(capsys, LLAMA, "--training.init_from", str(path), "--json"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    path = save_model(tiny_gpt(position="rope", block_size=32), tmp_path / "rope.pt")
    anew = ("--model.block_size", "8", "--model.normalizer", "sink", "--training.init_from", str(path))
    planned = first_shape(load_config([LLAMA, *anew]))
    assert (planned.block_size, planned.normalizer, planned.n_embd) == (8, "sink", tiny_gpt().config.n_embd)


def test_mistakes_are_one_line(capsys, tmp_path):
    assert "--memory 0: must be positive" in refused(capsys, LLAMA, "--memory", "0")
    assert "argument --gpus: invalid int value: 'x'" in refused(capsys, LLAMA, "--gpus", "x")
    for arguments, problem in (((), "no config given"), ((LLAMA, "--foo", "3"), "--foo: no option of this script")):
        assert f"{problem}: python scripts/plan.py CONFIG" in (line := refused(capsys, *arguments))
        assert "python train.py --help the keys" in line
    deep = refused(capsys, LLAMA, "--model.n_layer", "100000000")
    assert "model.n_layer: 100000000: a plan is for 10,000 at most" in deep
    assert "training.batch_size: 480 sequences cannot be shared out among 7" in refused(capsys, LLAMA, "--gpus", "7")
    unknown = refused(capsys, LLAMA, "--model.vocab_size", "null", "--data.corpus", str(tmp_path))
    assert "is not prepared" in unknown
    assert "--model.vocab_size" in unknown
