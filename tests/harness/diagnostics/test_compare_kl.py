"""Divergences of two models against a plain float64 computation."""

import json
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness.corpus_writing import write_corpus
from harness.diagnostics import Result, compare_kl, run
from harness.errors import UserError
from harness.tokenizer import Bytes, Chars
from measure import predictions
from model import GPT
from tests.helpers import covered, save_model, tiny_gpt

TEXT = bytes(np.random.default_rng(0).integers(32, 127, 4000).tolist())


def save(folder: Path, name: str, corpus: Path | None, seed: int = 0, **changes) -> GPT:
    model = tiny_gpt(seed, noise=0.3, n_layer=1, **changes)
    save_model(model, folder / name / "ckpt.pt", corpus, step=seed)
    return model.double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    corpora = {"bytes": Bytes(), "chars": Chars("".join(map(chr, range(256))))}
    for name, tokenizer in corpora.items():
        write_corpus(folder / name, [("train", TEXT), ("val", TEXT[:1000])], tokenizer, source="made up")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return {
        "base": save(folder, "base", folder / "bytes", seed=1),
        "near": save(folder, "near", folder / "bytes", seed=2, normalizer="softmax1"),
        "short": save(folder, "short", None, seed=3, block_size=8),
    }


def compare(folder: Path, *names: str, options: tuple = ()) -> dict:
    out = folder / "_".join(["out", *names, *map(str, options)]).replace("/", "")
    paths = [str(folder / name / "ckpt.pt") for name in names]
    argv = [*paths, "--batches", "3", "--batch-size", "2", *options, "--out", str(out)]
    run(compare_kl.DIAGNOSTIC, argv)
    return json.loads((out / "compare_kl.json").read_text())


@pytest.fixture(scope="module")
def plain(folder, models) -> dict:
    return compare(folder, "base", "near")


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("largest", [0.0, 9.0])
def test_no_legend_of_the_picture_lies_on_a_curve(tau, largest):
    """A histogram and curves that fill their panels; and two models that are the same."""
    bins = [
        {"from": 10.0**n, "to": 10.0 ** (n + 1), "kl_forward": 100 * (n == 0), "kl_reverse": 100} for n in range(-3, 1)
    ]
    values = dict.fromkeys(("mean", "rmse", "p95"), largest / 90) | {"max": largest}
    curve = [{"position": t, "divergence": "kl_reverse", **values} for t in range(12)]
    tables = {"histogram": bins, "by_position": curve}
    figure = compare_kl.draw(Result([], {} if tau is None else {"tau": tau}, [], tables), "other")
    if largest:
        assert not covered(figure)
    left, right = figure.axes
    top = left.transData.transform([(1, 100)])[0, 1]
    assert left.get_legend().get_window_extent().y0 > top
    assert [panel.get_ylabel() for panel in figure.axes] == ["number of positions", "KL, nats"]
    assert all(tick == int(tick) for tick in right.get_xticks())


