"""Divergences of logits by PyTorch's own, whatever the block, and what a hinge says of them."""

import pytest
import torch
from torch.nn import functional as F

from measure import predictions
from measure.predictions import DIVERGENCES, aggregates, divergences, hinge, hinge_sentence, histogram


@pytest.mark.parametrize("block", [2**21, 7 * 3])
def test_divergences_are_those_of_the_softmax_of_the_logits(block, monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK", block)
    a, b = 3 * torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, likeliest = divergences(a, b, order=2.0)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = {
        "kl_forward": F.kl_div(q.log(), p, reduction="none").sum(-1),
        "kl_reverse": F.kl_div(p.log(), q, reduction="none").sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "hellinger": ((p.sqrt() - q.sqrt()) ** 2 / 2).sum(-1).sqrt(),
        "renyi": (p**2 / q).sum(-1).log(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[list(DIVERGENCES).index(name)], values, rtol=1e-10, atol=1e-13)
    for (tokens, probabilities), x in zip(likeliest, (p, q), strict=True):
        assert torch.equal(tokens.long(), x.argmax(-1))
        torch.testing.assert_close(probabilities, x.amax(-1))


def test_a_hinge_fires_where_the_aggregate_is_above_and_says_so():
    values = torch.zeros(len(DIVERGENCES), 100, dtype=torch.float64)
    values[list(DIVERGENCES).index("kl_reverse"), 0] = 10  # mean 0.1, rmse 1, p95 0, max 10
    rows = aggregates(values)
    fires = {row["divergence"]: row for row in hinge(rows, 0.5)}["kl_reverse"]
    assert [fires[how] for how in ("mean", "rmse", "p95", "max")] == [False, True, False, True]
    assert hinge_sentence(rows, 0.5).endswith("the mean and p95 do not fire, while the rmse and max do")
    assert hinge_sentence(rows, 20).endswith("no aggregate fires")


def test_every_position_is_in_one_bin():
    values = torch.logspace(-9, 4, 50, dtype=torch.float64).expand(len(DIVERGENCES), 50)
    rows = histogram(values)
    assert [sum(row[name] for row in rows) for name in ("kl_forward", "kl_reverse")] == [50, 50]
    assert [row["from"] for row in rows[1:]] == [row["to"] for row in rows[:-1]]
