"""The split of attention's gradient against autograd's own Jacobian, and what the parameters' gradients lose."""

import argparse
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from harness.checkpoint import load_model, save_checkpoint
from harness.corpus_writing import write_corpus
from harness.diagnostics import Result, Subject, argument_parser, run
from harness.diagnostics import jacobian_energy as script
from harness.errors import run_cli
from harness.tokenizer import Bytes
from measure import gradients, jacobian
from measure.jacobian import (
    backpropagate,
    backward_mode,
    cosine_and_norm_ratio,
    dot_products,
    jacobian_energy,
    pool,
    split_of_sequence,
    take_gradients,
)
from measure.probe import capture_attention
from model import GPT, GPTConfig, attention

DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = [
    *("mean_attention", "entropy", "row_mass", "e_full", "e_diag", "e_lateral", "e_cross"),
    *("r_diag", "r_lateral", "r_cross", "r_offdiag", "cos_diag", "cos_ste", "jacobian_diag", "jacobian_offdiag"),
]
SINK = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
NORMALIZERS = {"softmax": None, "softmax1": torch.zeros(3, dtype=torch.float64), "sink": SINK}
every_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def qkvg(B=2, H=3, T=7, D=4, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(4)]


def energy(q, k, v, grad_out, normalizer="softmax", **kwargs) -> dict[str, torch.Tensor]:
    null_logit = SINK[: q.size(1)] if normalizer == "sink" else None
    return jacobian_energy(q, k, v, grad_out, normalizer, null_logit=null_logit, **kwargs)


def row_weights(scores: torch.Tensor, null_logit: torch.Tensor | None) -> torch.Tensor:
    """One row's weights, over an explicit null slot where there is one."""
    if null_logit is None:
        return torch.softmax(scores, 0)
    return torch.softmax(torch.cat((null_logit.view(1), scores)), 0)[1:]


def by_autograd(q, k, v, grad_out, null_logits) -> dict[str, torch.Tensor]:
    """The columns, row by row from the diagonal and the rest of `torch.autograd.functional.jacobian`."""
    B, H, T, D = q.shape
    sums = {name: torch.zeros(B, H, dtype=torch.float64) for name in (*COLUMNS, "e_ste", "d_s", "g_s")}
    for b in range(B):
        for h in range(H):
            null_logit = None if null_logits is None else null_logits[h]
            for i in range(T):
                scores = k[b, h, : i + 1] @ q[b, h, i] / math.sqrt(D)
                jac = torch.autograd.functional.jacobian(lambda s, null=null_logit: row_weights(s, null), scores)
                A = row_weights(scores, null_logit)
                g = v[b, h, : i + 1] @ grad_out[b, h, i]
                diagonal = torch.diag(jac.diagonal())
                s, d, o = jac @ g, diagonal @ g, (jac - diagonal) @ g
                slots = A if null_logit is None else torch.cat((A, 1 - A.sum().view(1)))
                for name, value in {
                    "mean_attention": A.sum() / (T * (T + 1) / 2),
                    "entropy": torch.distributions.Categorical(slots).entropy() / T,
                    "row_mass": A.sum() / T,
                    "jacobian_diag": diagonal.square().sum() / T,
                    "jacobian_offdiag": (jac - diagonal).square().sum() / T,
                    "e_full": s @ s,
                    "e_diag": d @ d,
                    "e_lateral": o @ o,
                    "e_cross": 2 * d @ o,
                    "e_ste": g @ g,
                    "d_s": d @ s,
                    "g_s": g @ s,
                }.items():
                    sums[name][b, h] += value
    columns = {name: sums[name].mean(0) for name in COLUMNS}
    for name in ("e_full", "e_diag", "e_lateral", "e_cross"):
        columns[name] = sums[name].sum(0)
    for part in ("diag", "lateral", "cross"):
        columns[f"r_{part}"] = columns[f"e_{part}"] / columns["e_full"]
    columns["r_offdiag"] = 1 - columns["r_diag"]
    columns["cos_diag"] = (sums["d_s"] / (sums["e_diag"] * sums["e_full"]).sqrt()).mean(0)
    columns["cos_ste"] = (sums["g_s"] / (sums["e_ste"] * sums["e_full"]).sqrt()).mean(0)
    return columns


# --- the split --------------------------------------------------------------------------------------------------------


