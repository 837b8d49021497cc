"""The loss by chunks of rows: PyTorch's own cross-entropy in float64, its first and second derivatives, its memory."""

import weakref

import pytest
import torch
from torch.nn import functional as F

from kernels import loss
from kernels.loss import IGNORED, linear_cross_entropy
from model import GPT
from tests.helpers import random_ids, tiny_gpt


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setitem(loss.ROWS, "cpu", 128)


def inputs(dtype=torch.float64, shape=(3, 100), C=24, V=300) -> list[torch.Tensor]:
    """x, weight and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, C, generator=generator, dtype=dtype) for size in (shape, (V,)))
    targets = torch.randint(V, shape, generator=generator)
    targets[0, :5] = IGNORED
    return [x.requires_grad_(), weight.requires_grad_(), targets]


def reference(x, weight, targets):
    logits = F.linear(x.double(), weight.double())
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def error(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    # A gradient of half types is rounded thrice: the logits, their slopes, the product.
    [
        (torch.float64, None, 1e-14),
        (torch.float64, torch.bfloat16, 1e-14),  # autocast leaves it alone
        (torch.float32, None, 1e-6),
        (torch.float32, torch.bfloat16, 3 * 2**-8),
        (torch.bfloat16, None, 3 * 2**-8),
    ],
)
def test_the_loss_and_its_gradients(dtype, autocast, tolerance, compiled):
    x, weight, targets = inputs(dtype)
    function = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = function(x, weight, targets)
    expected = reference(x, weight, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert error(found, expected) < tolerance
    pairs = zip(*(torch.autograd.grad(3 * own, (x, weight)) for own in (found, expected)), strict=True)
    for own, other in pairs:
        assert own.dtype == dtype
        assert error(own, other) < tolerance


def test_second_derivatives():
    x, weight, targets = inputs(shape=(2, 7), C=5, V=11)
    torch.autograd.gradgradcheck(lambda x, weight: linear_cross_entropy(x, weight, targets), (x, weight))


def test_a_graph_of_the_gradients_changes_none_of_them():
    """x is made of the weight too, as in a model whose embedding and head are one."""
    model, idx = tiny_gpt(std=0.4).double(), random_ids(2, 12)
    loss, parameters = model(idx, idx.roll(-1, 1), with_logits=False)[1], list(model.parameters())
    without = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters, create_graph=True), without)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    arguments = inputs()
    arguments[frozen].requires_grad_(False)
    (found,) = torch.autograd.grad(linear_cross_entropy(*arguments), arguments[1 - frozen])
    (expected,) = torch.autograd.grad(reference(*arguments), arguments[1 - frozen])
    assert error(found, expected) < 1e-14


def test_without_a_target_that_counts_the_loss_is_nan_and_its_gradient_zero_as_pytorchs():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED))
    assert loss.isnan()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("target", [-100, 300])  # PyTorch's own default for what is ignored; the first beyond V
def test_a_target_that_is_no_row_of_the_weight_is_an_error(target):
    x, weight, targets = inputs()
    targets[1, 3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets)


def test_the_logits_of_one_chunk_at_a_time_are_in_memory(monkeypatch):
    x, weight, targets = inputs()
    former, rows = [], []

    def watched(logits, *arguments, wrapped=loss._losses_and_slopes):
        assert all(reference() is None for reference in former)
        losses, slopes = wrapped(logits, *arguments)
        former.extend(map(weakref.ref, (logits, slopes)))
        rows.append(len(logits))
        return losses, slopes

    monkeypatch.setattr(loss, "_losses_and_slopes", watched)
    linear_cross_entropy(x, weight, targets)
    assert rows == [128, 128, 44]


def test_a_model_that_is_asked_for_no_logits():
    model: GPT = tiny_gpt(noise=0.3)
    idx = random_ids(3, 12)
    targets = idx.roll(-1, 1)
    targets[:, -1] = IGNORED
    _, expected = model(idx, targets)
    logits, found = model(idx, targets, with_logits=False)
    assert logits is None
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(own, parameters) for own in (found, expected)), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
