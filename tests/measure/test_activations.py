"""Everything on the way through a model, in one pass: by element, token, channel, sequence and head."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.batches import gather
from harness.checkpoint import load_model
from harness.corpus import Corpus
from measure import activations as activations_module
from measure.activations import Activations, AttentionStatistics, TensorStatistics
from measure.moments import Moments, RowMoments
from measure.probe import TENSORS, kind_of
from model import GPT, attention_rows
from tests.helpers import every_normalizer, shakespeares_nanogpt, tiny_gpt

T, V, C, H, LAYERS = 10, 13, 8, 2, 2


def probed_gpt(normalizer: str = "softmax", std: float = 0.7) -> GPT:
    return tiny_gpt(std=std, block_size=T, vocab_size=V, normalizer=normalizer)


def tokens(B: int = 3) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(df=5, size=shape))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_moments_of_rows_are_scipys():
    x = heavy_tailed(4, 5, 300)
    rows, values = RowMoments.of(x), x.numpy()
    np.testing.assert_allclose(rows.mean, values.mean(-1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(rows.excess_kurtosis, stats.kurtosis(values, axis=-1), rtol=1e-11)
    np.testing.assert_allclose(rows.pooled().excess_kurtosis, stats.kurtosis(values.reshape(4, -1), axis=1), rtol=1e-11)
    np.testing.assert_array_equal(rows.max_abs, np.abs(values).max(-1))
    same_moments(rows.moments(), values)


def test_a_mask_leaves_elements_out_and_zeros_can_be_added():
    x, visible = heavy_tailed(6, 9), torch.ones(6, 9, dtype=torch.bool).tril(1)
    rows = RowMoments.of(x, visible)
    for row, values, seen in zip(zip(*rows, strict=True), x, visible, strict=True):
        same_moments(RowMoments(*(field.view(1) for field in row)).moments(), values[seen].numpy())
    same_moments(rows.with_zeros(4).moments(), np.append(x[visible].numpy(), np.zeros(24)))


def test_what_is_not_finite_is_counted_and_left_out():
    x = heavy_tailed(3, 50)
    x[0, 3], x[0, 4], x[1, 0] = math.nan, math.inf, -math.inf
    rows = RowMoments.of(x)
    assert rows.nonfinite.tolist() == [2, 1, 0]
    assert rows.count.tolist() == [48, 49, 50]
    together = rows.moments()
    assert together.nonfinite == 3
    same_moments(together, x[x.isfinite()].numpy())
    nothing = RowMoments.of(torch.full((2, 3), math.nan, dtype=torch.float64)).moments()
    assert (nothing.count, nothing.nonfinite, nothing.mean) == (0, 6, None)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8 / 3])
def test_equal_numbers_have_no_variance_and_no_kurtosis(value):
    rows = RowMoments.of(torch.full((3, 7), value, dtype=torch.float64))
    assert rows.excess_kurtosis.isnan().all()
    together = rows.moments()
    assert (together.mean, together.variance, together.excess_kurtosis) == (value, 0, None)


def same_moments(moments: Moments, values: np.ndarray) -> None:
    """Both in float64: at most a few thousand summands' roundings, of powers some thousand times σ's."""
    x = values.ravel()
    assert moments.count == x.size
    assert moments.max_abs == pytest.approx(np.abs(x).max(), rel=1e-14)
    assert moments.mean == pytest.approx(x.mean(), abs=1e-12 * moments.max_abs)
    assert moments.std == pytest.approx(x.std(), rel=1e-11)
    assert moments.skewness == pytest.approx(stats.skew(x), rel=1e-9, abs=1e-9)
    assert moments.excess_kurtosis == pytest.approx(stats.kurtosis(x), rel=1e-9, abs=1e-9)


# --- one tensor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 100, 2**17])  # one token at a time; some; a sequence
def test_every_statistic_of_a_tensor_from_its_definition(monkeypatch, chunk):
    monkeypatch.setattr(activations_module, "chunk_size", lambda _: chunk)
    x = heavy_tailed(3, 20, 8)
    x[:, :, 5] *= 50
    x[:, 0, 2] = 200
    tensor = TensorStatistics().update(x)
    for statistics, part in ((tensor.all, x), (tensor.first, x[:, :1]), (tensor.others, x[:, 1:])):
        values = part.numpy()
        same_moments(statistics.moments, values)
        sequences = values.reshape(3, -1)
        rms = np.sqrt((values**2).mean((0, 1)))
        expected = {
            "mean_norm": np.linalg.norm(values, axis=-1).mean(),
            "per_token_kurtosis": stats.kurtosis(values, axis=-1).mean(),
            "channel_rms_kurtosis": (rms**4).mean() / (rms**2).mean() ** 2,
            "per_sequence_kurtosis": stats.kurtosis(sequences, axis=-1, fisher=False).mean(),
            "per_sequence_max_abs": np.abs(sequences).max(-1).mean(),
        }
        row = statistics.row()
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert sorted(row["outlier_channels"]) == [c for c in range(8) if rms[c] > 6 * np.sort(rms)[3]]
    assert tensor.others.row()["outlier_channels"] == [5]
    assert 2 in tensor.first.row()["outlier_channels"]


def test_a_pooled_kurtosis_does_not_tell_an_outlier_channel_from_scattered_outliers_and_the_channels_do():
    """One of 8 channels is a Gaussian of 20 times the others' width; then the same numbers in any order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 500, 8, generator=generator, dtype=torch.float64)
    x[..., 3] *= 20
    scattered = x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)
    channel, anywhere = (TensorStatistics().update(values) for values in (x, scattered))
    # Σx⁴/(Σx²)² of n = 2000 Gaussians is off by √((96 − 72)/9/n) ≈ 4 % (96: the variance of x⁴; 72 of it goes with Σx²)
    expected = 3 * (1 + (20**4 - 1) / 8) / (1 + (20**2 - 1) / 8) ** 2
    assert channel.all.moments.excess_kurtosis + 3 == pytest.approx(expected, rel=0.15)
    assert anywhere.all.moments.excess_kurtosis == pytest.approx(channel.all.moments.excess_kurtosis, rel=1e-12)
    assert channel.others.outlier_channels.keys() == {3}
    assert anywhere.others.outlier_channels == {}
    # Gaussians of 1 and 20: each channel's RMS is its σ up to 1/√(2·2000), four powers of it
    s = np.array([1, 1, 1, 20, 1, 1, 1, 1.0])
    assert channel.others.channel_rms_kurtosis == pytest.approx((s**4).mean() / (s**2).mean() ** 2, rel=0.1)
    # the eight mean squares differ by √((m₄/m₂² − 1)/n) = √(expected/n), the ratio from 1 by that squared: its mean
    assert anywhere.others.channel_rms_kurtosis == pytest.approx(1, abs=4 * expected / 2000)


