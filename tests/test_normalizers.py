"""A normalizer is its entry in the table: one added there, and nowhere else, is trained, resumed, sampled and measured.

Two of a user's own: clipped softmax (Bondarenko et al. 2023), without parameters, and sigmoid attention (Ramapuram et
al. 2024), with a bias that each head learns, and with rows whose mass may exceed 1.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import train
from harness.batches import gather, spread
from harness.checkpoint import load_model
from harness.config import help_text
from harness.corpus import Corpus
from harness.errors import run_cli
from harness.generation import generate
from measure.perplexity import sliding_offsets
from measure.quantize import PROBABILITIES, sites, visiting
from model import (
    GPT,
    NORMALIZERS,
    Normalizer,
)
from scripts import activation_kurtosis, attention_kl_bound, quantization, sample, weight_kurtosis
from scripts import jacobian_energy as jacobian_script
from tests.helpers import squares_corpus, tiny_gpt

T, H, ZETA, GAMMA = 16, 2, 1.0, -0.03


def clipped(scores):
    return ((ZETA - GAMMA) * scores.softmax(-1) + GAMMA).clamp(0, 1)


def clipped_diagonal(scores, weights):
    p = scores.softmax(-1)
    return torch.where((weights > 0) & (weights < 1), (ZETA - GAMMA) * p * (1 - p), 0)


def sigmoid(scores, bias):
    return torch.sigmoid(scores + bias.view(-1, 1, 1))


ENTRIES = {
    "own_clipped": Normalizer(clipped, diagonal=clipped_diagonal),
    "own_sigmoid": Normalizer(sigmoid, parameters={"bias": lambda config: torch.full((config.n_head,), -1.0)}),
}
CONFIG = f"""
model: {{n_layer: 2, n_head: {H}, n_embd: 32, block_size: {T}, bias: false, dropout: 0.1}}
data: {{corpus: corpus}}
optimizer: {{lr: 1e-2, warmup_steps: 2, min_lr: 1e-3, decay_steps: 8}}
training: {{max_steps: 8, batch_size: 8, device: cpu, dtype: float32, checkpoint_interval: 4}}
evaluation: {{interval: 4, batches: 4}}
tracking: {{wandb: disabled, log_interval: 1}}
"""


@pytest.fixture(params=ENTRIES)
def name(request, monkeypatch) -> str:
    """Of an entry that the table holds during this test."""
    monkeypatch.setitem(NORMALIZERS, request.param, ENTRIES[request.param])
    return request.param


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    squares_corpus()


def command(monkeypatch, main, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return run_cli(main) or 0


def trained(monkeypatch, run: str, normalizer: str, *changes) -> dict:
    arguments = ("config.yaml", "--run.name", run, "--model.normalizer", normalizer, *changes)
    assert command(monkeypatch, train.main, *arguments) == 0
    return torch.load(f"out/{run}/ckpt.pt", weights_only=True)


def losses(run: str) -> list[float]:
    lines = map(json.loads, Path(f"out/{run}/metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def own_weights(name: str, q, k, bias=None) -> np.ndarray:
    """P (B, H, T, T) in float64, row by row, from the definition and from q, k (B, H, T, D)."""
    q, k = q.double().numpy(), k.double().numpy()
    P = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        scores = k[b, h, : i + 1] @ q[b, h, i] / math.sqrt(q.shape[-1])
        if name == "own_clipped":
            p = np.exp(scores - scores.max())
            P[b, h, i, : i + 1] = np.clip((ZETA - GAMMA) * p / p.sum() + GAMMA, 0, 1)
        else:
            P[b, h, i, : i + 1] = 1 / (1 + np.exp(-scores - bias[h].item()))
    return P


def heads(x):
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


@torch.no_grad()
def queries_keys_values(model: GPT, idx) -> list:
    """(q, k, v) of each layer, (B, H, T, D), from the blocks' own parts."""
    found = []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(
            lambda _m, _i, x, attn=block.attn: found.append([heads(z) for z in attn.c_attn(x).chunk(3, dim=-1)])
        )
    model(idx)
    for block in model.transformer.h:
        block.ln_1._forward_hooks.clear()
    return found


