"""Which windows a step sees: a function of (seed, step) alone, and a validation that scores every target once."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.batches import Windows, dropout_seed, gather, prefetch, spread, training_offsets
from harness.corpus import Corpus
from harness.errors import UserError
from harness.tokenizer import Chars
from kernels.loss import IGNORED
from measure.perplexity import sliding_offsets
from tests.helpers import write_documents
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
@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_the_global_batch_is_the_same_however_it_is_shared_out(ranks, micro_batch_size, kind):
    """Of documents too, whose targets fall unequally to ranks and micro-steps: the weights make up for it exactly."""
    batch_size, block_size, steps = 8, 4, 3
    windows = documents_of([2, 3, 9, 2, 4, 5, 7] * 9, block_size, kind)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=7), training=SimpleNamespace(max_steps=5 + steps, batch_size=batch_size)
    )
    micro_steps = batch_size // (ranks * micro_batch_size)
    seen, losses = [[] for _ in range(steps)], np.zeros(steps)
    for rank in range(ranks):
        share = SimpleNamespace(rank=rank, size=ranks, device=CPU)
        batches = list(training_batches(config, windows, 5, share, micro_steps, micro_batch_size))
        assert len(batches) == steps * micro_steps
        for i, (x, y, weight) in enumerate(batches):
            assert x.shape == (micro_batch_size, block_size)
            scored = y != IGNORED
            assert torch.equal(y[scored], x[scored] + 1)
            assert weight == 1 or kind == "documents"
            seen[i // micro_steps] += x[:, 0].tolist()
            losses[i // micro_steps] += weight * y[scored].double().mean().item() / micro_steps / ranks
    for i, starts in enumerate(seen):
        whole = windows.training(7, 6 + i, batch_size)  # step 6 follows a resume from step 5
        assert sorted(starts) == sorted(whole.tolist())
        _, y = windows.gather(whole, CPU)
        assert losses[i] == pytest.approx(y[y != IGNORED].double().mean().item(), rel=1e-12)


# --- documents ------------------------------------------------------------------------------------------------------


def documents_of(lengths: list[int], block_size: int, kind: str = "documents") -> Windows:
    """Of documents of so many tokens, where a token is its place in the whole."""
    bounds = np.cumsum([0, *lengths])
    tokens = np.arange(bounds[-1], dtype=np.uint16)
    corpus = SimpleNamespace(
        tokens={"train": tokens}, document_bounds=lambda split: np.unique(bounds), folder=Path("corpus")
    )
    return Windows(corpus, "train", block_size, kind)


LENGTHS = st.lists(st.integers(0, 12), min_size=2, max_size=9).filter(lambda lengths: max(lengths) > 1)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_validation_scores_every_target_of_every_document_once(lengths, block_size, stride, begun):
    """All but the first token of each; that too where a token is put in front of every window."""
    windows, stride = documents_of(lengths, block_size), min(stride, block_size)
    x, y = windows.gather(windows.validation(), CPU)
    bounds = np.cumsum([0, *lengths])
    first = {int(start) for start in bounds[:-1]}
    assert sorted(y[y != IGNORED].tolist()) == [i for i in range(bounds[-1]) if i not in first]
    assert torch.equal(x[y != IGNORED], y[y != IGNORED] - 1)
    document = np.searchsorted(bounds, x.numpy(), side="right")
    assert (document == document[:, :1]).all()  # what pads a window is its document's own
    # In overlapping windows, of what no earlier window of the same document has scored.
    offsets = windows.validation(stride=stride, early=int(begun))
    i = offsets[:, None] + np.arange(block_size) + (not begun)  # the places of the targets
    fresh = (np.arange(block_size) >= block_size - stride) | np.isin(offsets, windows.starts)[:, None]
    places = i[fresh & (i < windows.end_of(offsets)[:, None])]
    assert sorted(places.tolist()) == [p for p in range(bounds[-1]) if begun or p not in first]


def test_a_training_window_starts_where_a_document_does_with_equal_odds():
    windows = documents_of([3, 1, 0, 20, 2, 6], 4)
    assert windows.with_targets.tolist() == [0, 4, 24, 26]
    draws = np.concatenate([windows.training(0, step, 100) for step in range(40)])
    assert np.array_equal(draws[:100], windows.training(0, 0, 100))
    starts, counts = np.unique(draws, return_counts=True)
    assert starts.tolist() == windows.with_targets.tolist()
    assert stats.chisquare(counts).pvalue > 1e-4  # one seed in 10,000 would fail
    x, y = windows.gather(starts, CPU)
    assert y.tolist() == [[1, 2, -1, -1], [5, 6, 7, 8], [25, -1, -1, -1], [27, 28, 29, 30]]
    assert x.tolist() == [[0, 1, 2, 2], [4, 5, 6, 7], [24, 25, 25, 25], [26, 27, 28, 29]]
    assert windows.whole().tolist() == [4, 8, 12, 16, 26]
    assert set(windows.training(0, 0, 100, whole=True)) == {4, 26}
    assert windows.shortened().block_size == 4
    assert documents_of([3, 2], 9).shortened().block_size == 2


def test_documents_start_after_a_separator_or_with_a_begin_of_text_token(tmp_path):
    texts = [("train", "ab"), ("train", ""), ("train", "cab"), ("val", "a")]
    write_documents(tmp_path / "bytes", texts)
    separated = Windows(Corpus(tmp_path / "bytes"), "train", 4, "documents")
    x, y = separated.gather(separated.with_targets, CPU)
    a, b = b"ab"
    assert x[0, :2].tolist() == [a, b]
    assert y.tolist() == [[b, 0, -1, -1], [a, b, -1, -1]]  # a separator is its document's last target
    assert separated.bytes_per_target == (7 - 3) / 4  # "ab\0", "\0", "cab" without the first byte of each
    write_documents(tmp_path / "chars", texts, Chars("abc^", begin=3))
    begun = Windows(Corpus(tmp_path / "chars"), "train", 4, "documents")
    x, y = begun.gather(begun.with_targets, CPU)
    assert x.tolist() == [[3, 0, 1, 1], [3, 2, 0, 1]]
    assert y.tolist() == [[0, 1, -1, -1], [2, 0, 1, -1]]
    assert begun.bytes_per_target == 1
    assert begun.check_training() == "windows of 2 documents: their starts, 100.0% of the text"


def test_ids_of_another_program_have_documents_where_their_meta_json_says_what_parts_them(tmp_path):
    for split in ("train", "val"):
        np.array([5, 6, 9, 7, 8, 9, 4], np.uint16).tofile(tmp_path / f"{split}.bin")
    meta = tmp_path / "meta.json"
    meta.write_text('{"vocab_size": 10}')
    with pytest.raises(UserError, match=r"is not known: take windows of the stream, or say it in the meta\.json there"):
        Windows(Corpus(tmp_path), "train", 3, "documents")
    meta.write_text('{"vocab_size": 10, "document_separator": 9}')
    assert Windows(Corpus(tmp_path), "train", 3, "documents").starts.tolist() == [0, 3, 6]


@pytest.mark.parametrize(("lengths", "message"), [([9], "has no two"), ([1, 1, 1], "has no document of two tokens")])
def test_a_corpus_of_one_window_or_none_is_refused(lengths, message):
    with pytest.raises(UserError, match=message):
        documents_of(lengths, 4).check_training()
    with pytest.raises(UserError, match="has no document that fills a window of 8 tokens: give --block-size 3"):
        documents_of([4, 3], 8).whole()


# --- validation -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(1, 40))
def test_validation_scores_every_target_once(count, block_size):
    tokens = np.arange(count, dtype=np.uint16)
    x, y = gather(tokens, sliding_offsets(count, block_size, block_size), block_size, CPU)
    scored = y >= 0
    assert sorted(y[scored].tolist()) == list(range(1, count))  # all but the first token, the remainder included
    assert torch.equal(x[scored], y[scored] - 1)  # each from the token before it


@given(st.integers(1, 30), st.integers(2, 500), st.integers(1, 20))
def test_a_part_of_the_validation_is_spread_evenly_over_it(count, tokens, block_size):
    every = sliding_offsets(tokens, block_size, block_size)
    some = spread(every, count)
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