@every_normalizer
def test_the_split_is_that_of_autograds_jacobian(normalizer):
    q, k, v, grad_out = qkvg()
    found = energy(q, k, v, grad_out, normalizer)
    expected = by_autograd(q, k, v, grad_out, NORMALIZERS[normalizer])
    assert list(found) == COLUMNS
    for name in COLUMNS:
        assert (found[name].shape, found[name].dtype) == ((3,), torch.float64)
        # Some 100 roundings of numbers up to 1e4 (g reaches 50, and its squares are summed).
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n} {m}"
        )


@every_normalizer
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_the_energies_are_those_of_the_scores_that_attention_differentiates(normalizer, backward):
    """With one key dimension a head, one-hot queries and keys, dQ Kᵀ of `attention` *is* the gradient of the scores."""
    T = 5
    _, _, v, grad_out = qkvg(B=1, T=T)
    scores = qkvg(B=1, T=T, D=T, seed=1)[0]
    q, k = scores.clone().requires_grad_(), torch.eye(T, dtype=torch.float64).expand(1, 3, T, T)
    v, grad_out = (F.pad(x, (0, 1)) for x in (v, grad_out))  # D = T
    null_logit = SINK if normalizer == "sink" else None
    out = attention(q, k, v, normalizer=normalizer, backward=backward, null_logit=null_logit, scale=1.0)
    out.backward(grad_out)
    found = energy(q.detach(), k, v, grad_out, normalizer, scale=1.0)
    dot = {"full": found["e_full"], "diagonal": found["e_diag"], "ste": None}[backward]
    if dot is None:
        dot = (grad_out @ v.transpose(-2, -1)).tril().square().sum((0, 2, 3))
    torch.testing.assert_close(q.grad.square().sum((0, 2, 3)), dot, rtol=1e-11, atol=0)


SIZES = {"B": st.integers(1, 3), "H": st.integers(1, 3), "T": st.integers(1, 9), "D": st.integers(1, 4)}


@settings(max_examples=60)
@given(st.fixed_dictionaries(SIZES), st.integers(0, 2**16), st.sampled_from(list(NORMALIZERS)), st.floats(1e-3, 10.0))
def test_the_energies_and_the_ratios_add_up(sizes, seed, normalizer, scale):
    found = energy(*qkvg(**sizes, seed=seed), normalizer, scale=scale)
    parts = found["e_diag"] + found["e_lateral"] + found["e_cross"]
    # d and o may cancel to a far smaller s: the identity is exact to the rounding of the largest of the energies, and
    # of g² itself where all three nearly vanish in a saturated row.
    largest = torch.stack([found[f"e_{part}"].abs() for part in ("full", "diag", "lateral")]).amax(0)
    assert ((found["e_full"] - parts).abs() <= 1e-13 * largest + 1e-26).all()
    usual = found["e_full"] > 1e-6 * largest
    ratios = found["r_diag"] + found["r_lateral"] + found["r_cross"]
    assert ((ratios - 1).abs()[usual] <= 1e-6).all()
    torch.testing.assert_close(found["r_offdiag"], 1 - found["r_diag"], equal_nan=True)


@every_normalizer
def test_row_blocks_of_any_size_give_the_same(normalizer, monkeypatch):
    tensors = qkvg(T=13)
    whole = energy(*tensors, normalizer)
    for rows in (1, 2, 5, 12):
        monkeypatch.setattr(jacobian, "BLOCK_ELEMENTS", rows * 3 * 13)
        for name, value in energy(*tensors, normalizer).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-13)  # sums in another order


def test_maps_are_never_larger_than_a_row_block(monkeypatch):
    monkeypatch.setattr(jacobian, "BLOCK_ELEMENTS", 4 * 3 * 64)
    shapes, original = [], jacobian.attention_rows

    def watched(*args, **kwargs):
        shapes.append(tuple((rows := original(*args, **kwargs))[0].shape))
        return rows

    monkeypatch.setattr(jacobian, "attention_rows", watched)
    energy(*qkvg(T=64))
    assert shapes == 2 * [(1, 3, 4, end) for end in range(4, 65, 4)]  # one sequence after the other, no future keys


@settings(max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(list(NORMALIZERS)))
def test_any_split_into_batches_gives_what_one_batch_does(sizes, normalizer):
    tensors = qkvg(B=sum(sizes), T=5)
    whole = energy(*tensors, normalizer)
    null_logit = {} if normalizer == "softmax" else {"null_logit": NORMALIZERS[normalizer]}
    splits = []
    for batch in zip(*(x.split(sizes) for x in tensors), strict=True):
        splits += [split_of_sequence(*one, scale=0.5, **null_logit) for one in zip(*batch, strict=True)]
    for name, value in pool(splits).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-13)