def weights_of_layers(model: GPT, name: str, idx) -> list[np.ndarray]:
    layers = zip(model.transformer.h, queries_keys_values(model, idx), strict=True)
    return [own_weights(name, q, k, getattr(block.attn, "bias", None)) for block, (q, k, _) in layers]


# --- training, resuming, sampling -------------------------------------------------------------------------------------


def test_training_and_resuming_take_what_the_table_holds(name, workplace, monkeypatch, capsys):
    whole = trained(monkeypatch, "whole", name)
    assert f"{name} has no fused form" in (said := capsys.readouterr().out)
    assert "by the materialized kernel" in said
    trained(monkeypatch, "stopped", name, "--training.max_steps", 4)
    resumed = trained(monkeypatch, "stopped", name)
    assert "resuming out/stopped from step 4" in capsys.readouterr().out
    assert whole["model_args"]["normalizer"] == name
    assert all(torch.equal(x, resumed["model"][key]) for key, x in whole["model"].items())
    assert losses("whole") == losses("stopped")
    softmax = trained(monkeypatch, "softmax", "softmax")
    assert losses("softmax") != losses("whole")
    learned = set(whole["model"]) - set(softmax["model"])
    assert learned == {f"transformer.h.{i}.attn.{p}" for i in (0, 1) for p in ENTRIES[name].parameters}
    assert all((whole["model"][key] != -1).any() for key in learned)  # trained, from their start


def test_a_fine_tuning_to_another_normalizer_starts_what_that_learns_anew(workplace, monkeypatch):
    for name, entry in ENTRIES.items():
        monkeypatch.setitem(NORMALIZERS, name, entry)
    scaled = Normalizer(lambda scores, bias: bias * scores.softmax(-1), parameters={"bias": lambda _: torch.ones(())})
    monkeypatch.setitem(NORMALIZERS, "scaled", scaled)
    how = ("--training.max_steps", 1, "--optimizer.lr", 0, "--optimizer.min_lr", 0)
    base = trained(monkeypatch, "base", "own_sigmoid", "--training.max_steps", 1)["model"]
    for name, start in {"scaled": torch.ones(()), "own_clipped": None}.items():
        tuned = trained(monkeypatch, name, name, "--training.init_from", "out/base/ckpt.pt", *how)["model"]
        for key in base.keys() | tuned.keys():
            if key.endswith(".attn.bias"):
                assert (key in tuned) == (start is not None)
                assert start is None or torch.equal(tuned[key], start)
            else:
                assert torch.equal(tuned[key], base[key])


def test_the_forward_pass_is_that_of_the_entrys_weights(name, workplace, monkeypatch):
    trained(monkeypatch, "run", name, "--training.max_steps", 4)
    model = load_model("out/run/ckpt.pt")[0].double()
    idx = torch.from_numpy(Corpus("corpus").tokens["val"][None, :T].astype(np.int64))
    outputs = []
    model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _m, inputs: outputs.append(heads(inputs[0])))
    P, (_, _, v) = weights_of_layers(model, name, idx)[1], queries_keys_values(model, idx)[1]
    np.testing.assert_allclose(outputs[0].detach(), P @ v.numpy(), rtol=1e-12, atol=1e-14)


def test_sampling_with_a_cache_is_sampling_without(name, workplace, monkeypatch, capsys):
    trained(monkeypatch, "run", name, "--training.max_steps", 4)
    model, _ = load_model("out/run/ckpt.pt")
    prompt = torch.tensor([[48, 49]])
    cached, plain = (
        [token.item() for token in generate(model, prompt, 12, temperature=0, use_cache=use)] for use in (True, False)
    )
    assert cached == plain
    capsys.readouterr()
    assert command(monkeypatch, sample.main, "out/run/ckpt.pt", "--prompt", "01", "--max_new_tokens", 12,
                   "--temperature", 0) == 0  # fmt: skip
    assert capsys.readouterr().out.encode() == bytes([48, 49, *cached, *b"\n"])


def test_the_config_reads_the_table(name, workplace, monkeypatch, capsys):
    assert f"sigmoid or relu or entmax15 or {name}; default: softmax" in help_text()
    assert command(monkeypatch, train.main, "config.yaml", "--model.normalizer", "clip") == 2
    assert f"sigmoid or relu or entmax15 or {name}, not 'clip'" in capsys.readouterr().err


