"""Slopes against finite differences, the update against the optimizer itself, the tables against the known figures."""

import argparse
import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.checkpoint import save_checkpoint
from harness.corpus_writing import write_corpus
from harness.diagnostics import Subject, attention_kl_bound, run
from harness.errors import UserError, run_cli
from harness.optimizers import saved_optimizer
from harness.tokenizer import Bytes
from measure import rays
from measure.divergence import kl_divergence
from measure.probe import capture_qk
from measure.slopes import (
    adamw_direction,
    attention_slopes,
    float64_copy,
    gradient_direction,
    length,
    random_direction,
)
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
TINY = GPTConfig(block_size=12, vocab_size=256, n_layer=2, n_head=2, n_embd=8, bias=True)
NORMALIZERS = ("softmax", "softmax1", "sink")


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(TINY, **changes))
    with torch.no_grad():
        for p in model.parameters():  # far from their initial values, so that the attention is far from uniform
            p += 0.3 * torch.randn(p.shape)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def moved(model: GPT, direction: dict, tau: float) -> GPT:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += tau * direction[name]
    return other


@torch.no_grad()
def logits_of(model: GPT, idx: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer, (H, T, T + 1), the null slot last (−inf without one), from one ordinary forward pass."""
    with capture_qk(model) as captured:
        model(idx[None])
    found = []
    for attn, q, k in captured:
        logits = q[0] @ k[0].mT / math.sqrt(q.size(-1))
        nulls = {"softmax": -math.inf, "softmax1": 0.0}
        null = attn.sink if attn.normalizer == "sink" else torch.full((q.size(1),), nulls[attn.normalizer])
        found.append(torch.cat((logits, null.to(logits).view(-1, 1, 1).expand(-1, len(idx), 1)), -1))
    return found


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_slopes_are_the_total_derivative_of_the_logits(normalizer, backward):
    model = float64_copy(tiny(normalizer=normalizer, backward=backward))
    idx, direction, h = tokens(12), random_direction(model, lr=1.0, seed=1), 1e-6
    plus, minus = (logits_of(moved(model, direction, t), idx) for t in (h, -h))
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    for (alpha0, slopes), here, up, down in zip(
        attention_slopes(model, direction, idx), logits_of(model, idx), plus, minus, strict=True
    ):
        null = normalizer != "softmax"
        assert alpha0.shape == slopes.shape == (2, 12, 13 if null else 12)
        seen = torch.cat((visible, torch.ones(12, 1, dtype=torch.bool)), -1)[:, : 12 + null]
        differences = ((up - down) / (2 * h))[..., : 12 + null]
        # off by h² of the third derivatives, some 1e4 here, and by ε/h of the logits, up to 100
        torch.testing.assert_close(slopes[:, seen], differences[:, seen], rtol=1e-7, atol=1e-7)
        # what a query cannot see has no weight, and does not widen the spread
        assert (alpha0[:, ~seen] == 0).all()
        assert (slopes.amax(-1) <= slopes.masked_fill(~seen, -math.inf).amax(-1)).all()
        assert (slopes.amin(-1) >= slopes.masked_fill(~seen, math.inf).amin(-1)).all()
        expected = here[..., : 12 + null].masked_fill(~seen, -math.inf).softmax(-1)
        torch.testing.assert_close(alpha0, expected, rtol=1e-12, atol=1e-15)
        if normalizer == "softmax1":
            assert (slopes[..., -1] == 0).all()
    assert [block.attn.backward_mode for block in model.transformer.h] == [backward] * 2


def test_a_small_real_step_moves_the_attention_by_half_the_variance():
    model = float64_copy(tiny(normalizer="softmax1"))
    idx, direction, h = tokens(12), random_direction(model, lr=1.0, seed=1), 1e-4
    after = list(attention_slopes(moved(model, direction, h), direction, idx))
    for (alpha0, slopes), (alpha_h, _) in zip(attention_slopes(model, direction, idx), after, strict=True):
        mean = (alpha0 * slopes).sum(-1, keepdim=True)
        variance = (alpha0 * (slopes - mean) ** 2).sum(-1)
        for kl in (kl_divergence(alpha0.log(), alpha_h.log()), kl_divergence(alpha_h.log(), alpha0.log())):
            # the next order is h, times derivatives of the size of the slopes, up to some 10
            torch.testing.assert_close(kl, h**2 * variance / 2, rtol=1e-2, atol=1e-13)


# --- directions -------------------------------------------------------------------------------------------------------


def optimizer_of(model: GPT) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), lr=3e-3, betas=(0.9, 0.99))


def train(model: GPT, optimizer, steps: int, clip: float = 0.5) -> None:
    for step in range(steps):
        x = tokens(4, 13, seed=step)
        model(x[:, :-1], x[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def info_of(optimizer) -> dict:
    return {"optimizer": copy.deepcopy(optimizer.state_dict()), "config": {"optimizer": {"grad_clip": 0.5, "lr": 7.0}}}


def next_update(model, batches, info: dict) -> dict:
    clip = info.get("config", {}).get("optimizer", {}).get("grad_clip")
    return adamw_direction(model, saved_optimizer(model, info, "ckpt.pt"), batches, clip)


@pytest.mark.parametrize("backward", ["full", "ste"])
def test_adamw_is_the_next_update_of_the_run(backward):
    model = tiny(normalizer="sink", backward=backward).double()
    optimizer = optimizer_of(model)
    train(model, optimizer, steps=3)
    info, copied = info_of(optimizer), float64_copy(model)
    batch = tokens(4, 13, seed=0)
    halves = [(half[:, :-1], half[:, 1:]) for half in batch.split(2)]  # the mean over two is that of the whole
    direction = next_update(copied, halves, info)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, steps=1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(direction[name], p.detach() - before[name], rtol=1e-9, atol=1e-15)
        # the copy is where it was, up to nothing
        assert torch.equal(dict(copied.named_parameters())[name], before[name])


def test_adamw_by_hand():
    model = tiny().double()
    optimizer = optimizer_of(model)
    train(model, optimizer, steps=2)
    x = tokens(4, 13, seed=9)
    batch = [(x[:, :-1], x[:, 1:])]
    direction = next_update(float64_copy(model), batch, info_of(optimizer) | {"config": {}})
    model(*batch[0])[1].backward()
    for name, decay in (("transformer.h.1.mlp.c_fc.weight", 0.1), ("transformer.h.0.ln_1.weight", 0.0)):
        p = dict(model.named_parameters())[name]
        state, g = optimizer.state[p], p.grad
        m = (0.9 * state["exp_avg"] + 0.1 * g) / (1 - 0.9**3)
        v = (0.99 * state["exp_avg_sq"] + 0.01 * g * g) / (1 - 0.99**3)
        torch.testing.assert_close(
            direction[name], -3e-3 * (decay * p + m / (v.sqrt() + 1e-8)).detach(), rtol=1e-8, atol=1e-12
        )


def test_gradient_and_random_have_the_learning_rate_as_root_mean_square():
    model = float64_copy(tiny())
    x = tokens(4, 13)
    down, at_random = gradient_direction(model, [(x[:, :-1], x[:, 1:])], 1e-3), random_direction(model, 1e-3, 0)
    count = sum(p.numel() for p in model.parameters())
    for direction in (down, at_random):
        assert list(direction) == [name for name, _ in model.named_parameters()]
        assert length(direction) == pytest.approx(1e-3 * math.sqrt(count), rel=1e-12)
    model(x[:, :-1], x[:, 1:])[1].backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    along = sum((down[name] * g).sum() for name, g in gradient.items())
    assert along.item() == pytest.approx(-length(down) * length(gradient), rel=1e-12)
    assert length(random_direction(model, 1e-3, 0)) == length(at_random)
    assert not torch.equal(
        random_direction(model, 1e-3, 1)["transformer.wte.weight"], at_random["transformer.wte.weight"]
    )


def test_an_optimizer_state_that_is_not_there_or_does_not_fit():
    model = tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, steps=1)
    info, x = info_of(optimizer), tokens(4, 13)
    batch = [(x[:, :-1], x[:, 1:])]
    fresh = {"optimizer": optimizer_of(tiny()).state_dict()}
    for nothing in ({}, {"source": "hf:gpt2"}, fresh):
        with pytest.raises(UserError, match=r"ckpt\.pt holds no optimizer state.*--direction gradient"):
            next_update(float64_copy(model), batch, nothing)
    for changes in ({"n_layer": 3}, {"n_embd": 16}):
        with pytest.raises(UserError, match=r"does not fit its model.*--direction gradient"):
            next_update(float64_copy(tiny(**changes)), batch, info)
    momentum = torch.optim.SGD(model.parameter_groups(0.1), lr=0.1, momentum=0.9)
    train(model, momentum, steps=1)
    with pytest.raises(UserError, match="--direction gradient"):
        next_update(float64_copy(model), batch, info_of(momentum))


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A corpus and a checkpoint of each normalizer."""
    folder = tmp_path_factory.mktemp("bound")
    text = bytes(np.random.default_rng(0).integers(32, 127, 4000).tolist())
    write_corpus(folder / "corpus", [("train", text), ("val", text[:1000])], Bytes(), source="made up")
    for normalizer in NORMALIZERS:
        model = tiny(normalizer=normalizer)
        optimizer = optimizer_of(model)
        train(model, optimizer, steps=2)
        checkpoint = {"model": model.state_dict(), "model_args": asdict(model.config), "step": 2}
        checkpoint["corpus"] = {"folder": str(folder / "corpus")}
        (folder / normalizer).mkdir()
        save_checkpoint(folder / normalizer / "best.pt", checkpoint)
        save_checkpoint(folder / normalizer / "ckpt.pt", checkpoint | {"optimizer": optimizer.state_dict()})
    return folder


def measure(path: Path, **options):
    settings = {"data": None, "split": "val", "batches": 1, "batch_size": 1, "device": "cpu", "seed": 1337, "tau": 1.0}
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


@pytest.mark.parametrize("normalizer", NORMALIZERS)
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


@pytest.mark.parametrize("direction", ["adamw", "gradient", "random"])
def test_a_model_without_attention_is_one_line_that_names_the_weight(run_folder, capsys, direction):
    broken = torch.load(run_folder / "softmax" / "ckpt.pt", weights_only=True)
    broken["model"]["transformer.h.1.attn.c_attn.weight"][3, 5] = torch.nan
    save_checkpoint(run_folder / "softmax" / "broken.pt", broken)
    out = run_folder / "nothing"
    argv = [str(run_folder / "softmax" / "broken.pt"), "--direction", direction, "--out", str(out)]
    assert run_cli(lambda: run(attention_kl_bound.DIAGNOSTIC, argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "transformer.h.1.attn.c_attn.weight holds 1 of 192 weights that are NaN or Inf" in error
    assert not out.exists()


def test_help_explains_every_column(run_folder, capsys):
    found = measure(run_folder / "softmax" / "ckpt.pt", direction="random")
    with pytest.raises(SystemExit):
        run(attention_kl_bound.DIAGNOSTIC, ["--help"])
    columns, extremes, curve = re.split(r"extremes:\n|curve, in the JSON:\n", capsys.readouterr().out)
    for rows, shown in ((found.rows, columns), (found.tables["extremes"], extremes), (found.tables["curve"], curve)):
        assert all(re.search(rf"\b{column}\b", shown) for column in rows[0])


@pytest.mark.parametrize("n", [1, 4, 5, 2**24 + 2])
def test_the_median_of_any_number_of_rows(n):
    """More than torch.quantile takes: 2²⁴ rows of a head are 16,384 windows of 1,024 tokens."""
    shuffled = (torch.arange(n) * 5 + 1).remainder(n) if n % 5 else torch.arange(n)  # coprime to n: a permutation
    assert rays.median(shuffled.double()) == (n - 1) / 2


def test_what_a_user_may_get_wrong(run_folder):
    for path, *options, message in (
        ("ckpt.pt", "--tau", "-1", "--tau -1: above 0"),
        ("ckpt.pt", "--tau", "nan", "--tau nan: above 0"),
        ("best.pt", "best.pt holds no optimizer state.*--direction gradient"),
        ("none.pt", "no checkpoint"),
    ):
        argv = [str(run_folder / "softmax" / path), *options, "--out", str(run_folder / "nothing")]
        with pytest.raises(UserError, match=message):
            run(attention_kl_bound.DIAGNOSTIC, argv)
    assert not (run_folder / "nothing").exists()
    found = measure(run_folder / "softmax" / "best.pt", direction="gradient", batches=1)  # as the message advises
    assert found.summary["rows"] == 4 * 11


def test_the_demonstration_needs_no_checkpoint(tmp_path):
    """As a user runs it; REFERENCE's figures, and tightness down to τ = 1e-8."""
    script = [sys.executable, str(ROOT / "scripts" / "attention_kl_bound.py"), "--demo"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(figure in done.stdout for figure in ("0.00128341443", "0.467833617", "0.326989004", "0.999989976"))
    found = json.loads((tmp_path / "out" / "attention_kl_bound" / "attention_kl_bound.json").read_text())
    assert found["rows"][1] == pytest.approx(
        {
            "tau": 0.5,
            "kl_reverse": 0.034843166,
            "kl_forward": 0.033172060,
            "quadratic": 0.031261169,
            "bound_reverse": 0.008808601,
            "tightness_reverse": 0.406648,
            "tightness_forward": 0.433869,
        },
        abs=5e-7,
    )
    assert len(found["random_cases"]) == 100
    assert found["summary"]["random_cases_forward_max"] == pytest.approx(0.995373899, abs=1e-9)
    coin = {row["tau"]: row for row in found["bernoulli"]}
    assert coin[0.3]["tightness_reverse"] == pytest.approx(0.990386945, abs=1e-9)
    assert coin[1e-8]["tightness_reverse"] == pytest.approx(1, abs=20 * np.finfo(float).eps)
    assert (tmp_path / "out" / "attention_kl_bound" / "attention_kl_bound.png").stat().st_size > 0
