"""Moments of weights."""

import pytest
import torch
from scipy import stats

from measure.probe import weight_kurtosis
from model import GPT
from tests.helpers import tiny_gpt


def probed_gpt(normalizer: str = "softmax") -> GPT:
    return tiny_gpt(std=0.7, block_size=10, vocab_size=13, normalizer=normalizer).double()


def test_weight_kurtosis_is_scipys_of_every_matrix():
    model = probed_gpt()
    found = weight_kurtosis(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in found.items():
        weights = model.get_parameter(name).detach().flatten().numpy()
        assert value == pytest.approx(stats.kurtosis(weights), rel=1e-11)


def test_a_constant_matrix_has_no_kurtosis():
    model = probed_gpt()
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    assert weight_kurtosis(model)["transformer.wpe.weight"] is None
