"""scripts/quantization.py: what rounding costs, on a model with a planted outlier and in the report."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.batches import gather, training_offsets
from harness.corpus_writing import write_corpus
from harness.diagnostics import Result
from harness.diagnostics.quantization import COLUMNS, DIAGNOSTIC, LAYERS
from harness.generation import generate
from harness.tokenizer import Bytes
from measure.perplexity import score, sliding_offsets
from measure.quantize import (
    HEAD,
    RESIDUAL,
    Scheme,
    calibrate,
    quantized,
    schemes,
)
from model import GPT
from tests.helpers import diagnose, read_json, save_model, tiny_gpt

T, V = 16, 256


def random_gpt(**changes) -> GPT:
    """Weights large enough for confident predictions."""
    return tiny_gpt(std=0.4, block_size=T, vocab_size=V, n_embd=16, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Windows that the model itself has drawn: it predicts them as well as can be, so that rounding it does harm."""
    folder, generator = tmp_path_factory.mktemp("corpus"), torch.Generator().manual_seed(0)
    start = torch.randint(V, (128, 1), generator=generator)
    tokens = torch.cat([start, *generate(random_gpt(), start, T - 1, generator=generator)], dim=1)
    train, val = (bytes(part.flatten().tolist()) for part in tokens.split(64))
    write_corpus(folder, [("train", train), ("val", val + b"!")], Bytes(), source="test")
    return folder


def report(folder: Path) -> dict:
    return read_json(folder / "diagnostics" / "quantization.json")


def test_a_planted_outlier_channel_is_found_and_named(tmp_path, corpus, capsys):
    model = random_gpt()
    rises = []
    for name in ("clean", "planted"):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name / "ckpt.pt", corpus)
        assert diagnose(DIAGNOSTIC, tmp_path / name / "ckpt.pt", "--batches", 4, "--seeds", 1) == 0
        written = report(tmp_path / name)
        rises.append({row["scheme"]: row["perplexity_rise"] for row in written["rows"]})
        with (
            torch.no_grad()
        ):  # one channel 300 times as large, the weights that read it as much smaller: the same model
            block = model.transformer.h[1]
            block.ln_1.weight[3] *= 300
            block.ln_1.bias[3] *= 300
            block.attn.c_attn.weight[:, 3] /= 300
    clean, planted = rises
    first = [report(tmp_path / name)["rows"][0]["perplexity"] for name in ("clean", "planted")]
    assert first[1] == pytest.approx(first[0], rel=1e-5)  # the same function, up to float32's rounding
    assert planted["W8A8 min-max"] > 2 * clean["W8A8 min-max"] > 0
    alone = {scheme: rise for scheme, rise in planted.items() if scheme.startswith("A8 only")}
    assert max(alone, key=alone.get) == "A8 only attn.c_attn input"
    assert alone["A8 only attn.c_attn input"] > 10 * abs(clean["A8 only attn.c_attn input"])
    ratios = [row["W8A8 min-max"] for row in written["layers"]]
    assert ratios == sorted(ratios)
    assert written["layers"][0]["name"] == "h.1.attn.c_attn"
    assert "one kind alone, at 8 bits: attn.c_attn input" in "; ".join(written["notes"])
    out = capsys.readouterr().out
    assert "lowest signal-to-noise ratio under W8A8 min-max: h.1.attn.c_attn" in out
    assert "How to read it" in out


@pytest.mark.parametrize("spread", [None, 0.1])
def test_the_pictures_legend_has_every_number_of_bits_and_a_spread_only_where_there_is_one(spread):
    schemes_and_rises = {"float": 0.0, "W8 per channel": 0.1, "W4 per channel": 2.0, "W6A6 min-max": 1.0}
    alone = dict.fromkeys(("A8 only residual stream", "A6 only residual stream"), 0.5)
    rows = [
        {"scheme": scheme, "perplexity": 10 + rise, "perplexity_rise": rise, "spread": spread}
        for scheme, rise in (schemes_and_rises | alone).items()
    ]
    figure = DIAGNOSTIC.draw(Result(rows, {}), "run")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["8 bits", "6 bits", "4 bits"]
    assert [("±" in panel.get_xlabel()) for panel in figure.axes[:2]] == [spread is not None] * 2


@pytest.mark.parametrize("largest", [1e-3, 0.5, 90.0, 1.4e5, 1e9])
def test_the_figures_along_the_rises_do_not_lie_on_each_other(largest):
    names = [scheme.name for scheme in schemes()]
    rises = {name: -0.003 if name.endswith("attn.c_proj input") else largest for name in names}
    rows = [{"scheme": name, "perplexity_rise": rise, "spread": None} for name, rise in rises.items()]
    figure = DIAGNOSTIC.draw(Result([{"scheme": "float", "perplexity": 1.0}, *rows], {}), "run")
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        low, high = axes.get_xlim()
        shown = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent() for label in shown]
        assert len(boxes) > 1
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def draw_losses(model: GPT, scheme: Scheme, corpus: Path, offsets: np.ndarray) -> list[float]:
    """The mean loss over the windows at `offsets`, with the ranges of each of two calibration draws."""
    train, val = (np.fromfile(corpus / f"{split}.bin", dtype=np.uint16).astype(np.int64) for split in ("train", "val"))
    x, y = (torch.from_numpy(np.stack([val[i + shift :][:T] for i in offsets])) for shift in (0, 1))
    losses = []
    for draw in range(2):
        starts = training_offsets(1337, draw, len(train), T, 32)
        windows = torch.from_numpy(np.stack([train[i : i + T] for i in starts]))
        ranges = calibrate(model, windows, 32, 99.99)
        with torch.no_grad(), quantized(model, scheme, ranges):
            losses.append(model(x, y)[1].item())
    return losses


