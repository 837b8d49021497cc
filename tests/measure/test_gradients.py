"""What a gradient loses without the lateral part, against the gradients of models that are trained so."""

import math
import re

import pytest
import torch

from measure.gradients import MODES, compare, findings, run_backwards
from measure.jacobian import pool
from tests.helpers import every_normalizer, random_ids, tiny_gpt


def flat_gradient(x, y, **config) -> torch.Tensor:
    model = tiny_gpt(noise=0.3, **config).double()
    model(x, y)[1].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@every_normalizer
def test_cosines_are_those_of_models_with_the_other_backward(normalizer):
    ids = random_ids(4, 13)
    x, y = ids[:, :-1], ids[:, 1:]
    model = tiny_gpt(noise=0.3, normalizer=normalizer, backward="ste").double()
    asked = []
    found = run_backwards(model, lambda what: asked.append(what) or [(x, y)])
    assert asked == ["full backward", *(f"{mode} backward" for mode in MODES)]
    assert found.sequences == 4
    assert [block.attn.backward_mode for block in model.transformer.h] == ["ste", "ste"]
    values = compare(found.products, found.parameters)
    full = flat_gradient(x, y, normalizer=normalizer)
    for mode in MODES:
        other = flat_gradient(x, y, normalizer=normalizer, backward=mode)
        # float64 sums of some thousand terms, sequence by sequence in place of the batch
        assert values[f"cos_{mode}"] == pytest.approx((other @ full / other.norm() / full.norm()).item(), rel=1e-10)
        assert values[f"norm_ratio_{mode}"] == pytest.approx((other.norm() / full.norm()).item(), rel=1e-10)


def test_queries_and_keys_stand_apart_from_values():
    ids = random_ids(2, 13)
    found = run_backwards(tiny_gpt(noise=0.3).double(), lambda _: [(ids[:, :-1], ids[:, 1:])])
    for mode in MODES:
        name = "transformer.h.0.attn.c_attn.weight"
        whole, part = found.products[mode][name], found.products[mode][f"{name} q, k"]
        assert 0 < part[2] < whole[2]  # v's rows are in the whole alone


def test_what_is_not_finite_is_named_and_null():
    model, ids = tiny_gpt(), random_ids(2, 13)
    model.transformer.h[1].mlp.c_fc.bias.data[0] = math.nan
    found = run_backwards(model, lambda _: [(ids[:, :-1], ids[:, 1:])])
    assert set(compare(found.products, found.parameters).values()) == {None}
    notes = findings([pool(layer) for layer in found.splits], found.loss, found.products)
    assert notes[0] == "the loss is nan"
    (note,) = [note for note in notes if note.startswith("full gradients that are NaN or Inf: transformer.wte.weight")]
    assert re.search(r", and \d+ more$", note)
    assert note.count("transformer.") == 10
