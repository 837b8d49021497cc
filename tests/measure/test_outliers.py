"""What outliers are called, and where: names of tensors, channels, heads."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from measure.activations import TensorStatistics
from measure.outliers import activation_metrics, constant, sink_heads, where_largest
from tests.helpers import every_normalizer, random_ids, tiny_gpt


def test_a_sequence_that_does_not_vary_has_a_note():
    tensor = TensorStatistics().update(torch.stack((torch.zeros(4, 3), torch.arange(12.0).view(4, 3))))
    rows = [{"name": "transformer.h.0"} | tensor.all.row()]
    assert constant(rows) == ["transformer.h.0: all equal within a sequence, so it has no per_sequence_kurtosis"]


def test_the_summarys_maxima_say_which_tensor_they_are_of():
    names = (
        "transformer.h.0",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.1.mlp.hidden",
        "transformer.h.0 [first token]",
    )
    values = ((3.0, 7.0), (4.0, 5.0), (99.0, 99.0), (99.0, 99.0))  # the last two are not among Bondarenko et al.'s
    rows = [
        {"name": name, "per_sequence_kurtosis": kurtosis, "per_sequence_max_abs": largest, "excess_kurtosis": 0.0}
        for name, (kurtosis, largest) in zip(names, values, strict=True)
    ]
    expected = ["max kurtosis: 4, of transformer.h.1.mlp.c_proj", "max infinity norm: 7, of transformer.h.0"]
    assert where_largest(rows) == expected
    rows[0]["per_sequence_kurtosis"] = None
    assert where_largest(rows) == expected[1:]


def test_of_many_sink_heads_the_worst_are_named():
    """A head that sinks in half of the sequences is none yet."""
    heads = [{"layer": head // 4, "head": head % 4, "sink_rate": head / 10} for head in range(11)]
    start = "sink heads, layer.head (share of sequences): 2.2 (100%), 2.1 (90%), 2.0 (80%), 1.3 (70%), 1.2 (60%)"
    assert sink_heads([*heads, {"layer": 6, "head": 0, "sink_rate": None}]) == [start]
    (note,) = sink_heads(heads * 3)
    assert note.endswith("2.0 (80%), 1.3 (70%), and 5 more of 33")


@every_normalizer
def test_what_training_logs_is_of_the_model_by_hand(normalizer):
    model, idx, figures = tiny_gpt(std=0.7, normalizer=normalizer).double(), random_ids(3, 12), []
    with torch.no_grad():
        x = model.transformer.wte(idx) + model.transformer.wpe.weight
        for block in model.transformer.h:
            q, k, _ = (z.view(3, 12, 2, 4).transpose(1, 2) for z in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1))
            scores = (q @ k.mT / 2).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
            null = {"softmax": torch.full((2,), -math.inf), "softmax1": torch.zeros(2)}.get(normalizer)
            null = block.attn.sink if null is None else null
            scores = torch.cat((scores, null.double().view(1, 2, 1, 1).expand(3, 2, 12, 1)), dim=-1)
            P, x = torch.softmax(scores, dim=-1)[..., :12], block(x)
            kurtoses = [stats.kurtosis(values.flatten().numpy()) for values in (P, P[:, :, 8:], x)]
            sinks = (P[..., 0].mean(-1) > 0.3).double().mean().item()
            figures.append([*kurtoses, sinks, P.sum(-1).mean().item(), x.abs().max().item()])
    *means, max_abs = zip(*figures, strict=True)
    expected = [*(np.mean(values) for values in means), max(max_abs)]
    assert list(activation_metrics(model, idx).values()) == pytest.approx(expected, rel=1e-9)
    late = activation_metrics(model, idx[:, :8])["activation_kurtosis/attention_probabilities_late"]
    assert late is None  # no query comes after the first eight