def test_the_median_channel_of_an_even_number_is_the_lower_one():
    tensor = TensorStatistics().update(torch.tensor([1, 1, 1.2, 6.1]).repeat(2, 3, 1))  # 6.1 < 6 (1 + 1.2) / 2
    assert tensor.all.outlier_channels == {3: pytest.approx(6.1)}


def test_constant_tokens_have_no_kurtosis():
    tensor = TensorStatistics().update(torch.ones(2, 4, 3))
    row = tensor.all.row()
    assert (row["excess_kurtosis"], row["per_token_kurtosis"], row["per_sequence_kurtosis"]) == (None, None, None)
    assert (row["channel_rms_kurtosis"], row["outlier_channels"]) == (1, [])
    assert TensorStatistics().update(torch.zeros(2, 4, 3)).all.row()["channel_rms_kurtosis"] is None


def test_a_sequence_of_one_token_has_no_others():
    tensor = TensorStatistics().update(heavy_tailed(2, 1, 5))
    assert tensor.others.row()["count"] == 0
    assert tensor.others.row()["excess_kurtosis"] is tensor.others.row()["outlier_channels"] is None
    same_moments(tensor.all.moments, heavy_tailed(2, 1, 5).numpy())


def test_a_tensor_that_is_not_finite_says_so_and_gives_no_averages():
    x = heavy_tailed(2, 6, 5)
    x[1, 3, 2] = math.inf
    tensor = TensorStatistics().update(x)
    assert tensor.all.row()["nonfinite"] == 1
    for name in ("per_token_kurtosis", "channel_rms_kurtosis", "outlier_channels", "per_sequence_kurtosis"):
        assert tensor.all.row()[name] is None
        assert tensor.first.row()[name] is not None


# --- attention --------------------------------------------------------------------------------------------------------


