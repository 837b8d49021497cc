"""Every token is scored exactly once, and its loss is the one that other routes give."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.batches import gather
from harness.pretrained import save_hf
from harness.resuming import crop_block_size
from measure.perplexity import (
    Scores,
    loss_by_position,
    nonfinite,
    perplexity,
    score,
    sliding_offsets,
    standard_error,
    stretches,
)
from model import GPT
from tests.helpers import tiny_gpt

CPU = torch.device("cpu")


def random_gpt(**changes) -> GPT:
    """Weights large enough for losses that differ from token to token."""
    return tiny_gpt(std=0.5, **{"block_size": 8, "vocab_size": 11} | changes)


def random_tokens(count: int, vocab_size: int = 11) -> np.ndarray:
    return np.random.default_rng(count).integers(vocab_size, size=count).astype(np.uint16)


def score_all(model: GPT, tokens: np.ndarray, stride: int, batch_size: int = 3) -> Scores:
    T = model.config.block_size
    offsets = sliding_offsets(len(tokens), T, stride)
    starts = range(0, len(offsets), batch_size)
    return score(model, (gather(tokens, offsets[s : s + batch_size], T, CPU) for s in starts), offsets, stride)


# --- each token once --------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(count=st.integers(2, 40), stride=st.integers(1, 8), batch_size=st.integers(1, 5))
def test_each_target_has_the_loss_of_its_own_window(count, stride, batch_size):
    model, tokens = random_gpt().double(), random_tokens(count)
    scores = score_all(model, tokens, stride, batch_size)
    assert scores.targets.tolist() == list(range(1, count))
    for loss, target, position in zip(*scores, strict=True):
        start = max(0, math.ceil((target - 8) / stride) * stride)  # of the first window that reaches it
        assert position == target - start >= min(target, 8 - stride + 1)
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(tokens[start:target].astype(np.int64))[None])
        expected = -torch.log_softmax(logits[0, -1], 0)[int(tokens[target])].item()
        assert loss == pytest.approx(expected, rel=1e-12)  # float64, and the same sums up to their order


@pytest.mark.parametrize("stride", [16, 5])
def test_equals_the_loop_of_hugging_faces_guide(tmp_path, stride):
    """Its windows of 17 tokens, each also the label of the one before, are windows of 16 inputs and 16 targets here."""
    model = random_gpt(block_size=17)
    save_hf(model, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    crop_block_size(model, 16)
    tokens = random_tokens(150)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]

    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + 17, len(tokens))
        labels = ids[:, begin:end].clone()
        labels[:, : previous_end - end] = -100
        with torch.no_grad():
            loss = peer(ids[:, begin:end], labels=labels).loss.item()
        scored = int((labels[:, 1:] != -100).sum())
        total, count, previous_end = total + loss * scored, count + scored, end
        if end == len(tokens):
            break
    losses = score_all(model, tokens, stride).losses
    assert len(losses) == count == 149
    assert losses.mean() == pytest.approx(total / count, abs=1e-4)
    assert losses.std() > 0.5  # so that a token scored twice or never would show


def test_a_subset_of_windows_scores_what_they_score_in_the_whole():
    model, tokens = random_gpt(), random_tokens(100)
    whole = score_all(model, tokens, 3)
    offsets = sliding_offsets(100, 8, 3)[4:9:2]
    part = score(model, [gather(tokens, offsets, 8, CPU)], offsets, 3)
    chosen = np.isin(whole.targets, part.targets)
    assert len(part.losses) == 9 == chosen.sum()
    np.testing.assert_array_equal(whole.positions[chosen], part.positions)
    np.testing.assert_allclose(whole.losses[chosen], part.losses, rtol=1e-5)  # float32 products of other batch shapes


# --- means and their errors -------------------------------------------------------------------------------------------


def test_standard_error():
    x = np.random.default_rng(0).normal(size=50)
    assert standard_error(x, np.arange(50)) == pytest.approx(stats.sem(x), rel=1e-12)
    assert standard_error(np.repeat(x, 4), np.repeat(np.arange(50), 4)) == pytest.approx(stats.sem(x), rel=1e-12)
    # mean 3, residuals of the clusters (1 + 2 − 6, 6 − 3) = (−3, 3): √(2/1 · 18)/3
    assert standard_error(np.array([1.0, 2, 6]), np.array([7, 7, 9])) == pytest.approx(2, rel=1e-12)
    assert standard_error(np.array([1.0, 2, 6]), np.array([7, 7, 7])) is None


def test_standard_error_is_the_spread_over_texts():
    """Losses that share a part within documents of 5. Over n = 2,000 texts the spread of the mean is known to 1/√(2n),
    1.6 %, the estimates' own mean to less; tokens taken as independent would give half of it."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        losses = (rng.normal(size=(40, 1)) + 0.5 * rng.normal(size=(40, 5))).reshape(-1)
        means.append(losses.mean())
        errors.append(standard_error(losses, np.arange(200) // 5))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=5 * 0.016)


def test_stretches_are_equal_parts_of_the_text_in_its_order():
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 91))
    scores = Scores(np.zeros(90), shuffled, np.zeros(90))
    assert (stretches(scores, 10) == (shuffled - 1) // 30).all()  # nine windows' worth: three stretches
    assert set(stretches(scores, 30)) == {0}  # three: one


def test_loss_by_position():
    losses = np.array([5.0, 4, 7, 4, 5, 5, 1, 4, 1, 3])
    scores = Scores(losses, np.arange(1, 11), np.array([1, 2, 1, 2, 1, 1, 2, 1, 2, 2]))
    assert stretches(scores, 2).tolist() == [0] * 5 + [1] * 5
    one, two = loss_by_position(scores, 2)
    # 5, 7 and 5 against 5 and 4, mean 5.2: residuals 1.4 and −1.4; 4 and 4 against 1, 1 and 3, mean 2.6: 2.8 and −2.8
    assert one == {"position": 1, "up_to": 1, "loss": 5.2, "standard_error": pytest.approx(2.8 / 5), "tokens": 5}
    assert two == {"position": 2, "up_to": 2, "loss": 2.6, "standard_error": pytest.approx(5.6 / 5), "tokens": 5}


def test_bins_of_positions():
    wide = loss_by_position(Scores(np.ones(1000), np.arange(1, 1001), np.arange(1, 1001)), 1000)
    assert [(row["position"], row["up_to"]) for row in wide[:8]] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 11), (12, 16)
    ]  # fmt: skip
    assert [after["position"] for after in wide[1:]] == [row["up_to"] + 1 for row in wide[:-1]]
    assert (wide[-1]["up_to"], sum(row["tokens"] for row in wide)) == (1000, 1000)
    assert wide[0]["standard_error"] is None  # all in one stretch


def test_perplexity_of_any_loss():
    assert perplexity(math.log(50)) == pytest.approx(50, rel=1e-14)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_where_nan_and_inf_come_from():
    idx = torch.zeros(1, 4, dtype=torch.int64)
    model = random_gpt()
    assert nonfinite(model, idx) == []
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(3e38)  # finite itself
    assert nonfinite(model, idx) == ["the first output that is NaN or Inf is that of transformer.h.1.mlp.c_fc"]
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[:2] = math.nan
    assert nonfinite(model, idx) == ["transformer.h.0.ln_1.weight holds 2 of 8 weights that are NaN or Inf"]
    assert not any(module._forward_hooks for module in model.modules())


# --- the command ------------------------------------------------------------------------------------------------------
