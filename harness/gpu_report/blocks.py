"""(h) The blocks of the Triton kernels for each tile, over a small grid: the fastest, beside those in use.

The grid is compiled first, in as many processes as there are processors: Triton keeps what it has compiled on disk.
Then one process times all of a shape in turn.
"""

import contextlib
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch

from harness.corpus_writing import cpu_count
from harness.gpu_report import Section, Table, Task, pivot, with_error
from harness.gpu_report.kernels import CHANNELS, TOKENS
from harness.timing import in_turn, median, median_ratio

GRID = [
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 8, 2),
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3),
]  # fmt: skip
"""rows of a program's own block, rows of a step of its loop, warps, stages"""
KERNELS = ("forward", "keys", "queries")
IN_USE = "in use"
TILES = ["clipped", "relu", "sigmoid", "softpick"]
ROUNDS = 10


def run(task: Task) -> Iterator[dict]:
    tiles, shapes, grid, rounds = TILES, list(itertools.product((1024, 4096), (64, 128))), GRID, ROUNDS
    if task.cpu:
        tiles, shapes, grid, rounds = ["relu"], [(32, 16)], [(16, 16, 4, 1)], 2
    jobs = [(task.cpu, *job) for job in itertools.product(tiles, shapes, KERNELS, grid)]
    with ProcessPoolExecutor(cpu_count(), multiprocessing.get_context("spawn")) as pool:
        reasons = (map if task.cpu else pool.map)(refusal, *zip(*jobs, strict=True))
        refused = dict(zip(jobs, reasons, strict=True))
    for tile, (T, D), kernel in itertools.product(tiles, shapes, KERNELS):
        row: dict[str, Any] = {"tile": tile, "T": T, "D": D, "kernel": kernel}
        calls = {IN_USE: call(task.cpu, tile, (T, D), kernel)}
        for blocks in grid:
            if reason := refused[task.cpu, tile, (T, D), kernel, blocks]:
                yield row | {"blocks": str(blocks), "note": reason}
            else:
                calls[str(blocks)] = call(task.cpu, tile, (T, D), kernel, blocks)
        in_turn(calls, task.device, 2)
        laps = in_turn(calls, task.device, rounds)
        for name in calls:
            seconds, now = ([sum(each.values()) for each in laps[own]] for own in (name, IN_USE))
            ratio = median_ratio(seconds, now)
            row |= {"blocks": name, "ms": 1e3 * median(seconds).value}
            yield row | {"ratio": ratio.value, "error of the ratio": ratio.error}


def refusal(*job) -> str | None:
    """Why the kernel does not run with these blocks; None where it does."""
    try:
        laps = in_turn({"": call(*job)}, torch.device("cpu" if job[0] else "cuda"), 1)
        return None if laps else "not run"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


@functools.cache
def inputs(cpu: bool, tile: str, T: int, D: int) -> tuple[torch.Tensor, ...]:
    """dL/dO, q, k, v, and the statistic and what else the backward pass reads."""
    from kernels.triton_tiles import tile_forward

    B, H = (1, 2) if cpu else (TOKENS // T, CHANNELS // D)
    numbers = torch.randn(B, T, 4 * H * D, device="cpu" if cpu else "cuda")
    grad, q, k, v = numbers.to(torch.float32 if cpu else torch.bfloat16).view(B, T, 4, H, D).permute(2, 0, 3, 1, 4)
    out, lse, kept = tile_forward(q, k, v, D**-0.5, tile, 1.0, 0.0)
    return grad, q, k, v, out if tile == "softpick" else kept, lse


def call(cpu: bool, tile: str, shape: tuple[int, int], kernel: str, blocks: tuple | None = None) -> Callable:
    """The pass in which the kernel is, with these blocks; with those in use where there are none."""
    from kernels.triton_tiles import tile_backward, tile_forward

    grad, q, k, v, kept, lse = inputs(cpu, tile, *shape)
    how = (shape[1] ** -0.5, tile, 1.0, 0.0)

    def measured(laps) -> None:
        with with_blocks(kernel, blocks) if blocks else contextlib.nullcontext():
            if kernel == "forward":
                tile_forward(q, k, v, *how)
            else:
                tile_backward(grad, q, k, v, kept, lse, *how, "full")
        laps.end(kernel)

    return measured


@contextlib.contextmanager
def with_blocks(kernel: str, blocks: tuple[int, int, int, int]):
    from kernels import triton, triton_tiles

    former, (own, step, warps, stages) = triton._block_sizes, blocks

    def chosen(q, name: str):
        return (own, step, {"num_warps": warps, "num_stages": stages}) if name == kernel else former(q, name)

    with mock.patch.object(triton, "_block_sizes", chosen), mock.patch.object(triton_tiles, "_block_sizes", chosen):
        yield


def present(rows: list[dict]) -> list[Table]:
    def cell(row: dict) -> str:
        return row.get("note") or f"{row['ms']:.2f} ms, {with_error(row['ratio'], row['error of the ratio'], 2)}"

    named = [row | {"kernel": f"{row['tile']}, {row['kernel']}, T {row['T']:,}, D {row['D']}"} for row in rows]
    caption = "The pass with the kernel in it, by (own rows, rows of a step, warps, stages); ratio over the one in use"
    return [Table(caption, pivot(named, "kernel", "blocks", cell))]


SECTION = Section("Blocks of the Triton kernels", 2.5, run, present)
