"""scripts/weight_kurtosis.py: moments of every parameter, by part and by kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from harness.checkpoint import load_model
from harness.diagnostics import run
from harness.diagnostics.weight_kurtosis import DIAGNOSTIC
from measure.weights import KINDS, kind_of
from model import GPT
from tests.helpers import TODAY, read_json, save_model, shakespeares_nanogpt, tiny_gpt


def heavy_gpt(**config) -> GPT:
    """Every parameter with tails of its own."""
    model = tiny_gpt(vocab_size=17, **{"n_head": 3, "n_embd": 12, "normalizer": "sink"} | config)
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, mean=0.1 * i, std=0.02 * (i + 1))
        parameter.data.view(-1)[::7] *= 3
    return model


def measured(model: GPT, folder: Path) -> dict:
    """What the script writes about a checkpoint of the model."""
    run(DIAGNOSTIC, [str(save_model(model, folder / "ckpt.pt")), "--device", "cpu"])
    return read_json(folder / "diagnostics" / "weight_kurtosis.json")


def same_as_scipy(row: dict, values: np.ndarray) -> None:
    """To 1e-9, the promise: relative where it is above 1. float32 values are exact in float64."""
    x = values.astype(np.float64).ravel()
    expected = {
        "mean": x.mean(),
        "std": x.std(),
        "skewness": stats.skew(x),
        "excess_kurtosis": stats.kurtosis(x),
        "max_abs": np.abs(x).max(),
        "max_abs_over_std": np.abs(x).max() / x.std(),
    }
    assert (row["count"], row["nonfinite"]) == (x.size, 0)
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("shape", [{}, TODAY], ids=["GPT-2", "today"])
def test_every_parameter_and_every_kind_is_scipys(tmp_path, shape):
    model = heavy_gpt(**shape)
    result = measured(model, tmp_path)
    rows = {row["name"]: row for row in result["rows"]}
    has = {kind_of(name) for name, _ in model.named_parameters()}
    pools = {kind: [] for kind in KINDS if kind in has}
    assert len(pools) >= (8 if shape else 6)
    for name, parameter in model.named_parameters():
        same_as_scipy(rows[name], parameter.detach().numpy())
        pools[kind_of(name)].append(parameter.detach().numpy().ravel())
    pools["all"] = [x for arrays in pools.values() for x in arrays]
    kinds = {row["name"]: row for row in result["kinds"]}
    assert list(kinds) == list(pools)
    for kind, arrays in pools.items():
        same_as_scipy(kinds[kind], np.concatenate(arrays))
        assert result["summary"][f"excess_kurtosis/{kind}"] == kinds[kind]["excess_kurtosis"]
        assert result["summary"][f"max_abs_over_std/{kind}"] == kinds[kind]["max_abs_over_std"]


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_q_k_and_v_and_their_heads_are_cut_as_the_model_cuts_them(tmp_path, parameter):
    model = heavy_gpt()
    rows = {row["name"]: row for row in measured(model, tmp_path)["rows"]}
    name = f"transformer.h.1.attn.c_attn.{parameter}"
    value = model.get_parameter(name).detach().numpy()
    for i, part in enumerate("qkv"):
        third = value[12 * i : 12 * (i + 1)]
        same_as_scipy(rows[f"{name}[{part}]"], third)
        for head in range(3):
            same_as_scipy(rows[f"{name}[{part}, head {head}]"], third[4 * head : 4 * (head + 1)])


def test_grouped_keys_and_values_have_as_many_rows_as_heads(tmp_path):
    model = heavy_gpt(**TODAY)
    rows = {row["name"]: row for row in measured(model, tmp_path)["rows"]}
    name = "transformer.h.1.attn.c_attn.weight"
    value, start = model.get_parameter(name).detach().numpy(), 0
    for part, heads in {"q": 4, "k": 2, "v": 2}.items():
        assert f"{name}[{part}, head {heads}]" not in rows
        same_as_scipy(rows[f"{name}[{part}]"], value[start : start + 6 * heads])
        for head in range(heads):
            same_as_scipy(rows[f"{name}[{part}, head {head}]"], value[start : start + 6])
            start += 6
    assert start == len(value)


def test_the_tied_head_is_counted_once(tmp_path):
    model = heavy_gpt()
    result = measured(model, tmp_path)
    rows = [row for row in result["rows"] if "[" not in row["name"]]
    assert [row["name"] for row in rows] == [name for name, _ in model.named_parameters()]
    assert sum(row["count"] for row in rows) == sum(p.numel() for p in model.parameters())


def test_a_broken_weight_is_named_and_no_figure_is_made_of_what_is_left(tmp_path, capsys):
    model = heavy_gpt()
    weight = model.transformer.h[1].mlp.c_fc.weight
    with torch.no_grad():
        weight[0, 0], weight[1, 2] = float("nan"), float("inf")
    result = measured(model, tmp_path)
    (note,) = [note for note in result["notes"] if "NaN" in note]
    assert "transformer.h.1.mlp.c_fc.weight: 2 of its 576 numbers" in note
    assert note in capsys.readouterr().out
    (row,) = [row for row in result["rows"] if row["name"] == "transformer.h.1.mlp.c_fc.weight"]
    assert (row["nonfinite"], row["count"]) == (2, 574)
    assert result["summary"]["excess_kurtosis/MLP"] is result["summary"]["excess_kurtosis/all"] is None
    assert result["summary"]["excess_kurtosis/embedding"] is not None


def test_a_constant_weight_has_no_kurtosis_and_a_note(tmp_path):
    model = heavy_gpt()
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    result = measured(model, tmp_path)
    (row,) = [row for row in result["rows"] if row["name"] == "transformer.ln_f.weight"]
    assert (row["mean"], row["std"], row["excess_kurtosis"]) == (1, 0, None)
    assert any("transformer.ln_f.weight: all equal to 1" in note for note in result["notes"])


def test_a_constant_part_is_named_once_by_the_largest_that_is(tmp_path):
    model = heavy_gpt()
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight  # q, k and v: 12 rows each, 4 a head
        weight[4:8] = 0.5  # q, head 1
        weight[12:24] = 0  # k
        model.transformer.h[1].attn.c_attn.bias.zero_()
    result = measured(model, tmp_path)
    assert [note for note in result["notes"] if "no kurtosis" in note] == [
        "transformer.h.0.attn.c_attn.weight[k]: all equal to 0, so they have no kurtosis",
        "transformer.h.0.attn.c_attn.weight[q, head 1]: all equal to 0.5, so they have no kurtosis",
        "transformer.h.1.attn.c_attn.bias: all equal to 0, so they have no kurtosis",
    ]


@pytest.mark.parametrize("trained", [False, True])
def test_nanogpts_own_checkpoint(trained, tmp_path, nanogpt):
    path = shakespeares_nanogpt()[0] if trained else nanogpt[0]
    run(DIAGNOSTIC, [str(path), "--device", "cpu", "--out", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads((tmp_path / "weight_kurtosis.json").read_text())["rows"]}
    for name, parameter in load_model(path)[0].named_parameters():
        same_as_scipy(rows[name], parameter.detach().numpy())
    assert (tmp_path / "weight_kurtosis.png").stat().st_size > 10_000


def test_planted_tails_are_seen(tmp_path):
    """The kurtosis of N(0, 1) numbers of which a share p is multiplied by s: 3 (1 + p (s⁴ − 1)) / (1 + p (s² − 1))²."""
    model = tiny_gpt(n_layer=1, n_head=1, n_embd=128)
    values = np.random.default_rng(0).standard_normal(512 * 128).astype(np.float32)
    values[:655] *= 10  # 1 %
    model.transformer.h[0].mlp.c_fc.weight.data = torch.from_numpy(values).view(512, 128)
    rows = {row["name"]: row for row in measured(model, tmp_path)["rows"]}
    p = 655 / values.size
    expected = 3 * (1 + p * (10**4 - 1)) / (1 + p * (10**2 - 1)) ** 2 - 3
    # the eighth moment of a Gaussian is 105, so Σ x⁴ over the 655 is off by √(96/9/655) ≈ 13 %; three of these
    assert rows["transformer.h.0.mlp.c_fc.weight"]["excess_kurtosis"] == pytest.approx(expected, rel=0.4)
    assert rows["transformer.h.0.mlp.c_proj.weight"]["excess_kurtosis"] == pytest.approx(0, abs=6 * (24 / 65536) ** 0.5)