def explicit_probabilities(q, k, null_logit) -> np.ndarray:
    """(B, H, T, T + 1) float64, the null slot last, its probability 0 where there is none."""
    future = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).triu(1)
    scores = (q.double() @ k.double().mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
    null = torch.full((q.size(1),), -math.inf) if null_logit is None else null_logit
    slot = null.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, slot), -1), -1).detach().numpy()


def null_logit_of(attn) -> torch.Tensor | None:
    return {"softmax": None, "softmax1": torch.zeros(attn.n_head), "sink": getattr(attn, "sink", None)}[attn.normalizer]


@pytest.mark.parametrize("null_logit", [None, torch.zeros(3), torch.tensor([2.0, -1.0, 0.5])])
@pytest.mark.parametrize("queries", [1, 4, 128])
def test_attention_statistics_are_those_of_the_whole_matrix(monkeypatch, null_logit, queries):
    monkeypatch.setattr(activations_module, "QUERIES", queries)
    q, k = 2 * heavy_tailed(2, 3, 11, 4, seed=1), heavy_tailed(2, 3, 11, 4, seed=2)
    parameters = {} if null_logit is None else {"null_logit": null_logit}
    v = heavy_tailed(2, 3, 11, 4, seed=3)
    is_trigger = torch.arange(22).view(2, 11) % 3 == 0
    found = AttentionStatistics().update(q, k, v, is_trigger=is_trigger, **parameters)
    P = explicit_probabilities(q, k, null_logit)
    visible = np.tril(np.ones((11, 11), dtype=bool))
    same_moments(found.all.moments, P[..., :11])
    same_moments(found.visible.moments, P[..., :11][..., visible])
    same_moments(found.late.moments, P[..., 8:, :11])
    expected = stats.kurtosis(P[..., :11].reshape(2, -1), axis=-1, fisher=False).mean()
    assert found.all.per_sequence_kurtosis == pytest.approx(expected, rel=1e-9)
    scores, norms = (q @ k.mT).numpy() / 2, v.norm(dim=-1).numpy()
    expected = {
        "row_mass": P[..., :11].sum(-1).mean((0, 2)),
        "null_mass": P[..., 11].mean((0, 2)),
        "entropy": stats.entropy(P, axis=-1).mean((0, 2)),
        "max_score": np.where(visible, scores, -np.inf).max((0, 2, 3)),
        "value_drain": norms[..., 0].mean(0) / norms[..., 1:].mean((0, 2)),
    }
    for kind, chosen in (("trigger", is_trigger.numpy()), ("ordinary", ~is_trigger.numpy())):
        late = np.moveaxis(P, 1, 0)[:, chosen & (np.arange(11) >= 8)]  # (H, queries of both sequences, keys)
        first, mass = late[..., 0], late[..., :11].sum(-1)
        expected |= {
            f"first_token_{kind}": first.mean(-1),
            f"first_token_{kind}_over_row_mass": (first / mass).mean(-1),
            f"row_mass_{kind}": mass.mean(-1),
        }
    for suffix, first in (("", P[..., 0]), ("_over_row_mass", P[..., 0] / P[..., :11].sum(-1))):
        expected |= {
            f"sink_rate{suffix}": (first.mean(-1) > 0.3).mean(0),
            f"first_mass{suffix}": first.mean((0, 2)),
            f"first_mass_without_query0{suffix}": first[..., 1:].mean((0, 2)),
            f"dormant{suffix}": (first[..., 1:] > 0.9).mean((0, 2)),
        }
    assert found.figures.keys() == expected.keys()
    for name, figure in found.figures.items():
        np.testing.assert_allclose(figure, expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "relu"])
def test_what_triggers_and_other_queries_give_to_the_first_key_over_their_row_mass(normalizer):
    """From a plain loop. ReLU leaves rows without mass: such a query gives nothing to the first key, and counts."""
    q, k = 2 * heavy_tailed(3, 2, 14, 4, seed=4), heavy_tailed(3, 2, 14, 4, seed=5)
    q[1, 0, 9:] = 0
    is_trigger = torch.arange(42).view(3, 14) % 4 == 0
    figures = AttentionStatistics().update(q, k, normalizer=normalizer, is_trigger=is_trigger).figures
    P, without_mass = attention_rows(q, k, normalizer=normalizer)[0], 0
    for head in range(2):
        shares: dict[bool, list[float]] = {True: [], False: []}
        for b in range(3):
            for i in range(8, 14):
                row = P[b, head, i, : i + 1].tolist()
                shares[is_trigger[b, i].item()].append(row[0] / sum(row) if sum(row) else 0.0)
                without_mass += sum(row) == 0
        for kind, chosen in (("trigger", shares[True]), ("ordinary", shares[False])):
            over = figures[f"first_token_{kind}_over_row_mass"][head].item()
            assert over == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)
            raw = figures[f"first_token_{kind}"][head].item()
            assert (over == pytest.approx(raw, rel=1e-12)) is (normalizer == "softmax")
    assert (without_mass > 0) is (normalizer == "relu")