def test_pooled_over_heads_energies_add_up_and_the_rest_is_averaged():
    tensors = qkvg()
    heads = energy(*tensors)
    pooled = pool([split_of_sequence(*one, scale=0.5) for one in zip(*tensors, strict=True)], over_heads=True)
    assert pooled["e_diag"].item() == pytest.approx(heads["e_diag"].sum().item(), rel=1e-12)
    ratio = heads["e_diag"].sum() / heads["e_full"].sum()
    assert pooled["r_diag"].item() == pytest.approx(ratio.item(), rel=1e-12)
    for name in ("entropy", "cos_diag", "cos_ste", "jacobian_offdiag"):
        assert pooled[name].item() == pytest.approx(heads[name].mean().item(), rel=1e-12)


def test_uniform_attention_by_hand():
    """T = 2, no scores: rows (1) and (½, ½); with v = (1, 0) and dL/dO = 1 the second row's g is (1, 0), m = ½."""
    zeros, ones = torch.zeros(1, 1, 2, 1, dtype=torch.float64), torch.ones(1, 1, 2, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 2, 1)
    found = {name: value.item() for name, value in energy(zeros, zeros, v, ones).items()}
    assert found == pytest.approx(
        {
            "mean_attention": 2 / 3,
            "entropy": math.log(2) / 2,
            "row_mass": 1,
            "e_full": 1 / 8,  # s = ±¼
            "e_diag": 1 / 16,  # d = (¼, 0)
            "e_lateral": 1 / 16,  # o = (0, −¼)
            "e_cross": 0,
            "r_diag": 0.5,
            "r_lateral": 0.5,
            "r_cross": 0,
            "r_offdiag": 0.5,
            "cos_diag": math.sqrt(0.5),
            "cos_ste": 0.5,  # g = 1 in the first row too: (g·s) / |g||s| = ¼ / (√2 · √⅛)
            "jacobian_diag": 1 / 16,  # (2/16 + 0) / 2 rows
            "jacobian_offdiag": 1 / 16,
        },
        rel=1e-14,
    )
    found = {name: value.item() for name, value in energy(zeros, zeros, v, ones, "softmax1").items()}
    assert found["row_mass"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["entropy"] == pytest.approx((math.log(2) + math.log(3)) / 2)
    # A = ½: s = d + 0 = ¼;  A = ⅓, ⅓: m = ⅓, s = (2/9, −1/9), d = (2/9, 0)
    assert found["e_full"] == pytest.approx(1 / 16 + 5 / 81)
    assert found["e_diag"] == pytest.approx(1 / 16 + 4 / 81)
    assert found["e_lateral"] == pytest.approx(1 / 81)


def test_float32_is_computed_in_float64():
    tensors = [x.float() for x in qkvg()]
    for name, value in jacobian_energy(*tensors).items():
        torch.testing.assert_close(value, jacobian_energy(*(x.double() for x in tensors))[name], rtol=0, atol=0)


def test_a_zero_norm_has_no_ratio_and_no_cosine_and_others_are_averaged_without_it():
    q, k, v, grad_out = qkvg()
    whole = energy(q[:1], k[:1], v[:1], grad_out[:1])
    grad_out[1] = 0
    for name, value in energy(q, k, v, grad_out).items():
        if name.startswith(("e_", "r_", "cos_")):
            torch.testing.assert_close(value, whole[name])
    grad_out[:] = 0
    found = energy(q, k, v, grad_out)
    assert all(found[name].isnan().all() for name in COLUMNS if name.startswith(("r_", "cos_")))
    assert all((found[name] == 0).all() for name in COLUMNS if name.startswith("e_"))


def test_the_first_query_alone_passes_nothing_back():
    found = energy(*qkvg(T=1))
    assert (found["e_full"] == 0).all()
    assert found["cos_ste"].isnan().all()
    # With a null slot A < 1, and the row is still a single key: all that passes is local.
    assert energy(*qkvg(T=1), "softmax1")["r_diag"].tolist() == pytest.approx([1, 1, 1], rel=1e-14)


def test_nan_is_not_averaged_away():
    tensors = qkvg()
    tensors[3][1, 2, 4, 0] = math.nan
    found = energy(*tensors)
    assert found["e_full"].isfinite().tolist() == found["cos_diag"].isfinite().tolist() == [True, True, False]
    assert found["mean_attention"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": "sparsemax"}, "unknown normalizer 'sparsemax': choose from softmax, softmax1, sink"),
        ({"normalizer": "sink"}, "null_logit"),
        ({"null_logit": SINK}, "null_logit"),
        ({"grad_out": torch.ones(2, 3, 7, 5)}, "must share one shape"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    arguments = dict(zip(("q", "k", "v", "grad_out"), qkvg(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        jacobian_energy(**arguments)


# --- a model ----------------------------------------------------------------------------------------------------------


def tiny_gpt(normalizer="softmax", **kwargs) -> GPT:
    torch.manual_seed(3)
    config = GPTConfig(
        block_size=12, vocab_size=256, n_layer=2, n_head=2, n_embd=8, bias=True, normalizer=normalizer, **kwargs
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.4)
    return model


def windows(B=3, T=12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


@every_normalizer
def test_captured_tensors_give_the_gradients_that_autograd_gives(normalizer):
    """dL/dO and q, k, v are right if the gradient of c_attn's output follows from them; and the hooks are gone."""
    model = tiny_gpt(normalizer).double()
    x, y = windows()
    before = model(x, y)[0]
    grads = []
    handles = [
        block.attn.c_attn.register_full_backward_hook(lambda _m, _i, grad: grads.insert(0, grad[0]))
        for block in model.transformer.h
    ]
    with capture_attention(model) as captured:
        _, loss = model(x, y)
        loss.backward()
    for handle in handles:
        handle.remove()
    assert [attn for attn, *_ in captured] == [block.attn for block in model.transformer.h]
    for (attn, q, k, v, grad_out), expected in zip(captured, grads, strict=True):
        q, k, v = (z.clone().requires_grad_() for z in (q, k, v))
        null_logit = attn.sink if normalizer == "sink" else None
        attention(q, k, v, normalizer=normalizer, null_logit=null_logit).backward(grad_out)
        found = torch.cat([z.grad.transpose(1, 2).flatten(2) for z in (q, k, v)], dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]
    assert hooks == []
    assert torch.equal(model(x, y)[0], before)


@every_normalizer
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_sequence_by_sequence_is_the_gradient_of_the_batch(normalizer, backward):
    model, (x, y) = tiny_gpt(normalizer).double(), windows()
    with backward_mode(model, backward):
        loss = backpropagate(model, x, y)
        found = take_gradients(model)
    assert all(p.grad is None for p in model.parameters())
    assert [block.attn.backward_mode for block in model.transformer.h] == ["full", "full"]
    other = tiny_gpt(normalizer, backward=backward).double()
    _, expected = other(x, y)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-14)
    for name, parameter in other.named_parameters():
        scale = parameter.grad.abs().max()  # sums of a few hundred terms, in another order
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-13 * scale.item())


def test_splits_of_a_batch_are_of_the_batchs_mean_loss():
    model, (x, y) = tiny_gpt("softmax1").double(), windows()
    splits = [[], []]
    backpropagate(model, x, y, splits)
    take_gradients(model)
    with capture_attention(model) as captured:
        model(x, y)[1].backward()
    for layer, (_, *tensors) in enumerate(captured):
        whole = jacobian_energy(*tensors, "softmax1")
        for name, value in pool(splits[layer]).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-20)


def test_cosine_and_norm_ratio_by_numpy(monkeypatch):
    monkeypatch.setattr(jacobian, "BLOCK_ELEMENTS", 7)
    a, b = np.random.default_rng(0).standard_normal((2, 5, 6))
    products = dot_products(torch.from_numpy(a), torch.from_numpy(b))
    cosine, ratio = cosine_and_norm_ratio(products)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert cosine == pytest.approx((a * b).sum() / norms[0] / norms[1], rel=1e-13)
    assert ratio == pytest.approx(norms[0] / norms[1], rel=1e-13)
    zero = torch.zeros(5, 6, dtype=torch.float64)
    assert cosine_and_norm_ratio(dot_products(zero, torch.from_numpy(b))) == (None, 0.0)
    assert cosine_and_norm_ratio(dot_products(torch.from_numpy(a), zero)) == (None, None)


def nanogpt_windows() -> tuple[Path, list[int], str]:
    checkpoint, text = DATA / "nanogpt_checkpoint" / "ckpt.pt", DATA / "tinyshakespeare" / "input.txt"
    if not (checkpoint.exists() and text.exists()):
        pytest.skip(f"no {checkpoint} and {text}")
    characters = text.read_text()
    vocabulary = {c: i for i, c in enumerate(sorted(set(characters)))}
    return checkpoint, [vocabulary[c] for c in characters[int(0.9 * len(characters)) :][: 32 * 64 + 1]]


def test_figures_of_the_nanogpt_checkpoint():
    checkpoint, ids = nanogpt_windows()
    model = load_model(checkpoint)[0].double()
    ids, splits = torch.tensor(ids), [[], []]
    loss = backpropagate(model, ids[:-1].view(32, 64), ids[1:].view(32, 64), splits)
    assert loss == pytest.approx(2.509927359, abs=5e-10)
    names = ["entropy", "r_diag", "r_lateral", "r_cross", "cos_diag", "cos_ste", "jacobian_diag", "jacobian_offdiag"]
    for (layer, head), expected in {
        (0, 0): (3.094014, 0.942443, 0.075507, -0.017950, 0.972982, 0.740674, 0.047045, 0.007375),
        (0, 1): (2.999989, 0.844221, 0.044521, 0.111258, 0.980240, 0.763348, 0.050588, 0.007976),
        (1, 1): (2.911717, 1.274319, 0.705432, -0.979750, 0.724375, 0.531659, 0.054012, 0.008961),
    }.items():
        columns = pool(splits[layer])
        assert [columns[name][head].item() for name in names] == pytest.approx(expected, abs=5.1e-7, rel=0)
        parts = sum(columns[f"e_{part}"][head] for part in ("diag", "lateral", "cross"))
        assert parts.item() == pytest.approx(columns["e_full"][head].item(), rel=1e-12)


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus of 5 validation windows and a checkpoint trained on it, so to say; the working directory."""
    monkeypatch.chdir(tmp_path)
    text = bytes(np.random.default_rng(0).integers(1, 256, 61, dtype=np.uint8))
    write_corpus("corpus", [("train", text), ("val", text)], Bytes(), source="test")
    save(tiny_gpt("sink", backward="ste"))
    return tmp_path


def save(model: GPT, path: str = "ckpt.pt") -> None:
    state = {"model": model.state_dict(), "model_args": vars(model.config), "step": 7, "corpus": {"folder": "corpus"}}
    save_checkpoint(Path(path), state)


def main(*argv: str) -> int:
    return run_cli(lambda: run(script.DIAGNOSTIC, list(argv)))


def read(path: str) -> dict:
    return json.loads(Path(path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def by_hand(model: GPT, offsets: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss over windows, and the parameters' gradients, in one batch."""
    tokens = torch.from_numpy(np.fromfile("corpus/val.bin", dtype=np.uint16).astype(np.int64))
    batch = torch.stack([tokens[start : start + 13] for start in offsets])
    model.zero_grad()
    _, loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_the_script_reports_split_and_gradients(folder, capsys):
    assert main("ckpt.pt", "--batches", "2", "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    assert "cos_diag near 1" in printed
    assert "far below 1 says that it is critical" in printed
    assert Path("diagnostics/jacobian_energy.png").stat().st_size > 10_000
    report = read("diagnostics/jacobian_energy.json")
    assert (report["script"], report["step"], report["config"]["backward"]) == ("jacobian_energy", 7, "ste")
    assert [(row["layer"], row["head"]) for row in report["rows"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(report["rows"][0]) == ["layer", "head", *COLUMNS]
    for layer in (0, 1):
        rows = [row for row in report["rows"] if row["layer"] == layer]
        pooled = report["layers"][layer]
        assert pooled["r_diag"] == pytest.approx(sum(r["e_diag"] for r in rows) / sum(r["e_full"] for r in rows))
        assert pooled["cos_diag"] == pytest.approx(sum(r["cos_diag"] for r in rows) / 2)
    total = {name: sum(row[name] for row in report["rows"]) for name in ("e_full", "e_diag", "e_lateral", "e_cross")}
    for part in ("diag", "lateral", "cross"):
        assert report["summary"][f"r_{part}"] == pytest.approx(total[f"e_{part}"] / total["e_full"], rel=1e-12)

    # Windows 0, 1, 2, 4 of 5; two batches' mean losses differentiated are twice the mean over all four.
    losses, gradients = {}, {}
    for backward in ("full", "diagonal", "ste"):
        model = tiny_gpt("sink", backward=backward)
        losses[backward], gradients[backward] = by_hand(model, [0, 12, 24, 48])
    assert report["summary"]["loss"] == pytest.approx(losses["full"].item(), rel=1e-6)
    assert [row["parameter"] for row in report["gradients"]] == list(gradients["full"])
    # float32 gradients, summed in another order
    rounding = {"rel": 1e-4, "abs": 1e-5}
    for row in report["gradients"]:
        full = gradients["full"][row["parameter"]].double().flatten()
        for mode in ("diagonal", "ste"):
            other = gradients[mode][row["parameter"]].double().flatten()
            assert row[f"cos_{mode}"] == pytest.approx(F.cosine_similarity(other, full, dim=0).item(), **rounding)
            assert row[f"norm_ratio_{mode}"] == pytest.approx((other.norm() / full.norm()).item(), **rounding)
    whole = {mode: torch.cat([g.double().flatten() for g in gradients[mode].values()]) for mode in gradients}
    parts = [name for name in gradients["full"] if ".c_attn." in name]
    qk = {mode: torch.cat([gradients[mode][name].double()[:16].flatten() for name in parts]) for mode in gradients}
    for prefix, vectors in (("gradient", whole), ("query_key_gradient", qk)):
        for mode in ("diagonal", "ste"):
            cosine = F.cosine_similarity(vectors[mode], vectors["full"], dim=0).item()
            ratio = (vectors[mode].norm() / vectors["full"].norm()).item()
            assert report["summary"][f"{prefix}_cos_{mode}"] == pytest.approx(cosine, **rounding)
            assert report["summary"][f"{prefix}_norm_ratio_{mode}"] == pytest.approx(ratio, **rounding)


def measured(*options: str) -> Result:
    return script.measure(Subject("ckpt.pt", arguments("ckpt.pt", *options)))


def arguments(*argv: str) -> argparse.Namespace:
    return argument_parser("jacobian_energy", "", 1, 2).parse_args(argv)


def test_energies_are_summed_over_batches_of_their_own_mean_loss(folder):
    five, one = measured("--batches", "5", "--batch-size", "1"), measured("--batches", "1", "--batch-size", "5")
    for row_of_five, row_of_one in zip(five.rows, one.rows, strict=True):
        assert row_of_five["e_full"] == pytest.approx(25 * row_of_one["e_full"], rel=1e-5)  # float32 gradients
        assert row_of_five["r_diag"] == pytest.approx(row_of_one["r_diag"], rel=1e-5)
    assert five.notes == one.notes == ["5 windows of 12 tokens"]


def test_the_model_is_left_as_it_was(folder):
    model = load_model("ckpt.pt")[0]
    x, y = windows()
    before = model(x, y)[0]
    subject = Subject("ckpt.pt", arguments("ckpt.pt"))
    script.measure(subject)
    assert torch.equal(subject.model(x, y)[0], before)
    assert all(p.grad is None for p in subject.model.parameters())
    assert [block.attn.backward_mode for block in subject.model.transformer.h] == ["ste", "ste"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), subject.model.parameters(), strict=True))


def test_several_checkpoints_go_into_one_json(folder):
    save(tiny_gpt(), "other.pt")
    assert main("ckpt.pt", "other.pt", "--out", "both") == 0
    first, second = read("both/jacobian_energy.json")["checkpoints"]
    assert (first["config"]["normalizer"], second["config"]["normalizer"]) == ("sink", "softmax")
    assert all(row["row_mass"] == pytest.approx(1) for row in second["rows"])
    assert all(0 < row["row_mass"] < 1 for row in first["rows"])
    assert len(list(Path("both").glob("*.png"))) == 2


def test_nan_weights_are_named_and_what_they_spoil_is_null(folder, capsys):
    model = tiny_gpt()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, :3] = math.nan  # a query of layer 1, head 0
    save(model)
    assert main("ckpt.pt") == 0
    report = read("diagnostics/jacobian_energy.json")
    notes = "\n".join(report["notes"])
    assert "transformer.h.1.attn.c_attn.weight holds 3 of 192 weights that are NaN or Inf" in notes
    assert "the loss is nan" in notes
    assert "attention weights that are NaN or Inf, in layer.head: 1.0\n" in notes
    assert "score gradients that are NaN or Inf, in layer.head: 0.0, 0.1, 1.0, 1.1\n" in notes
    for mode in ("full", "diagonal", "ste"):
        assert f"\n{mode} gradients that are NaN or Inf: transformer.wte.weight, " in notes
    assert report["summary"]["loss"] is None
    assert report["rows"][0]["entropy"] > 0  # before the damage
    assert all(row["e_full"] is row["cos_diag"] is None for row in report["rows"])
    assert "NaN or Inf" in capsys.readouterr().out


def test_a_gradient_that_overflows_is_named(folder, monkeypatch):
    """Straight through, gradients grow by orders of magnitude a layer; float32 ends at 3e38."""
    save(tiny_gpt())
    original = gradients.backpropagate

    def overflowing(model, x, y, splits=None):
        loss = original(model, x, y, splits)
        if model.transformer.h[0].attn.backward_mode == "ste":
            model.transformer.ln_f.bias.grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(gradients, "backpropagate", overflowing)
    result = measured()
    assert result.notes[1:] == ["ste gradients that are NaN or Inf: transformer.ln_f.bias"]
    assert (result.summary["gradient_cos_ste"], result.summary["gradient_norm_ratio_ste"]) == (None, None)
    assert result.summary["gradient_cos_diagonal"] > 0


def test_heads_and_parameters_without_a_gradient_are_named(folder):
    model = tiny_gpt()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:, 4:] = 0  # nothing reads head 1 of layer 1
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    save(model)
    result = measured()
    assert "no gradient reaches the scores, so no ratio and no cosine, in layer.head: 1.1" in result.notes
    row = result.rows[3]
    assert (row["e_full"], row["r_diag"], row["r_offdiag"], row["cos_diag"], row["cos_ste"]) == (0, *4 * [None])
    names = [f"transformer.h.0.{module}.{kind}" for module in ("ln_2", "mlp.c_fc") for kind in ("weight", "bias")]
    assert f"full gradients that are zero: {', '.join(names)}" in result.notes
    assert [row["cos_ste"] for row in result.tables["gradients"] if row["parameter"] in names] == 4 * [None]
    assert result.summary["gradient_cos_ste"] is not None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent.pt"], "no checkpoint absent.pt"),
        (["ckpt.pt", "--batches", "0"], "--batches 0: at least 1"),
        (["ckpt.pt", "--data", "nowhere"], "nowhere"),
        (["foreign.pt"], "foreign.pt is not a checkpoint"),
        (["cut.pt"], "cut.pt is truncated or not a checkpoint"),
        (["ckpt.pt", "--data", "short"], "short/val.bin has 12 tokens, fewer than one window of 12 + 1"),
        (["small.pt"], "corpus has 256 token ids, small.pt only 17"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(folder, capsys, argv, message):
    Path("foreign.pt").write_bytes(b"no checkpoint at all")
    Path("cut.pt").write_bytes(Path("ckpt.pt").read_bytes()[:5000])
    write_corpus("short", [("train", b"x" * 40), ("val", b"x" * 12)], Bytes(), source="test")
    save(GPT(GPTConfig(block_size=12, vocab_size=17, n_layer=1, n_head=1, n_embd=4)), "small.pt")
    capsys.readouterr()
    assert main(*argv, "--out", "made") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not Path("made").exists()


def test_help_explains_every_column(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(script.DIAGNOSTIC, ["--help"])
    printed = capsys.readouterr().out
    for column in (*COLUMNS, *script.GRADIENTS):
        assert any(line.strip().startswith(column + " ") for line in printed.splitlines()), column
    assert "each batch's own mean" in printed


def test_the_script_has_the_figures_of_the_nanogpt_checkpoint(tmp_path):
    """In the checkpoint's own float32: six digits still."""
    checkpoint, ids = nanogpt_windows()
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "val.bin")
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "train.bin")
    meta = {"vocab_size": 65, "itos": {i: chr(i) for i in range(65)}, "stoi": {chr(i): i for i in range(65)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    args = arguments(str(checkpoint), "--data", str(tmp_path), "--batches", "1", "--batch-size", "32")
    row = script.measure(Subject(str(checkpoint), args)).rows[3]
    found = [row[name] for name in ("r_diag", "r_lateral", "r_cross", "cos_diag", "cos_ste")]
    assert found == pytest.approx([1.274319, 0.705432, -0.979750, 0.724375, 0.531659], abs=2e-6, rel=0)
