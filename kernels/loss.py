"""The cross-entropy of a linear layer's outputs, without all of its logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backends import TRITON

# Rows of logits at a time. More of them cost memory, fewer read and write the sum of the weight's gradients more often.
ROWS = {"cpu": 2048, "cuda": 4096}


IGNORED = -1
"""the target that does not count"""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the targets (…) that count, in nats, from logits (…, V); summed in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.view(-1, wide.size(-1)), targets.reshape(-1), ignore_index=IGNORED)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy(F.linear(x, weight), targets)` of x (…, C), weight (V, C) and targets (…), a chunk of rows at a
    time.

    The gradients of x and weight are computed together with the loss, and the backward pass only scales them: so the
    logits need neither be kept nor computed twice (Hsu et al. 2024, "Liger Kernel").
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which F.linear leaves alone too
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _LinearCrossEntropy.apply(x.reshape(-1, x.size(-1)), weight, targets.reshape(-1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.wanted = ctx.needs_input_grad[:2]
        loss, count, *sums = torch.ops.offbyone.linear_cross_entropy(x, weight, targets, *ctx.wanted)
        ctx.save_for_backward(x, weight, targets, count, *sums)
        return loss

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, count, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradients is asked for: from all the logits
            x, weight = x.view_as(x), weight.view_as(weight)  # apart: x itself is made of the weight where it is tied
            inputs = [own for own, wants in zip((x, weight), ctx.wanted, strict=True) if wants]
            with torch.autocast(x.device.type, enabled=False):
                loss = cross_entropy(F.linear(x, weight.to(x.dtype)), targets)
            gradients = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
            return *(next(gradients) if wants else None for wants in ctx.wanted), None
        # The factor is float32 at least: rounded to a half type it would be off by the same in all of a gradient.
        scaled = ((grad / count.clamp(min=1) * own).to(to.dtype) for own, to in zip(sums, (x, weight), strict=True))
        return *(own if wants else None for own, wants in zip(scaled, ctx.wanted, strict=True)), None


@torch.library.custom_op("offbyone::linear_cross_entropy", mutates_args=())
def _by_chunks(
    x: Tensor, weight: Tensor, targets: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), targets (N) → the mean loss; the number of targets that count; the gradients of the
    *sum* of the losses, with respect to x in its type and to weight in float32 at least: empty where not wanted. An
    operator of its own, so that torch.compile need not see the loop."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    sum_x, sum_weight = _empty_sums(x, weight, wants_x, wants_weight)
    sum_weight.zero_()
    total, matrix, start = x.new_zeros((), dtype=dtype), weight.to(x.dtype), 0
    with torch.autocast(x.device.type, enabled=False):
        for own, own_targets in zip(x.split(_rows(x)), targets.split(_rows(x)), strict=True):
            losses, slopes = _losses_and_slopes(own @ matrix.T, own_targets, wants_x or wants_weight)
            total += losses.sum()
            if wants_x:
                torch.mm(slopes, matrix, out=sum_x[start : start + len(own)])
            if wants_weight:
                _add_product(sum_weight, slopes.T, own)
            del slopes  # before the next chunk's are there
            start += len(own)
    count = (targets != IGNORED).sum().to(dtype)
    return total / count, count, sum_x, sum_weight


@_by_chunks.register_fake
def _(x, weight, targets, wants_x, wants_weight):
    loss, count = (x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return loss, count, *_empty_sums(x, weight, wants_x, wants_weight)


def _empty_sums(x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty_like(x if wants_x else x[:0]), torch.empty_like(
        weight if wants_weight else weight[:0], dtype=dtype
    )


def _rows(x: Tensor) -> int:
    """The rows of a chunk: as many in each as possible, and a multiple of 128, which matrix products like."""
    chunks = -(-len(x) // ROWS.get(x.device.type, ROWS["cuda"]))
    return -(-len(x) // (128 * max(1, chunks))) * 128 or 128


def _losses_and_slopes(logits: Tensor, targets: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N) → the losses (N), 0 where the target does not count, and, if wanted, their slopes
    (N, V), dloss/dlogits, in logits' type. It may overwrite the logits."""
    if logits.is_cuda and TRITON and logits.dtype != torch.float64:
        from kernels.triton_loss import cross_entropy_

        return cross_entropy_(logits, targets, IGNORED, slopes), logits
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    counts = targets != IGNORED
    places = targets.where(counts, 0).unsqueeze(-1)  # any other that is no row of the weight is an error
    losses = -log_p.gather(-1, places).squeeze(-1) * counts
    if slopes:
        p = log_p.exp_()
        p.scatter_add_(-1, places, p.new_full((), -1.0).expand(places.shape))
        logits = p.mul_(counts.unsqueeze(-1)).to(logits.dtype)
    return losses, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. On CUDA a product of half types is not rounded before it is added to a float32 total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)
