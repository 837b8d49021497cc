"""A model with what its heads find at the first token in a null slot: after one token, and after the mean of many."""

import json

import numpy as np
import pytest
import torch

from harness.checkpoint import load_model
from measure.activations import Activations
from measure.transplant import first_tokens, transplanted
from tests.helpers import SHARED, TODAY, random_ids, tiny_gpt


@pytest.mark.parametrize("config", [TODAY, TODAY | {"rope_scaling": 4.0, "rope_original_context": 16}])
def test_of_one_token_it_is_the_model_after_that_token(config):
    model = tiny_gpt(std=0.7, vocab_size=16, **config).double()
    token, text = torch.tensor([5]), random_ids(2, 10, vocab_size=16)
    with torch.no_grad():
        expected = model(torch.cat((token.expand(2, 1), text), 1))[0][:, 1:]
        torch.testing.assert_close(transplanted(model, first_tokens(model, token))(text)[0], expected)
        assert (model(text)[0] - expected).abs().max() > 0.1


def test_of_many_tokens_it_has_their_means():
    model = tiny_gpt(std=0.7, vocab_size=16).double()
    tokens = torch.tensor([3, 3, 7])
    one, other, found = (first_tokens(model, x) for x in (tokens[:1], tokens[2:], tokens))
    for a, b, mean in zip(one, other, found, strict=True):
        torch.testing.assert_close(mean.key, (2 * a.key + b.key) / 3)
        torch.testing.assert_close(mean.value, (2 * a.value + b.value) / 3)
        norms = (2 * a.value.norm(dim=-1) + b.value.norm(dim=-1)) / 3
        torch.testing.assert_close(mean.value_agreement, mean.value.norm(dim=-1) / norms)
        torch.testing.assert_close(a.key_agreement, torch.ones(2).double())
    moved, without = (transplanted(model, found, with_value=value).transformer.h[1].attn for value in (True, False))
    assert torch.equal(moved.null_key, found[1].key)  # positions that are learned turn no keys
    assert torch.equal(moved.null_value, found[1].value)
    assert not without.null_value.any()


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_no_second_model_in_memory(tied):
    model = tiny_gpt(tie_embeddings=tied)
    moved = transplanted(model, first_tokens(model, torch.tensor([3])))
    of_each = [{p.data_ptr(): p.numel() for p in one.parameters()} for one in (model, moved)]
    added = of_each[1].keys() - of_each[0].keys()
    assert len(added) == 2 * model.config.n_layer  # a key and a value
    assert len(of_each[1]) == len(list(moved.parameters())) == len(of_each[0]) + len(added)
    assert {p.dtype for p in moved.parameters()} == {torch.float32}
    assert moved(random_ids(1, 3))[0].isfinite().all()


def test_a_token_is_computed_once_however_often_it_is_in_the_text(monkeypatch):
    model, computed = tiny_gpt(vocab_size=16), []
    monkeypatch.setattr(model, "features", lambda idx, own=model.features: computed.append(len(idx)) or own(idx))
    first_tokens(model, random_ids(1, 1000, vocab_size=16)[0])
    assert sum(computed) == 16


def test_only_softmax_has_a_place_for_it():
    model = tiny_gpt(normalizer="softmax1")
    with pytest.raises(ValueError, match="its normalizer is softmax1"):
        transplanted(model, first_tokens(model, torch.tensor([1])))


@pytest.mark.slow
def test_smollm2_loses_its_sinks_and_massive_activations_and_predicts_no_worse(smollm2):
    figures = SHARED.parent / "reference_smollm2.json"
    if not figures.exists():
        pytest.skip(f"an extra: no {figures}")
    calibration, text = torch.tensor(json.loads(figures.read_text())["tokens"]).view(16, 64)[:14].split([12, 2])
    model, _ = load_model(f"hf:{smollm2}")
    first = first_tokens(model, calibration.flatten())
    losses, sinks, peaks = {}, {}, {}
    for name, one in {
        "softmax": model,
        "moved": transplanted(model, first),
        "without value": transplanted(model, first, with_value=False),
    }.items():
        activations = Activations(one)
        with torch.no_grad():
            activations.update(text)
            losses[name] = one(text[:, :-1], text[:, 1:])[1].item()
        attention = activations.attention.values()
        sinks[name] = np.mean([layer.figures["sink_rate"].mean().item() for layer in attention])
        blocks = [activations.tensors[f"transformer.h.{layer}"] for layer in range(model.config.n_layer)]
        peaks[name] = max(block.all.moments.max_abs for block in blocks)
    assert sinks["softmax"] > 0.7
    assert sinks["moved"] < 0.02
    assert peaks["softmax"] > 20_000
    assert peaks["moved"] < 2_000
    assert losses["moved"] < losses["softmax"]
    assert losses["without value"] > losses["softmax"] + 0.2
