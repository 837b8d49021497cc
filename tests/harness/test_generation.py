"""Text from a model: the cache, the draws, and where it stops."""

import math
from dataclasses import replace

import pytest
import torch

from harness import generation
from harness.generation import KVCache, generate, sample
from model import GPT
from tests.helpers import TELLING, every_attention, telling_gpt, tiny_gpt, tokens


def generated(model: GPT, idx: torch.Tensor, count: int, seed: int = 0, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(list(generate(model, idx, count, generator=generator, **arguments)), dim=1)


@every_attention
@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.9}])
def test_generation_is_the_same_with_and_without_the_cache(normalizer, backward, knobs):
    # The two differ by some 1e-5 in logits of a few units. A token differs where the two best, or the draw and the
    # edge between two tokens, are closer than that: odds of some 1e-5 each of 60 times, and the seeds are fixed.
    model, idx = telling_gpt(replace(TELLING, normalizer=normalizer, backward=backward)), tokens(3, 4)
    cached = generated(model, idx, 20, use_cache=True, **knobs)  # goes beyond block_size
    assert cached.shape == (3, 20)
    assert torch.equal(cached, generated(model, idx, 20, use_cache=False, **knobs))
    assert len(cached.unique()) > 3  # not one token over and over, which any mistake would give as well


def test_greedy_generation_is_the_argmax_of_the_last_block_size_tokens():
    model, idx = telling_gpt(), tokens(2, 4)
    whole = torch.cat((idx, generated(model, idx, 15, temperature=0)), dim=1)
    for end in range(4, 19):
        logits, _ = model(whole[:, max(0, end - 12) : end])
        assert torch.equal(whole[:, end], logits[:, -1].argmax(-1))


def test_the_same_generator_draws_the_same_tokens_and_the_global_one_is_left_alone():
    model, idx = telling_gpt(), tokens(2, 4)
    state = torch.get_rng_state()
    first = generated(model, idx, 20, seed=5)
    assert torch.equal(first, generated(model, idx, 20, seed=5))
    assert not torch.equal(first, generated(model, idx, 20, seed=6))
    assert torch.equal(state, torch.get_rng_state())


def test_with_the_cache_each_step_feeds_one_token():
    model, fed, scored = telling_gpt(), [], []
    model.transformer.wte.register_forward_hook(lambda _module, inputs, _output: fed.append(inputs[0].size(1)))
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: scored.append(inputs[0].shape))
    generated(model, tokens(2, 5), 10)
    assert fed == [5] + 7 * [1] + 2 * [12]  # up to 12 tokens of context; then all positions move
    assert scored == 10 * [(2, 8)]  # the head scores the last position only


def test_the_cache_takes_the_room_that_the_text_needs_and_not_that_of_the_longest_context():
    """It took all of it at the start: 8.6 GB for a model of a billion parameters with a context of 131,072."""
    idx, rotary = tokens(2, 5), {"position": "rope", "noise": 0.4}
    model = tiny_gpt(**rotary, block_size=2**50)  # no machine has room for as many tokens
    found = generated(model, idx, 5, temperature=0)
    assert torch.equal(found, generated(tiny_gpt(**rotary, block_size=10), idx, 5, temperature=0))

    cache, rooms, seen = KVCache(replace(model.config, block_size=90)), set(), torch.randn(2, 2, 90, 4)
    for end in range(5, 91):
        new = seen[:, :, cache.length : end]
        found = [cache.append(layer, new + layer, new - layer) for layer in range(2)]
        cache.length = end
        for layer, (k, v) in enumerate(found):
            assert torch.equal(k, seen[:, :, :end] + layer)
            assert torch.equal(v, seen[:, :, :end] - layer)
        rooms.add(cache.k[1].size(2))
    assert rooms == {5, 10, 20, 40, 80, 90}  # tokens are moved six times, not every time


def test_generation_streams_and_leaves_gradients_on_for_the_caller():
    steps = generate(telling_gpt(), tokens(1, 4), 3)
    token = next(steps)
    assert token.shape == (1, 1)
    assert torch.is_grad_enabled()
    assert len(list(steps)) == 2


def test_a_row_that_drew_the_stop_token_repeats_it_until_all_have(monkeypatch):
    drawn = iter([[[3], [4]], [[9], [5]], [[6], [7]], [[8], [9]], [[1], [2]]])
    monkeypatch.setattr(generation, "sample", lambda *_, **__: torch.tensor(next(drawn)))
    assert generated(telling_gpt(), tokens(2, 4), 5, stop_token=9).tolist() == [[3, 9, 9, 9], [4, 5, 7, 9]]


LOGITS = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_k": 99}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.7}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_p": 0.9}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two kept the first alone holds 5/8
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),  # squared
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),  # nothing overflows
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"temperature": math.inf}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_p": 1e-60}, [0, 1, 0, 0]),  # 0 in float32
    ],
)
def test_tokens_are_drawn_with_the_probability_that_the_knobs_leave(knobs, expected):
    n = 20_000
    draws = sample(LOGITS.expand(n, -1), generator=torch.Generator().manual_seed(0), **knobs)
    assert draws.shape == (n, 1)
    frequencies = torch.bincount(draws.flatten(), minlength=4) / n
    for frequency, p in zip(frequencies.tolist(), expected, strict=True):
        assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / n)  # standard deviations; exactly 0 for p = 0 or 1


def test_rows_are_drawn_each_from_its_own_logits():
    logits = torch.stack((LOGITS, LOGITS.flip(0)))
    assert sample(logits, temperature=0).tolist() == [[1], [2]]
    assert sample(logits, top_k=1).tolist() == [[1], [2]]
    assert sample(logits, top_p=0.4).tolist() == [[1], [2]]
