"""Which windows a step sees: a function of (seed, step) alone, and a validation that scores every target once."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.batches import dropout_seed, gather, prefetch, training_offsets, validation_offsets
from train import training_batches

CPU = torch.device("cpu")


# --- training -------------------------------------------------------------------------------------------------------


def test_the_windows_of_a_step_are_a_function_of_seed_and_step():
    first = training_offsets(1337, 5, 10_000, 64, 32)
    training_offsets(1337, 6, 10_000, 64, 32)  # what was drawn in between does not matter
    assert np.array_equal(first, training_offsets(1337, 5, 10_000, 64, 32))
    assert first.dtype == np.int64


def test_neighbouring_steps_and_seeds_share_no_draws():
    # 2^40 places to start: that two of 64,000 draws coincide has odds of 2e-3, and the seeds are fixed.
    draws = [training_offsets(seed, step, 2**40, 64, 32) for seed in range(20) for step in range(100)]
    assert len(np.unique(np.concatenate(draws))) == 20 * 100 * 32


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 99))
def test_every_window_lies_within_the_corpus(spare, block_size, step):
    tokens = block_size + spare  # the fewest: one window and its last target
    offsets = training_offsets(0, step, tokens, block_size, 16)
    assert offsets.min() >= 0
    assert offsets.max() + block_size < tokens


def test_windows_start_anywhere_with_equal_odds():
    counts = np.bincount(np.concatenate([training_offsets(0, step, 42, 10, 100) for step in range(320)]))
    assert len(counts) == 42 - 10  # the last start leaves room for the last target, and no more
    assert stats.chisquare(counts).pvalue > 1e-4  # 1,000 draws expected of each; one seed in 10,000 would fail


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_global_batch_is_the_same_however_it_is_shared_out(ranks, micro_batch_size):
    batch_size, block_size, steps = 8, 4, 3
    tokens = np.arange(1000, dtype=np.uint16)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=7), training=SimpleNamespace(max_steps=5 + steps, batch_size=batch_size)
    )
    corpus = SimpleNamespace(tokens={"train": tokens})
    micro_steps = batch_size // (ranks * micro_batch_size)
    seen = [[] for _ in range(steps)]
    for rank in range(ranks):
        share = SimpleNamespace(rank=rank, size=ranks, device=CPU)
        batches = list(training_batches(config, corpus, block_size, 5, share, micro_steps, micro_batch_size))
        assert len(batches) == steps * micro_steps
        for i, (x, y) in enumerate(batches):
            assert x.shape == (micro_batch_size, block_size)
            assert torch.equal(y, x + 1)
            seen[i // micro_steps] += x[:, 0].tolist()
    for i, starts in enumerate(seen):
        whole = training_offsets(7, 6 + i, len(tokens), block_size, batch_size)  # step 6 follows a resume from step 5
        assert sorted(starts) == sorted(whole.tolist())


# --- validation -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(1, 40))
def test_validation_scores_every_target_once(count, block_size):
    tokens = np.arange(count, dtype=np.uint16)
    x, y = gather(tokens, validation_offsets(count, block_size), block_size, CPU)
    scored = y >= 0
    assert sorted(y[scored].tolist()) == list(range(1, count))  # all but the first token, the remainder included
    assert torch.equal(x[scored], y[scored] - 1)  # each from the token before it


@given(st.integers(1, 30), st.integers(2, 500), st.integers(1, 20))
def test_a_part_of_the_validation_is_spread_evenly_over_it(count, tokens, block_size):
    every, some = validation_offsets(tokens, block_size), validation_offsets(tokens, block_size, count)
    assert len(some) == min(count, len(every))
    assert set(some) <= set(every)
    gaps = np.diff(some) // block_size
    assert (gaps >= 1).all()  # none twice
    if count > 1:
        assert (some[0], some[-1]) == (every[0], every[-1])
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_targets_past_the_end_are_minus_1():
    x, y = gather(np.array([5, 6, 7, 8], dtype=np.uint16), np.array([0, 2]), 3, CPU)
    assert y.tolist() == [[6, 7, 8], [8, -1, -1]]
    assert x[0].tolist() == [5, 6, 7]
    assert x[1, :2].tolist() == [7, 8]
    assert ((x >= 5) & (x <= 8)).all()  # whatever stands beyond the end is a token, for the embedding
    assert x.dtype == y.dtype == torch.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ids_of_every_storage_type_keep_their_value(dtype):
    largest = np.iinfo(dtype).max
    _, y = gather(np.array([0, 1, largest], dtype=dtype), np.array([0]), 2, "cpu")
    assert y.tolist() == [[1, largest]]


# --- dropout and prefetching ----------------------------------------------------------------------------------------


def test_dropout_seeds_are_distinct_and_within_the_generators_32_bits():
    where = [(s, t, r, m) for s in (1, 2) for t in range(1, 51) for r in range(4) for m in range(5)]
    seeds = [dropout_seed(*w) for w in where]
    # Of 2,000 hashes to 32 bits two coincide with odds of 5e-4, and the seeds are fixed.
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [dropout_seed(*w) for w in where]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_prefetching_keeps_the_batches_and_their_order(count):
    assert list(prefetch(iter(range(count)))) == list(range(count))


def test_the_next_batch_is_gathered_while_this_one_is_used():
    gathered = threading.Event()

    def batches():
        yield 1
        gathered.set()
        yield 2

    ahead = prefetch(batches())
    assert next(ahead) == 1
    assert gathered.wait(timeout=300)  # before the second was asked for
    assert list(ahead) == [2]


def test_an_error_while_gathering_reaches_the_loop():
    def batches():
        yield 1
        raise OSError("the corpus is gone")

    ahead = prefetch(batches())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the corpus is gone"):
        next(ahead)
