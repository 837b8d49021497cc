"""Rows along a ray, in figures a head."""

import pytest
import torch

from measure import rays


@pytest.mark.parametrize("n", [1, 4, 5, 2**24 + 2])
def test_the_median_of_any_number_of_rows(n):
    """More than torch.quantile takes: 2²⁴ rows of a head are 16,384 windows of 1,024 tokens."""
    shuffled = (torch.arange(n) * 5 + 1).remainder(n) if n % 5 else torch.arange(n)  # coprime to n: a permutation
    assert rays.median(shuffled.double()) == (n - 1) / 2