def test_the_model_is_one_graph(name):
    """As with the project's own in tests/test_model.py."""
    torch.manual_seed(0)
    model = tiny_gpt(normalizer=name, n_layer=1)
    idx = torch.arange(8)[None]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = (f(idx, idx)[1] for f in (model, compiled))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- the diagnostics --------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(name, workplace, monkeypatch):
    """(name, model, val windows (3, T + 1)) of a checkpoint, and a function that runs a script on just these."""
    trained(monkeypatch, "run", name)
    model, _ = load_model("out/run/ckpt.pt")
    tokens = Corpus("corpus").tokens["val"]

    def report(script) -> dict:
        amount = () if script is weight_kurtosis else ("--batches", 1, "--batch-size", 3)
        assert command(monkeypatch, script.main, "out/run/ckpt.pt", *amount) == 0
        return json.loads(Path(f"out/run/diagnostics/{script.DIAGNOSTIC.name}.json").read_text())

    return name, model, tokens, report


def windows_of(tokens, offsets):
    return gather(tokens, np.asarray(offsets), T, torch.device("cpu"))


def measured_windows(tokens):
    """Those that `--batches 1 --batch-size 3` takes: three whole ones, spread evenly."""
    offsets = spread(sliding_offsets(len(tokens) - T + 1, T, T), 3)
    return windows_of(tokens, offsets)


def test_the_training_run_logs_the_kurtosis_of_its_own_attention(measured):
    name, model, tokens, _ = measured
    offsets = spread(sliding_offsets(len(tokens) - T + 1, T, T), 8)
    layers = weights_of_layers(model.double(), name, windows_of(tokens, offsets)[0])
    last = json.loads(Path("out/run/metrics.jsonl").read_text().splitlines()[-1])
    expected = np.mean([stats.kurtosis(P.ravel()) for P in layers])
    logged = last["activation_kurtosis/val/attention_probabilities"]
    assert logged == pytest.approx(expected, rel=1e-4)  # of float32 weights


def test_activations_are_of_its_own_weights(measured):
    name, model, tokens, report = measured
    found = report(activation_kurtosis)
    assert f"{name} is no softmax" in "; ".join(found["notes"])
    layers = weights_of_layers(model.double(), name, measured_windows(tokens)[0])
    rows = {row["name"]: row for row in found["rows"]}
    for layer, P in enumerate(layers):
        kurtosis = rows[f"transformer.h.{layer}.attn.probabilities"]["excess_kurtosis"]
        assert kurtosis == pytest.approx(stats.kurtosis(P.ravel()), rel=1e-4)
    for row in found["heads"]:
        P = layers[row["layer"]][:, row["head"]]
        assert row["row_mass"] == pytest.approx(P.sum(-1).mean(), rel=1e-4)
        assert abs(row["row_mass"] - 1) > 0.02
        assert row["sink_rate"] == pytest.approx((P[..., 0].mean(-1) > 0.3).mean())
        assert row["entropy"] == pytest.approx(own_entropy(P), rel=1e-4)


def own_entropy(P: np.ndarray) -> float:
    """Of each row (…, T) over its own mass, averaged."""
    return float(np.nan_to_num(stats.entropy(P, axis=-1)).mean())


