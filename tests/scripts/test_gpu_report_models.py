"""What the GPU report says of small models, and of runs that go on, is wrong where they are."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.gpu_report import Task, finished, models, training
from tests.helpers import ROOT, tiny_corpus


@pytest.fixture
def task(tmp_path, monkeypatch) -> Task:
    monkeypatch.chdir(ROOT)
    return Task(cpu=True, seed=0, seconds=60.0, corpus=str(tiny_corpus(tmp_path / "corpus")), folder=str(tmp_path))


def written(row: dict) -> dict:
    """The row as the report keeps it: JSON, which has no NaN."""
    return json.loads(json.dumps(row, allow_nan=False))


def with_fault(monkeypatch, fault) -> None:
    """The second model that is made, the card's, has `fault(model)`."""
    make, made = models.noisy_stepper, []

    def make_with_fault(words, device):
        made.append(make(words, device))
        if len(made) == 2:
            fault(made[-1].raw_model)
        return made[-1]

    monkeypatch.setattr(models, "noisy_stepper", make_with_fault)


def wrong_gradient(name: str, factor: float):
    return lambda model: model.get_parameter(name).register_hook(lambda gradient: gradient * factor)


SINK, MLP = "transformer.h.0.attn.sink", "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("name", "factor", "error"),
    [(SINK, 1 + 1e-4, 1e-4), (SINK, 0.0, 1.0), (MLP, 1 - 1e-4, 1e-4), (MLP, math.nan, "nan"), (MLP, math.inf, "inf")],
)
def test_a_wrong_gradient_of_one_parameter_is_found(name, factor, error, task, monkeypatch):
    words = models.arguments(task, models.MODELS["sink"])
    assert models.compare_gradients("sink", "cpu", words)[0]["verdict"] == "ok"
    with_fault(monkeypatch, wrong_gradient(name, factor))
    row = written(*models.compare_gradients("sink", "cpu", words))
    assert (row["verdict"], row["of"]) == ("WRONG", name)
    assert row["error"] == (error if isinstance(error, str) else pytest.approx(error, rel=0.05))


@pytest.mark.parametrize("normalizer", ["sink", "kbias", "kvbias", "softmax_n"])
def test_softmax1_in_place_of_its_kin_is_found(normalizer, task, monkeypatch):
    """As at the start of training, where all of them are the same function."""

    def as_softmax1(model):
        for block in model.transformer.h:
            block.attn.constants = dict.fromkeys(block.attn.constants, 0.0)
            for parameter in block.attn.learned().values():
                parameter.data.zero_()

    with_fault(monkeypatch, as_softmax1)
    words = models.arguments(task, models.MODELS[normalizer])
    assert models.compare_gradients(normalizer, "cpu", words)[0]["verdict"] == "WRONG"


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 1e-5, "ok"), (1 + 2e-4, "WRONG"), (math.nan, "WRONG")])
def test_an_optimizer_with_other_losses_is_found(factor, verdict, monkeypatch):
    losses = iter([[3.0, 2.0, 1.0], [3.0, 2.0 * factor, 1.0]])
    monkeypatch.setattr(models, "noisy_stepper", lambda *_: SimpleNamespace(losses=lambda steps: next(losses)))
    row = written(*models.compare_losses("muon", "cpu", []))
    assert (row["verdict"], row["of"]) == (verdict, "loss 2")


def test_both_devices_have_the_same_noise(task):
    words = models.arguments(task, models.MODELS["kbias"])
    own, other = (dict(models.noisy_stepper(words, "cpu").raw_model.named_parameters()) for _ in range(2))
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert 0 < own["transformer.h.0.attn.null_key"].std() < 2 * models.NOISE


@pytest.fixture
def second_half(monkeypatch):
    """A function that says what losses the second half of the stopped run has, and whether it kept the first's."""
    said: dict = {}

    def together(commands) -> None:
        for words in commands:
            values = dict(zip(words[3::2], words[4::2], strict=True))
            folder, last = Path(values["--run.out_dir"], values["--run.name"]), int(values["--training.max_steps"])
            start = 6 if folder.exists() else 0
            folder.mkdir(exist_ok=True)
            lines = [
                {"step": n, "train/loss": 5.0 + (start and said["apart"]), "seconds": id(words)}
                for n in range(start, last)
            ]
            with open(folder / "metrics.jsonl", "a" if start == 0 or said["goes_on"] else "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(training, "together", together)
    return lambda apart, goes_on=True: said.update(apart=apart, goes_on=goes_on)


@pytest.mark.parametrize(
    ("run", "apart", "verdict"),
    [("deterministic, compiled", 0.0, "ok"), ("deterministic, compiled", 1e-6, "WRONG"),
     ("not deterministic", 0.04, "ok"), ("not deterministic", 0.06, "WRONG"), ("not deterministic", math.nan, "WRONG")],
)  # fmt: skip
def test_a_run_that_goes_on_otherwise_is_found(run, apart, verdict, task, second_half):
    second_half(apart)
    row = written(*models.compare_resumed(task, run, models.RUNS[run]))
    assert row["verdict"] == verdict
    assert row["of"] == ("step 7" if apart else "step 1")


def test_a_run_that_began_anew_did_not_go_on(task, second_half):
    second_half(0.0, goes_on=False)
    with pytest.raises(RuntimeError, match="did not go on after step 6"):
        models.compare_resumed(task, "deterministic", models.RUNS["deterministic, compiled"])


def test_rows_come_as_they_are_ready_and_one_that_fails_says_why():
    later = threading.Event()

    def slow() -> list[dict]:
        assert later.wait(5)
        return [{"model": "slow"}]

    jobs = {"slow": slow, "fails": lambda: {}[0], "fast": lambda: [{}]}
    rows = finished("model", jobs, ThreadPoolExecutor(3))
    first = [next(rows), next(rows)]
    assert {"model": "fails", "verdict": "FAILED", "note": "KeyError: 0"} in first
    later.set()
    assert list(rows) == [{"model": "slow"}]
