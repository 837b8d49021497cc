"""Massive activations: the exact median of a text, and what lies a thousand times above it."""

import numpy as np
import pytest
import torch

from measure.massive import Magnitudes, Massive


def found_in(batches: list[torch.Tensor]) -> Massive | None:
    magnitudes = Magnitudes()
    for look in (magnitudes.count, magnitudes.collect):
        for x in batches:
            look(x)
    return magnitudes.found()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7])  # the median is 0 where most are
@pytest.mark.parametrize("channels", [7, 8])  # an odd count and an even one
def test_the_median_and_the_largest_are_those_of_everything_at_once(dtype, zeros, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(5, 9, channels, dtype=torch.float64).cauchy_(generator=generator)
    x[torch.rand(x.shape, generator=generator) < zeros] = 0
    x[1, 0, 3], x[4, 0, 3], x[3, 6, 1], x[2, 2, 2] = -5000, 4000, 2500, 99
    x = x.to(dtype)
    found, values = found_in([x[:2], x[2:3], x[3:]]), x.double().abs().numpy()
    assert found.median_abs == np.sort(values, axis=None)[(values.size - 1) // 2]
    assert (found.max_at, found.value) == ((1, 0, 3), x[1, 0, 3].item())
    limit = max(100, 1000 * found.median_abs)
    assert found.massive_at == sorted({tuple(at[1:]) for at in np.argwhere(values > limit).tolist()})
    assert {(0, 3), (6, 1)} <= set(found.massive_at)
    expected = pytest.approx(values.max() / found.median_abs) if found.median_abs else None
    assert found.max_over_median == expected


def test_large_beside_a_large_median_and_large_alone_are_not_massive():
    x = torch.ones(1, 4, 5)
    x[0, 2, 3] = 1001
    assert found_in([x]).massive_at == [(2, 3)]
    assert found_in([1.1 * x]).massive_at == [(2, 3)]
    assert found_in([0.09 * x]).massive_at == []  # 90.09
    x[0, 2, 3] = 999
    assert found_in([x]).massive_at == []  # 999 × the median


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_median(value):
    x = torch.ones(2, 3, 4)
    x[1, 2, 3] = value
    assert found_in([torch.ones(2, 3, 4), x, torch.ones(2, 3, 4)]) is None
    assert Magnitudes().found() is None
