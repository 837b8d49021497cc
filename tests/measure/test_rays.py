"""Rows along a ray, in figures a head."""

import pytest
import torch

from measure import rays
from measure.divergence import Ray


@pytest.mark.parametrize("n", [1, 4, 5, 2**24 + 2])
def test_the_median_of_any_number_of_rows(n):
    """More than torch.quantile takes: 2²⁴ rows of a head are 16,384 windows of 1,024 tokens."""
    shuffled = (torch.arange(n) * 5 + 1).remainder(n) if n % 5 else torch.arange(n)  # coprime to n: a permutation
    assert rays.median(shuffled.double()) == (n - 1) / 2


def test_a_head_of_which_no_row_moves_has_no_figures():
    alpha0 = torch.full((1, 4, 5), 0.2, dtype=torch.float64)
    still = Ray(*(field[0][:0] for field in rays.rays_of_heads(alpha0, torch.zeros_like(alpha0), 1.0)))
    found = rays.medians(still, 1.0)
    assert found.pop("rows") == 0
    assert set(found.values()) == set(rays.ends(still).values()) == {None}


def test_blocks_of_any_size_give_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    alpha0 = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).softmax(-1)
    whole = rays.rays_of_heads(alpha0, slopes, 0.7)
    monkeypatch.setattr(rays, "BLOCK", 10)
    assert torch.equal(rays.rays_of_heads(alpha0, slopes, 0.7), whole)
    assert whole.shape[1:] == (2, 6)
