"""scripts/attention_kl_bound.py: its columns by their definitions, the tables against the known figures."""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.diagnostics import Subject, attention_kl_bound, run
from harness.errors import UserError
from measure.feedback import apply_feedback, feedback_layers, feedback_matrices
from measure.slopes import (
    attention_slopes,
    float64_copy,
    random_direction,
)
from model import GPT, GPTConfig
from tests.helpers import VARIANTS, every_normalizer, optimizer_of, save_model, tiny_corpus, tiny_gpt, train_by_hand


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A corpus and a checkpoint of each normalizer."""
    folder = tmp_path_factory.mktemp("bound")
    tiny_corpus(folder / "corpus", 3000, 1000, letters=None)
    for normalizer in VARIANTS:
        model = tiny_gpt(noise=0.3, normalizer=normalizer)
        optimizer = optimizer_of(model)
        train_by_hand(model, optimizer, steps=2)
        save_model(model, folder / normalizer / "best.pt", folder / "corpus", step=2)
        save_model(model, folder / normalizer / "ckpt.pt", folder / "corpus", step=2, optimizer=optimizer.state_dict())
    return folder


def measure(path: Path, **options):
    settings = {"data": None, "split": "val", "batches": 1, "batch_size": 1, "device": "cpu", "seed": 1337, "tau": 1.0}
    settings |= {"block_size": None, "bos": None}
    return attention_kl_bound.measure(Subject(str(path), argparse.Namespace(**settings | options)))


def test_the_command_writes_table_and_picture(run_folder, capsys):
    argv = [str(run_folder / "softmax1" / "ckpt.pt"), "--batches", "2", "--batch-size", "3", "--tau", "2"]
    run(attention_kl_bound.DIAGNOSTIC, argv)
    folder = run_folder / "softmax1" / "diagnostics"
    assert (folder / "attention_kl_bound.png").stat().st_size > 0
    found = json.loads((folder / "attention_kl_bound.json").read_text())
    assert (found["script"], found["step"], found["config"]["normalizer"]) == ("attention_kl_bound", 2, "softmax1")
    assert list(found["rows"][0]) == list(attention_kl_bound.COLUMNS)
    assert list(found["extremes"][0]) == list(attention_kl_bound.EXTREMES)
    assert "How to read it" in capsys.readouterr().out


@every_normalizer
def test_measures_every_head(run_folder, normalizer):
    found = measure(run_folder / normalizer / "ckpt.pt", direction="adamw", batches=2, batch_size=3, tau=2.0)
    assert [(row["layer"], row["head"]) for row in found.rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row, ends in zip(found.rows, found.tables["extremes"], strict=True):
        # the first query sees one key: under softmax it cannot move
        assert row["rows"] == 6 * (11 if normalizer == "softmax" else 12)
        assert 0 < row["tightness_forward"] <= 1 + 1e-9
        assert 0 < row["tightness_reverse"] <= 1 + 1e-9
        assert row["remainder_reverse"] <= row["bound_reverse"] == pytest.approx(2 * row["bound_forward"])
        for column in ("variance", "spread", "radius", "kl_forward", "kl_reverse"):
            assert 0 < ends[f"{column}_min"] <= row[column] <= ends[f"{column}_max"]
        assert ends["radius_min"] == pytest.approx(math.pi / ends["spread_max"])
    assert found.summary["rows"] == sum(row["rows"] for row in found.rows)


def test_the_columns_are_those_of_the_rows(run_folder):
    """From the slopes of one sequence, by the definitions."""
    found = measure(run_folder / "sink" / "ckpt.pt", direction="random", tau=50.0)
    checkpoint = torch.load(run_folder / "sink" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    text = np.fromfile(run_folder / "corpus" / "val.bin", dtype=np.uint16)[:12]
    model = float64_copy(model)
    direction = random_direction(model, 3e-3, 1337)  # the optimizer's learning rate and the default seed
    layers = attention_slopes(model, direction, torch.from_numpy(text.astype(np.int64)))
    rows = iter(found.rows)
    for alpha0, slopes in layers:
        for p, a in zip(alpha0.numpy(), slopes.numpy(), strict=True):
            row, q = next(rows), p * np.exp(50 * a)
            q /= q.sum(-1, keepdims=True)
            spread, variance = np.ptp(a, axis=-1), (p * a * a).sum(-1) - (p * a).sum(-1) ** 2
            log_ratio = np.log(p, where=p > 0, out=np.zeros_like(p)) - np.log(q, where=q > 0, out=np.zeros_like(q))
            expected = {
                "spread": np.median(spread),
                "radius": np.median(np.pi / spread),
                "variance": np.median(variance),
                "kl_forward": np.median((p * log_ratio).sum(-1)),
                "kl_reverse": np.median((-q * log_ratio).sum(-1)),
                "quadratic": np.median(50**2 * variance / 2),
                "bound_forward": np.median((50 * spread) ** 3 / (36 * np.sqrt(3))),
                "beyond_radius": np.mean(50 * spread > np.pi),
            }
            assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("direction", ["adamw", "gradient"])
def test_the_step_of_a_training_by_feedback_is_made_of_the_gradient_that_this_gives(run_folder, direction):
    model = tiny_gpt(noise=0.3, tie_embeddings=False)
    fa = apply_feedback(copy.deepcopy(model), "fa", 3)
    optimizer = optimizer_of(model)
    train_by_hand(model, optimizer, steps=2)
    more = {"optimizer": optimizer.state_dict(), "feedback": feedback_matrices(fa), "step": 2}
    steps = {}
    for how in ("fa", "backprop"):
        path = run_folder / how / "ckpt.pt"
        save_model(model, path, run_folder / "corpus", **more, config={"training": {"feedback": how}})
        settings = {"data": None, "split": "val", "batches": 1, "batch_size": 1, "device": "cpu", "seed": 1337}
        subject = Subject(
            str(path), argparse.Namespace(**settings, direction=direction, tau=1.0, block_size=None, bos=None)
        )
        measured = subject.model.double()
        steps[how], _ = attention_kl_bound.direction_of(subject, measured, torch.device("cpu"))
        assert not feedback_layers(measured)
    differ = {
        name for name, step in steps["fa"].items() if not torch.allclose(step, steps["backprop"][name], rtol=1e-6)
    }
    assert "transformer.h.0.attn.c_attn.weight" in differ
    assert "transformer.h.1.mlp.c_proj.weight" in differ
    if direction == "gradient":  # up to the length that both are given
        heads = [steps[how]["lm_head.weight"].flatten() for how in ("fa", "backprop")]
        assert torch.nn.functional.cosine_similarity(*heads, dim=0) == pytest.approx(1)


def test_without_the_optimizers_state_another_direction_is_advised_and_works(run_folder):
    path = run_folder / "softmax" / "best.pt"
    with pytest.raises(UserError, match=r"best\.pt holds no optimizer state.*--direction gradient"):
        run(attention_kl_bound.DIAGNOSTIC, [str(path), "--out", str(run_folder / "nothing")])
    assert not (run_folder / "nothing").exists()
    found = measure(path, direction="gradient", batches=1)
    assert found.summary["rows"] == 4 * 11