def test_the_report(tmp_path, corpus):
    model = random_gpt()
    save_model(model, tmp_path / "ckpt.pt", corpus)
    argv = (tmp_path / "ckpt.pt", "--batches", 1, "--seeds", 2)
    assert diagnose(DIAGNOSTIC, *argv) == 0
    text = (tmp_path / "diagnostics" / "quantization.json").read_text()
    written = json.loads(text)
    first, *rows = written["rows"]
    tokens = np.fromfile(corpus / "val.bin", dtype=np.uint16)
    offsets = sliding_offsets(1024, T, T)[np.linspace(0, 63, 16).astype(int)]
    loss = score(model, [gather(tokens, offsets, T, torch.device("cpu"))], offsets, T).losses.mean()
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert first["perplexity_rise"] == 0
    assert [row["scheme"] for row in rows] == [scheme.name for scheme in schemes()]
    for row, scheme in zip(rows, schemes(), strict=True):
        assert set(row) == set(COLUMNS)
        assert row["perplexity_rise"] == pytest.approx(row["perplexity"] - first["perplexity"], abs=1e-9)
        assert row["loss_rise"] == pytest.approx(row["loss"] - first["loss"], abs=1e-9)
        assert (row["spread"] is not None) == scheme.calibrated(model)
        assert row["standard_error"] > 0
    by_name = {row["scheme"]: row for row in rows}
    for name, scheme in {
        "W4 per channel": Scheme("", 4, True),
        "W6A6 percentile": Scheme("", 6, False, 6, "percentile"),
        "W6A6 min-max": Scheme("", 6, False, 6, "min-max"),
        "A6 only residual stream": Scheme("", activation_bits=6, kinds=(RESIDUAL,)),
    }.items():
        losses = draw_losses(model, scheme, corpus, offsets)
        perplexities, row = np.exp(losses), by_name[name]
        close = 1e-5  # of a mean of float32 losses in batches of another shape; of their perplexity as a share
        assert row["loss"] == pytest.approx(np.mean(losses), rel=close)
        assert row["perplexity"] == pytest.approx(np.mean(perplexities), rel=close)
        if scheme.calibrated(model):
            spread, close = abs(perplexities[1] - perplexities[0]) / 2**0.5, 2 * close * perplexities[0]
            assert row["spread"] == pytest.approx(spread, abs=close)
            assert spread > 10 * close
    assert abs(by_name["W6A6 percentile"]["loss"] - by_name["W6A6 min-max"]["loss"]) > 1e-3
    assert {"name", "site", "layer", *LAYERS} == set(written["layers"][0])
    assert (tmp_path / "diagnostics" / "quantization.png").stat().st_size > 0

    assert diagnose(DIAGNOSTIC, *argv) == 0
    assert (tmp_path / "diagnostics" / "quantization.json").read_text() == text
    assert diagnose(DIAGNOSTIC, *argv[:-1], 1, "--seed", 5, "--head") == 0
    other = {row["scheme"]: row for row in report(tmp_path)["rows"]}
    assert f"A8 only {HEAD}" in other
    assert all(row["spread"] is None for row in list(other.values())[1:])
    for row, scheme in zip(rows, schemes(), strict=True):
        if scheme.activation_bits and not scheme.weight_bits:  # those with weights have the head's in them now
            assert (row["loss"] != other[scheme.name]["loss"]) == scheme.calibrated(model)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("scale", "known"), [(350.0, True), (4e3, False)])
def test_perplexities_of_hundreds_of_digits(tmp_path, corpus, scale, known):
    """Those below e^709 are numbers, rise and spread included; the rise over an infinite one is not known."""
    model = random_gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight *= scale
    save_model(model, tmp_path / "ckpt.pt", corpus)
    assert diagnose(DIAGNOSTIC, tmp_path / "ckpt.pt", "--batches", 1, "--seeds", 2, "--calibration", 2) == 0
    written = report(tmp_path)
    quantized_rows = written["rows"][1:]
    assert (written["rows"][0]["perplexity"] is not None) == known
    assert all((row["perplexity_rise"] is not None) == known for row in quantized_rows)
    if known:
        assert written["rows"][0]["perplexity"] > 1e160
        assert max(row["spread"] or 0 for row in quantized_rows) > 1e160
    assert not [note for note in written["notes"] if "nan" in note]