def test_the_jacobian_is_its_own(measured):
    name, model, tokens, report = measured
    found = report(jacobian_script)
    notes = "; ".join(found["notes"])
    assert f"jacobian_offdiag has a closed form of a softmax alone, not of {name}" in notes
    model, (x, y) = model.double(), measured_windows(tokens)
    qkv = queries_keys_values(model, x)
    layers = weights_of_layers(model, name, x)
    gradients = []

    def keep_gradient(_module, inputs) -> None:
        inputs[0].register_hook(lambda grad: gradients.insert(0, heads(grad)))

    for block in model.transformer.h:
        block.attn.c_proj.register_forward_pre_hook(keep_gradient)
    model(x, y)[1].backward()
    for row in found["rows"]:
        layer, h = row["layer"], row["head"]
        q, k, v = (z[:, h] for z in qkv[layer])
        g = (gradients[layer][:, h] @ v.mT).tril().numpy()
        P = layers[layer][:, h]
        s, d = np.zeros_like(P), np.zeros_like(P)
        for b, i in np.ndindex(*P.shape[:2]):
            n = i + 1
            if name == "own_clipped":
                p = torch.softmax(k[b, :n] @ q[b, i] / math.sqrt(q.size(-1)), 0).numpy()
                inside = (P[b, i, :n] > 0) & (P[b, i, :n] < 1)
                jacobian = (ZETA - GAMMA) * inside[:, None] * (np.diag(p) - np.outer(p, p))
            else:
                jacobian = np.diag(P[b, i, :n] * (1 - P[b, i, :n]))
            s[b, i, :n], d[b, i, :n] = jacobian.T @ g[b, i, :n], np.diag(jacobian) * g[b, i, :n]
        close = 1e-3  # of gradients in float32 on the script's side
        assert row["row_mass"] == pytest.approx(P.sum(-1).mean(), rel=1e-4)
        assert row["entropy"] == pytest.approx(own_entropy(P), rel=1e-4)
        assert row["e_full"] == pytest.approx((s**2).sum(), rel=close)
        assert row["jacobian_offdiag"] is None
        if name == "own_clipped":
            assert row["e_diag"] == pytest.approx((d**2).sum(), rel=close)
            assert row["r_diag"] == pytest.approx((d**2).sum() / (s**2).sum(), rel=close)
            assert row["r_diag"] + row["r_lateral"] + row["r_cross"] == pytest.approx(1, rel=1e-9)
        else:
            assert row["e_diag"] is row["cos_diag"] is row["jacobian_diag"] is None
    cosines = {mode: [row[f"cos_{mode}"] for row in found["gradients"]] for mode in ("diagonal", "ste")}
    assert None not in cosines["ste"]
    assert (None in cosines["diagonal"]) == (name == "own_sigmoid")
    assert ("does not say its Jacobian's diagonal" in notes) == (name == "own_sigmoid")


def test_the_kl_along_a_ray_is_refused(measured, monkeypatch, capsys):
    name, *_ = measured
    capsys.readouterr()
    assert command(monkeypatch, attention_kl_bound.main, "out/run/ckpt.pt", "--batches", 1, "--batch-size", 1) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert f"normalizer '{name}' is no softmax" in error[-1]


def test_quantization_rounds_its_own_weights(measured):
    name, model, tokens, report = measured
    found = report(quantization)
    assert all(row["loss"] is not None for row in found["rows"])
    seen = []

    def look(site, x, _then):
        seen.append(x.numpy())
        return x

    x, y = measured_windows(tokens)
    with torch.no_grad():
        before = model(x, y)[1]
        with visiting([site for site in sites(model) if site.kind == PROBABILITIES], look):
            torch.testing.assert_close(model(x, y)[1], before)
    for P, expected in zip(seen, weights_of_layers(model.double(), name, x), strict=True):
        np.testing.assert_allclose(P, expected, rtol=1e-4, atol=1e-6)


def test_the_weights_it_brings_are_measured(measured):
    name, model, _, report = measured
    found = {row["name"] for row in report(weight_kurtosis)["rows"]}
    assert {key for key, _ in model.named_parameters()} <= found
    assert ("bias" in {row["name"] for row in report(weight_kurtosis)["kinds"]}) == (name == "own_sigmoid")


def test_a_range_beyond_1_is_not_cut_off(workplace, monkeypatch):
    """Weights of any size: their range comes from the calibration windows, and 8 bits of it cost next to nothing."""
    monkeypatch.setitem(NORMALIZERS, "relu", Normalizer(lambda scores: 5 * scores.isfinite() + scores.clamp(min=0)))
    trained(monkeypatch, "run", "relu", "--training.max_steps", 1)
    command(monkeypatch, quantization.main, "out/run/ckpt.pt", "--batches", 1, "--batch-size", 3)
    rows = json.loads(Path("out/run/diagnostics/quantization.json").read_text())["rows"]
    alone = next(row for row in rows if row["scheme"] == f"A8 only {PROBABILITIES}")
    assert abs(alone["loss_rise"]) < 1e-3
    assert alone["spread"] is not None