def expected_divergences(reference: GPT, other: GPT, T: int) -> dict[str, np.ndarray]:
    """(windows, T) each, of six windows spread evenly over the split, all at once."""
    tokens = torch.from_numpy(np.frombuffer(TEXT[:1000], dtype=np.uint8).astype(np.int64))
    starts = np.arange(0, 999 // T * T, T)  # the last token is a target only
    starts = starts[np.linspace(0, len(starts) - 1, 6).astype(int)]
    x = torch.stack([tokens[s : s + T] for s in starts])
    with torch.no_grad():
        log_p, log_q = (m(x)[0].log_softmax(-1) for m in (reference, other))
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    found = {
        "kl_forward": kl(log_p, log_q),
        "kl_reverse": kl(log_q, log_p),
        "jensen_shannon": (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        "total_variation": (p - q).clamp(min=0).sum(-1),
        "hellinger": (1 - (p * q).sqrt().sum(-1)).sqrt(),
        "renyi": (p**2 / q).sum(-1).log(),  # order 2
    }
    return {name: values.numpy() for name, values in found.items()}


def test_against_a_plain_computation(folder, models, capsys):
    found = compare(folder, "base", "near", options=("--order", "2", "--worst", "3"))
    assert "How to read it" in capsys.readouterr().out
    expected = expected_divergences(models["base"], models["near"], T=12)
    functions = {
        "mean": np.mean,
        "rmse": lambda x, axis=None: np.sqrt(np.mean(x**2, axis=axis)),
        "p95": lambda x, axis=None: np.quantile(x, 0.95, axis=axis),
        "max": np.max,
    }
    # The models ran in float32, which leaves log-probabilities of some −10 off by some 1e-6.
    near = {"rel": 1e-4, "abs": 1e-6}
    assert [row["divergence"] for row in found["rows"]] == list(expected)
    assert found["summary"]["positions"] == 72
    for row in found["rows"]:
        values = expected[row["divergence"]]
        assert {how: row[how] for how in functions} == pytest.approx(
            {h: f(values) for h, f in functions.items()}, **near
        )
    for name in ("kl_forward", "kl_reverse"):
        for how in ("rmse", "p95", "max"):
            over = functions[how](expected[name]) / expected[name].mean()
            assert found["summary"][f"{name}_{how}_over_mean"] == pytest.approx(over, rel=1e-4)
    for row in found["by_position"]:
        values = expected[row["divergence"]][:, row["position"]]
        assert {how: row[how] for how in functions} == pytest.approx(
            {h: f(values) for h, f in functions.items()}, **near
        )
    assert len(found["by_position"]) == 12 * 6
    assert sum(b["kl_forward"] for b in found["histogram"]) == sum(b["kl_reverse"] for b in found["histogram"]) == 72
    for b in found["histogram"][1:-1]:
        inside = (expected["kl_reverse"] >= b["from"]) & (expected["kl_reverse"] < b["to"])
        assert b["kl_reverse"] == inside.sum()


def test_the_worst_positions_are_shown_with_their_text(folder, models):
    found = compare(folder, "base", "near", options=("--worst", "4", "--tau", "0.01"))
    reverse = np.sort(expected_divergences(models["base"], models["near"], T=12)["kl_reverse"].ravel())[::-1]
    assert [at["kl_reverse"] for at in found["worst"]] == pytest.approx(list(reverse[:4]), rel=1e-4)
    for at in found["worst"]:
        before, following = (literal_eval(at[key]).encode() for key in ("text", "next"))
        assert TEXT[: at["position"]].endswith(before)
        assert TEXT[at["position"] : at["position"] + 1] == following
        x = torch.tensor([list(before)])  # the window up to there
        with torch.no_grad():
            for name, model in (("reference", models["base"]), ("other", models["near"])):
                p, token = model(x)[0][0, -1].softmax(-1).max(0)
                shown, probability = at[name].rsplit(" ", 1)
                assert shown == repr(Bytes().decode([token.item()]))
                assert float(probability) == pytest.approx(p.item(), abs=6e-4)


def test_whether_a_hinge_would_fire(folder, plain):
    rows = plain["rows"]
    reverse = next(row for row in rows if row["divergence"] == "kl_reverse")
    tau = (reverse["mean"] + reverse["rmse"]) / 2
    found = compare(folder, "base", "near", options=("--tau", str(tau)))
    for row, fires in zip(rows, found["hinge"], strict=True):
        assert {how: fires[how] for how in ("mean", "rmse", "p95", "max")} == {
            how: max(row[how] - tau, 0) > 0 for how in ("mean", "rmse", "p95", "max")
        }
    assert any("the mean does not fire, while the rmse, p95 and max do" in note for note in found["notes"])


def test_a_model_is_where_it_is_and_several_are_compared_with_one(folder, models):
    found = compare(folder, "base", "near", "base", options=("--tau", "0"))["checkpoints"]
    assert [entry["checkpoint"] for entry in found] == [str(folder / name / "ckpt.pt") for name in ("near", "base")]
    assert all(row[how] == 0 for row in found[1]["rows"] for how in ("mean", "rmse", "p95", "max"))
    assert all(found[1]["summary"][f"kl_{d}_max"] == 0 for d in ("forward", "reverse"))
    over = [f"kl_{d}_{how}_over_mean" for d in ("forward", "reverse") for how in ("rmse", "p95", "max")]
    assert [found[1]["summary"][name] for name in over] == [None] * 6  # over a mean of 0
    assert any("no aggregate fires" in note for note in found[1]["notes"])
    assert any("all four aggregates fire" in note for note in found[0]["notes"])


def test_the_shorter_context_and_the_corpus_that_is_known(folder, models):
    for names in (("base", "short"), ("short", "base")):
        found = compare(folder, *names)
        assert found["summary"]["positions"] == 6 * 8
        pair = [models[name] for name in names]
        expected = expected_divergences(*pair, T=8)["kl_forward"]
        assert found["rows"][0]["mean"] == pytest.approx(expected.mean(), rel=1e-4)


def test_never_more_than_a_micro_batch_and_the_same_in_blocks(folder, plain, monkeypatch):
    batches, blocks = [], []
    forward, log_softmax = GPT.forward, torch.log_softmax
    monkeypatch.setattr(GPT, "forward", lambda self, x, *rest: batches.append(x.shape) or forward(self, x, *rest))
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: blocks.append(x.shape) or log_softmax(x, dim))
    monkeypatch.setattr(predictions, "BLOCK", 256 * 5)
    again = compare(folder, "base", "near", options=("--order", "0.5"))
    assert batches == [(2, 12)] * 6
    assert max(rows for rows, _ in blocks) == 5
    for one, other in zip(plain["rows"], again["rows"], strict=True):
        assert one.pop("divergence") == other.pop("divergence")
        assert one == pytest.approx(other, rel=1e-12)


def test_what_cannot_be_compared(folder, models):
    save(folder, "wide", folder / "bytes", vocab_size=320)
    save(folder, "chars_model", folder / "chars")
    for names, options, message in (
        (("base", "wide"), (), "256 and 320 token ids: only models of one vocabulary"),
        (("base", "chars_model"), (), r"other tokens \(bytes and chars\): only models of one vocabulary"),
        (("base",), (), "is alone: give a reference"),
        (("short", "short"), (), "name one with --data"),
    ):
        with pytest.raises(UserError, match=message):
            compare(folder, *names, options=options)
        assert not (folder / "_".join(["out", *names, *options])).exists()


def test_padding_of_the_vocabulary_is_no_text():
    assert compare_kl.as_text(Bytes(), [104, 10]) == r"'h\n'"
    assert compare_kl.as_text(Bytes(), [300]) == "<300>"
