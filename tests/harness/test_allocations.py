"""What is followed without memory is what the same function allocates with it."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.allocations import follow
from tests.helpers import allocated

ROWS, COLUMNS = 300, 50
SIZE, ROW = 4 * ROWS * COLUMNS, 4 * COLUMNS


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    (x.detach().exp() * 2).sum()  # twice the size for a while, and nothing kept
    return (x * weight).square().sum(0)  # keeps the product


def smooth(x: Tensor, weight: Tensor) -> Tensor:
    return (x.sigmoid() * weight).tanh()  # keeps both functions' results, of which tanh's is the result


@pytest.mark.parametrize(("function", "kept", "forward"), [(weighted, SIZE, 2 * SIZE), (smooth, SIZE, 2 * SIZE)])
def test_what_is_followed_is_what_is_allocated(function, kept, forward):
    with FakeTensorMode():
        x, weight = torch.empty(ROWS, COLUMNS, requires_grad=True), torch.empty(COLUMNS)
        found = follow(lambda x: function(x, weight), x, known=[weight])
        result = function(x, weight).nbytes
    assert (found.kept, found.forward) == (kept, forward)

    x, weight, gradient = torch.ones(ROWS, COLUMNS, requires_grad=True), torch.ones(COLUMNS), torch.ones(result // 4)
    shape = (ROWS, COLUMNS) if result == SIZE else (COLUMNS,)

    def run() -> None:
        y = function(x, weight)
        y.backward(gradient.view(shape))
        x.grad = None

    run()
    peak = result + max(found.forward, found.backward)
    assert allocated(run) == pytest.approx(peak, abs=3 * ROW)  # sums have a few rows more
