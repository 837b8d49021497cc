"""The split of attention's gradient against autograd's own Jacobian and against Hugging Face's attention."""

import argparse
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from harness.checkpoint import load_model
from harness.corpus import Corpus
from harness.diagnostics import argument_parser
from measure import jacobian
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
from model import GPT, attention
from tests.helpers import shakespeares_nanogpt, tiny_gpt

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
        ({"normalizer": "sparsemax"}, "unknown normalizer 'sparsemax': choose from softmax, softmax1, softmax_n, sink"),
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


def random_gpt(normalizer: str = "softmax", **changes) -> GPT:
    return tiny_gpt(3, noise=0.4, normalizer=normalizer, **changes)


def windows(B=3, T=12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


@every_normalizer
def test_captured_tensors_give_the_gradients_that_autograd_gives(normalizer):
    """dL/dO and q, k, v are right if the gradient of c_attn's output follows from them; and the hooks are gone."""
    model = random_gpt(normalizer).double()
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
    model, (x, y) = random_gpt(normalizer).double(), windows()
    with backward_mode(model, backward):
        loss = backpropagate(model, x, y)
        found = take_gradients(model)
    assert all(p.grad is None for p in model.parameters())
    assert [block.attn.backward_mode for block in model.transformer.h] == ["full", "full"]
    other = random_gpt(normalizer, backward=backward).double()
    _, expected = other(x, y)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-14)
    for name, parameter in other.named_parameters():
        scale = parameter.grad.abs().max()  # sums of a few hundred terms, in another order
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-13 * scale.item())


def test_splits_of_a_batch_are_of_the_batchs_mean_loss():
    model, (x, y) = random_gpt("softmax1").double(), windows()
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


def test_the_split_is_that_of_hugging_faces_attention(nanogpt):
    """From the gradients of the attention weights that their eager attention returns."""
    checkpoint, peer, corpus = nanogpt
    ids, splits = torch.from_numpy(Corpus(corpus).tokens["val"][:65].astype(np.int64)), [[], []]
    x, y = ids[:-1].view(4, 16), ids[1:].view(4, 16)
    loss = backpropagate(load_model(checkpoint)[0].double(), x, y, splits)
    output = peer(x, output_attentions=True)
    for P in output.attentions:
        P.retain_grad()
    expected = F.cross_entropy(output.logits.flatten(0, 1), y.flatten())
    expected.backward()
    peer.zero_grad()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for layer, P in enumerate(output.attentions):
        found, g, P = pool(splits[layer]), P.grad.tril(), P.detach()
        full, diagonal = P * (g - (P * g).sum(-1, keepdim=True)), P * (1 - P) * g
        energies = {"e_full": full, "e_diag": diagonal, "e_lateral": full - diagonal}
        for name, x in energies.items():
            # Their logits are ours up to some hundred roundings, and so are the gradients.
            torch.testing.assert_close(found[name], x.square().sum((0, 2, 3)), rtol=1e-9, atol=0)
        torch.testing.assert_close(found["entropy"], torch.special.entr(P).sum(-1).mean((0, 2)), rtol=1e-9, atol=0)


def test_figures_of_shakespeares_nanogpt():
    checkpoint, ids = shakespeares_nanogpt()
    model = load_model(checkpoint)[0].double()
    ids, splits = torch.from_numpy(ids[: 32 * 64 + 1]), [[], []]
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


def arguments(*argv: str) -> argparse.Namespace:
    return argument_parser("jacobian_energy", "", 1, 2).parse_args(argv)
