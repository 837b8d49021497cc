"""The split of attention's gradient against autograd's own Jacobian."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from measure import jacobian
from measure.jacobian import jacobian_energy, pool, split_of_sequence
from model import attention

COLUMNS = [
    *("mean_attention", "entropy", "row_mass", "e_full", "e_diag", "e_lateral", "e_cross"),
    *("r_diag", "r_lateral", "r_cross", "r_offdiag", "cos_diag", "cos_detached", "cos_ste"),
    *("jacobian_diag", "jacobian_offdiag"),
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
    sums = {name: torch.zeros(B, H, dtype=torch.float64) for name in (*COLUMNS, "e_held", "e_ste", "d_s", "h_s", "g_s")}
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
                    "e_held": (A * g) @ (A * g),
                    "e_ste": g @ g,
                    "d_s": d @ s,
                    "h_s": (A * g) @ s,
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
    columns["cos_detached"] = (sums["h_s"] / (sums["e_held"] * sums["e_full"]).sqrt()).mean(0)
    columns["cos_ste"] = (sums["g_s"] / (sums["e_ste"] * sums["e_full"]).sqrt()).mean(0)
    return columns


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
            "cos_detached": math.sqrt(0.1),  # A g = 1 in the first row, (½, 0) in the second: ⅛ / (√(5/4) · √⅛)
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
