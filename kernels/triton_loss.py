"""The cross-entropy of rows of logits and its slopes, in one kernel, for NVIDIA GPUs, in Triton.

A row is read twice, the second time from the cache, and overwritten once; its sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# Not tl.max and tl.sum, compiled functions themselves: the tests' interpreter, switched on late, cannot call those.
@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, ignored, V: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its loss, and its logits x overwritten by exp(x − logsumexp) − [target]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    if target == ignored:
        tl.store(losses + row, 0.0)
        if SLOPES:
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(logits + columns, tl.full((BLOCK,), 0.0, logits.dtype.element_ty), mask=columns < V)
        return

    # What is no column makes the loss NaN: the memory beside the row would give a plausible one.
    at_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.reduce(x, 0, _larger))
        total = total * tl.exp(largest - larger) + tl.reduce(tl.exp(x - larger), 0, _sum)
        largest = larger
    lse = largest + tl.log(total)
    tl.store(losses + row, lse - at_target)
    if SLOPES:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            slope = tl.exp(x - lse) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, slope.to(logits.dtype.element_ty), mask=columns < V)


BLOCK, WARPS = 16384, 16  # the fastest of 15 pairs on an H100, for rows of 50,304 bfloat16 (benchmarks/)


def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int, slopes: bool) -> Tensor:
    """The losses (N), float32, of logits (N, V), contiguous, float32 or a half type, and targets (N) int64: 0 where
    ignored, NaN where beyond V. If `slopes`, the logits are overwritten by the losses' slopes."""
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(N,)](
            logits, targets, losses, ignore_index, V, SLOPES=slopes, BLOCK=block, num_warps=WARPS
        )
    return losses
