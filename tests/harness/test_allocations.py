"""What is followed without memory is what the same function allocates with it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.allocations import follow
from tests.helpers import allocated


def squares(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Keeps x·weight, and x as it was given; has exp(x)·2 for a while."""
    (x.exp() * 2).sum()
    return (x * weight).square().sum(0)


@pytest.mark.parametrize("rows", [1, 300])
def test_the_bytes_of_each_pass_are_those_of_the_tensors_that_it_makes(rows):
    size, row = 4 * rows * 50, 4 * 50
    with FakeTensorMode():
        x, weight = torch.empty(rows, 50, requires_grad=True), torch.empty(50)
        found = follow(lambda x: squares(x, weight), x, known=[weight])
    assert found.kept == size  # x·weight; exp(x) is kept by nothing, since nothing leads to the sum
    assert found.forward == 2 * size  # with exp(x) and twice that, or with the square and the product
    # The result's gradient, expanded, is a view: its factor 2 x·weight, their product, and then that by weight.
    assert 3 * size <= found.backward <= 3 * size + row

    def whole() -> None:
        own, other = torch.ones(rows, 50, requires_grad=True), torch.ones(50)
        squares(own, other).backward(torch.ones(50))

    whole()
    assert allocated(whole) == pytest.approx(size + row + max(found.forward, found.backward) + 2 * row, abs=3 * row)
