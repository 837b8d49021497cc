"""The cross-entropy of a linear layer's outputs, without all of its logits in memory."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backends import TRITON

# Rows of logits at a time. More of them cost memory, fewer read and write the sum of the weight's gradients more often.
ROWS = {"cpu": 1024, "cuda": 4096}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """The mean of `F.cross_entropy(F.linear(x, weight), targets)` over the targets that are not `ignore_index`.

    x (…, C), weight (V, C), targets (…) int64 → a scalar in float32 at least. Under autocast the products are computed
    in its type, as a linear layer's are. The gradients of x and weight are computed together with the loss, a chunk of
    rows at a time, and only scaled by the backward pass: so the logits need not be kept, nor computed twice (Hsu et
    al. 2024, Liger Kernel).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _LinearCrossEntropy.apply(x.reshape(-1, x.size(-1)), weight, targets.reshape(-1), ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index):
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        operator = torch.ops.offbyone.linear_cross_entropy
        loss, count, sum_x, sum_weight = operator(x, weight, targets, ignore_index, wants_x, wants_weight)
        ctx.save_for_backward(x, weight, targets, count, sum_x, sum_weight)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, count, *sums = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # the backward pass is to be differentiated in its turn
            with torch.autocast(x.device.type, enabled=False):
                loss = _readable(x, weight, targets, ctx.ignore_index)
                inputs = [own for own, wants in zip((x, weight), wanted, strict=True) if wants]
                gradients = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
            return *(next(gradients) if wants else None for wants in wanted), None, None
        factor = grad / count
        # In the factor's type, float32 at least: rounded to a half type it would be off in all of a gradient alike.
        scaled = ((factor * own).to(own.dtype) if wants else None for own, wants in zip(sums, wanted, strict=True))
        return *scaled, None, None


def _readable(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index)


@torch.library.custom_op("offbyone::linear_cross_entropy", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), targets (N) → the mean loss; the number of targets that count; the gradients of the
    *sum* of the losses with respect to x, in its type, and to weight, in weight's: empty where not wanted."""
    rows = _rows(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(len(x), dtype=wide)
    sum_x, sum_weight = _empty_sums(x, weight, wants_x, wants_weight)
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(x.dtype)
        sum_weight.zero_()
        for start in range(0, len(x), rows):
            own, chunk = x[start : start + rows], slice(start, start + rows)
            logits = own @ matrix.T
            losses[chunk], slopes = _cross_entropy(logits, targets[chunk], ignore_index, wants_x or wants_weight)
            if wants_x:
                torch.mm(slopes, matrix, out=sum_x[chunk])
            if wants_weight:
                _add_product(sum_weight, slopes.T, own)
            del logits, slopes  # before the next chunk's are there
    count = (targets != ignore_index).sum().to(wide)
    return losses.sum() / count, count, sum_x, sum_weight


@_operator.register_fake
def _(x, weight, targets, ignore_index, wants_x, wants_weight):
    scalar = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return scalar, scalar.clone(), *_empty_sums(x, weight, wants_x, wants_weight)


def _empty_sums(x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x if wants_x else x[:0]), torch.empty_like(weight if wants_weight else weight[:0])


def _rows(x: Tensor) -> int:
    """As equal chunks as possible, of a multiple of 128 rows, which matrix products like."""
    most = ROWS.get(x.device.type, ROWS["cuda"])
    chunks = -(-len(x) // most)
    return -(-len(x) // (128 * max(1, chunks))) * 128 or 128


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, slopes: bool) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N) → (N) losses, 0 where ignored, and, if wanted, dloss/dlogits (N, V) in logits' type and
    memory."""
    if logits.is_cuda and TRITON and logits.dtype != torch.float64:
        return _triton_kernel()(logits, targets, ignore_index, slopes), logits
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    counted, places = targets != ignore_index, targets.clamp(min=0).unsqueeze(-1)
    losses = -log_p.gather(-1, places).squeeze(-1) * counted
    if slopes:
        p = log_p.exp_()
        p.scatter_add_(-1, places, torch.full_like(places, -1, dtype=p.dtype))
        logits = p.mul_(counted.unsqueeze(-1)).to(logits.dtype)
    return losses, logits


@functools.cache
def _triton_kernel():
    from kernels.triton_loss import cross_entropy_

    return cross_entropy_


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; on CUDA a product of half types is added to a float32 total without being rounded first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)