def test_sink_rate_and_row_mass_by_hand():
    """Scores chosen so that every weight is a fraction: head 0 gives all to the first key, head 1 spreads evenly, and
    half of what head 2 gives goes to a null slot."""
    n = 4
    q = torch.ones(1, 3, n, 1, dtype=torch.float64)
    k = torch.zeros(1, 3, n, 1, dtype=torch.float64)
    k[0, 0, 0] = 1000
    even = AttentionStatistics().update(q, k)
    # the first key of an even head: (1 + 1/2 + 1/3 + 1/4) / 4 = 25/48 > 0.3
    assert even.sink_rate.tolist() == [1, 1, 1]
    assert even.row_mass.tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    spread = math.log(math.factorial(n)) / n  # rows of entropy log 1, log 2, log 3, log 4
    assert even.entropy.tolist() == pytest.approx([0, spread, spread], abs=1e-12)
    # with a null slot of logit 0, row i of an even head gives 1/(i + 1) to each of its i keys
    null = AttentionStatistics().update(q, k, normalizer="softmax1")
    assert null.row_mass.tolist() == pytest.approx([1, *2 * [(1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4]], abs=1e-12)
    # its first key then has (1/2 + 1/3 + 1/4 + 1/5) / 4 = 0.3208, and of eight queries 0.2286
    assert null.sink_rate.tolist() == [1, 1, 1]
    q, k = q.repeat(1, 1, 2, 1), torch.cat((k, torch.zeros_like(k)), 2)
    assert AttentionStatistics().update(q, k, normalizer="softmax1").sink_rate.tolist() == [1, 0, 0]


def test_late_queries_alone_do_not_reward_a_null_slot_by_its_definition():
    """Where attention is even, a null slot takes 1/2 of the first query's weight and 1/9 of the eighth's. By that alone
    the kurtosis of all queries falls to a quarter."""
    q = torch.zeros(1, 1, 64, 1)
    softmax, softmax1 = (
        AttentionStatistics().update(q, q, normalizer=normalizer) for normalizer in ("softmax", "softmax1")
    )
    assert softmax.all.moments.excess_kurtosis > 4 * softmax1.all.moments.excess_kurtosis
    assert softmax.late.moments.excess_kurtosis < 1.3 * softmax1.late.moments.excess_kurtosis
    assert AttentionStatistics().update(q[:, :, :8], q[:, :, :8]).late.row()["count"] == 0


# --- a whole model ----------------------------------------------------------------------------------------------------


def recomputed(model: GPT, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tensor that is watched, from the model's modules called one by one."""
    found = {"transformer.drop": model.transformer.wte(idx) + model.transformer.wpe.weight[: idx.size(1)]}
    x = found["transformer.drop"]
    for layer, block in enumerate(model.transformer.h):
        name = f"transformer.h.{layer}"
        found[f"{name}.ln_1"] = normed = block.ln_1(x)
        q, k, v = block.attn.c_attn(normed).split(C, dim=-1)
        found |= {f"{name}.attn.q": q, f"{name}.attn.k": k, f"{name}.attn.v": v}
        q, k, v = (z.view(-1, idx.size(1), H, C // H).transpose(1, 2) for z in (q, k, v))
        P = torch.from_numpy(explicit_probabilities(q, k, null_logit_of(block.attn)))[..., :-1].to(v.dtype)
        found[f"{name}.attn.output"] = y = (P @ v).transpose(1, 2).reshape(x.shape)
        found[f"{name}.attn.c_proj"] = block.attn.c_proj(y)
        x = x + block.attn.c_proj(y)
        found[f"{name}.ln_2"] = block.ln_2(x)
        found[f"{name}.mlp.hidden"] = hidden = block.mlp.gelu(block.mlp.c_fc(block.ln_2(x)))
        found[f"{name}.mlp.c_proj"] = block.mlp.c_proj(hidden)
        x = x + block.mlp.c_proj(hidden)
        found[name] = x
    found["transformer.ln_f"] = model.transformer.ln_f(x)
    found["lm_head"] = model.lm_head(model.transformer.ln_f(x))
    return found


@every_normalizer
@torch.no_grad()
def test_every_tensor_on_the_way_is_the_one_its_name_says(normalizer):
    model, idx = probed_gpt(normalizer).double(), tokens()
    found, expected = Activations(model).update(idx).tensors, recomputed(model, idx)
    assert set(found) == set(expected)
    assert {kind_of(name) for name in found} == set(TENSORS)
    for name, tensor in found.items():
        same_moments(tensor.all.moments, expected[name].numpy())
        same_moments(tensor.first.moments, expected[name][:, :1].numpy())
        same_moments(tensor.others.moments, expected[name][:, 1:].numpy())


@settings(max_examples=5)
@given(cuts=st.lists(st.integers(0, 6), max_size=4))
def test_any_split_into_batches_is_one_batch_of_everything(cuts):
    model, idx = probed_gpt("softmax1").double(), tokens(6)
    whole, parts = Activations(model).update(idx), Activations(model)
    for batch in np.split(np.arange(6), sorted(cuts)):
        if len(batch):
            parts.update(idx[batch])
    for name, tensor in whole.tensors.items():
        for which in ("all", "first", "others"):
            same_rows(getattr(parts.tensors[name], which).row(), getattr(tensor, which).row())
    for layer, attention in whole.attention.items():
        same_rows(parts.attention[layer].all.row(), attention.all.row())
        same_rows(parts.attention[layer].visible.row(), attention.visible.row())
        for name in ("sink_rate", "row_mass", "entropy"):
            torch.testing.assert_close(getattr(parts.attention[layer], name), getattr(attention, name))


def same_rows(a: dict, b: dict) -> None:
    """Sums in another order, and matrix products of other batch sizes: some thousand roundings of float64."""
    assert a.pop("outlier_channels", None) == b.pop("outlier_channels", None)
    assert a == pytest.approx(b, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_and_the_outputs_are_what_they_were(fails):
    model, idx = probed_gpt(), tokens()
    before = model(idx)[0]
    if fails:
        with pytest.raises(ValueError, match="block_size"):
            Activations(model).update(torch.zeros(1, T + 1, dtype=torch.long))
    else:
        Activations(model).update(idx)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(model(idx)[0], before)


def test_the_model_computes_the_same_while_it_is_watched():
    model, idx = probed_gpt(), tokens()
    logits = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: logits.append(out[0]))
    Activations(model).update(idx)
    handle.remove()
    assert torch.equal(logits[0], model(idx)[0])


# --- the script: what is planted is found and named -------------------------------------------------------------------


def test_a_nanogpt_checkpoint_has_the_attention_of_hugging_faces(nanogpt):
    checkpoint, peer, corpus = nanogpt
    val = Corpus(corpus).tokens["val"]
    idx = gather(val, 16 * np.arange(20), 16, torch.device("cpu"))[0]
    found = Activations(load_model(checkpoint)[0].double()).update(idx)
    with torch.no_grad():
        attentions = peer(idx, output_attentions=True).attentions
    for layer, P in enumerate(attentions):
        entropy = torch.special.entr(P).sum(-1).mean((0, 2))
        torch.testing.assert_close(found.attention[layer].entropy, entropy, rtol=1e-9, atol=0)
        kurtosis = stats.kurtosis(P.flatten().numpy())
        assert found.attention[layer].all.moments.excess_kurtosis == pytest.approx(kurtosis, rel=1e-9)


def test_shakespeares_nanogpt_has_its_known_entropies():
    """On the first 32 windows of 64, in float64; the figures have six decimals."""
    path, val = shakespeares_nanogpt()
    model = load_model(path)[0].double()
    found = Activations(model).update(gather(val, 64 * np.arange(32), 64, torch.device("cpu"))[0])
    entropies = {f"{layer}.{head}": a.entropy[head].item() for layer, a in found.attention.items() for head in range(2)}
    expected = {"0.0": 3.094014, "0.1": 2.999989, "1.1": 2.911717}
    assert {head: entropies[head] for head in expected} == pytest.approx(expected, abs=5e-7)
