"""(h) The blocks of the Triton kernels for each tile, over a small grid: the fastest, beside those in use.

A tile's kernels are compiled first, in as many processes as there are processors: Triton keeps what it has compiled on
disk. They are loaded onto the card there, which says what is too large for it, and not run, so that no memory is taken.
Then this process compares the outputs of all blocks with those of the blocks in use, once, and times them in turn.
"""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

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
AT_ONCE = 16  # processes, of which each keeps half a GiB of the card for itself


class Job(NamedTuple):
    """One kernel to compile. The context's length is no part of it: it is a number that the kernel is given."""

    tile: str
    D: int
    kernel: str
    blocks: tuple[int, int, int, int] | None
    """None for those in use"""


class Inputs(NamedTuple):
    """What the passes of a tile read, with what its forward pass left for the backward."""

    tile: str
    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor
    lse: Tensor


def run(task: Task) -> Iterator[dict]:
    tiles, shapes, grid, rounds = TILES, list(itertools.product((1024, 4096), (64, 128))), GRID, ROUNDS
    if task.cpu:
        tiles, shapes, grid, rounds = ["relu"], [(32, 16)], [(16, 16, 4, 1)], 2
    for tile in tiles:
        sizes = dict.fromkeys(D for _, D in shapes)
        refused = refusals(task, [Job(tile, *job) for job in itertools.product(sizes, KERNELS, (None, *grid))])
        for T, D in shapes:
            inputs = draw(task, tile, T, D)
            for kernel in KERNELS:
                own = {job.blocks: why for job, why in refused.items() if (job.D, job.kernel) == (D, kernel)}
                for row in measure(task, inputs, kernel, own, rounds):
                    yield {"tile": tile, "T": T, "D": D, "kernel": kernel} | row
            del inputs  # the next shape's need the memory


def refusals(task: Task, jobs: list[Job]) -> dict[Job, dict]:
    """The `refusal` of each. The processes end with it: card and processors are quiet when something is timed."""
    found = {}
    with executor(task.cpu) as pool:
        for job, future in [(job, pool.submit(refusal, job, dtype_of(task))) for job in jobs]:
            try:
                found[job] = future.result()
            except Exception as error:  # the pool's, where a process of it has died
                found[job] = failed(error)
    return found


def executor(cpu: bool) -> Executor:
    """Processes that compile; for the dry run, which compiles nothing, this one."""
    if cpu:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(min(AT_ONCE, cpu_count()), multiprocessing.get_context("spawn"))


def dtype_of(task: Task) -> torch.dtype:
    return torch.float32 if task.cpu else torch.bfloat16


def refusal(job: Job, dtype: torch.dtype) -> dict:
    """What a row says of a kernel that cannot be timed: why the compiler or the card refuses it, or that it failed; {}
    of one that compiles and fits."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from kernels import triton, triton_tiles

    def launch(kernel, grid):
        def load(*arguments, **options) -> None:
            if kernel.__name__ == f"_{job.kernel}_kernel":
                compiled = kernel.warmup(*arguments, grid=grid, **options)
                if compiled is not None:  # the interpreter has nothing
                    compiled[grid]  # loads it onto the card

        return load

    # Two heads of a length as divisible as the true ones, in the memory of the CPU: nothing reads them.
    grad, q, k, v = projection(1, 64, 2, job.D, torch.device("cpu"), dtype)
    inputs = Inputs(job.tile, grad, q, k, v, q, q.new_empty(1, 2, 64, dtype=torch.float32))
    a_kernel = type(triton_tiles._forward_kernel if job.kernel == "forward" else triton._keys_kernel)
    try:
        with mock.patch.object(a_kernel, "__getitem__", launch):
            launched(inputs, job.kernel, job.blocks)
        return {}
    except (CompilationError, OutOfResources) as error:
        return {"note": told(error)}
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> dict:
    return {"note": told(error), "verdict": "FAILED"}


def told(error: Exception) -> str:
    """In one line: of a compiler's error the last, which the lines of the source come before."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"[:120]


def draw(task: Task, tile: str, T: int, D: int) -> Inputs:
    from kernels.triton_tiles import tile_forward

    torch.manual_seed(task.seed)
    B, H = (1, 2) if task.cpu else (TOKENS // T, CHANNELS // D)
    grad, q, k, v = projection(B, T, H, D, task.device, dtype_of(task))
    out, lse, kept = tile_forward(q, k, v, D**-0.5, tile, 1.0, 0.0)
    return Inputs(tile, grad, q, k, v, out if tile == "softpick" else kept, lse)


def projection(B: int, T: int, H: int, D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Four views (B, H, T, D) of one tensor, as a model's q, k and v are: random numbers."""
    return torch.randn(B, T, 4, H, D, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)


def measure(task: Task, inputs: Inputs, kernel: str, refused: dict, rounds: int) -> Iterator[dict]:
    """The rows of a kernel's blocks, those in use first; `refused` has a `refusal` for each."""
    calls: dict[str, Callable] = {}
    expected = None
    for blocks, row in refused.items():
        if not row:
            try:
                found = launched(inputs, kernel, blocks)
                expected = found if expected is None else expected
                row = judged(found, expected)
            except Exception as error:
                row = failed(error)
        name = str(blocks) if blocks else IN_USE
        if row.get("verdict") == "ok":
            calls[name] = call(inputs, kernel, blocks)
        else:
            yield {"blocks": name} | row
        if not calls:
            return  # those in use are what all others are measured by
    in_turn(calls, task.device, 2)
    laps = in_turn(calls, task.device, rounds)
    for name in calls:
        seconds, now = ([sum(each.values()) for each in laps[own]] for own in (name, IN_USE))
        ratio = median_ratio(seconds, now)
        row = {"blocks": name, "ms": 1e3 * median(seconds).value, "ratio": ratio.value}
        yield row | {"error of the ratio": ratio.error, "verdict": "ok"}


def judged(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict:
    """Whether the outputs are those of the blocks in use, up to the rounding of sums in another order: 2 ε at most."""
    pairs = [(x.float(), y.float()) for x, y in zip(found, expected, strict=True) if y.numel()]
    worst = torch.stack([(x - y).norm() / y.norm() for x, y in pairs]).max().item()  # NaN where one is
    if worst <= 2 * torch.finfo(found[0].dtype).eps:
        return {"verdict": "ok"}
    return {"note": f"another result, relative error {worst:.1e}", "verdict": "WRONG"}


def call(inputs: Inputs, kernel: str, blocks: tuple | None) -> Callable:
    """For `in_turn`: the pass in which the kernel is, with these blocks."""

    def measured(laps) -> None:
        launched(inputs, kernel, blocks)
        laps.end(kernel)

    return measured


def launched(inputs: Inputs, kernel: str, blocks: tuple | None) -> tuple[Tensor, ...]:
    """The outputs of the pass in which the kernel is."""
    from kernels.triton_tiles import tile_backward, tile_forward

    tile, grad, q, k, v, kept, lse = inputs
    how = (q.size(-1) ** -0.5, tile, 1.0, 0.0)
    with with_blocks(kernel, blocks) if blocks else contextlib.nullcontext():
        if kernel == "forward":
            return tile_forward(q, k, v, *how)
        return tile_backward(grad, q, k, v, kept, lse, *how, "full")


@contextlib.contextmanager
def with_blocks(kernel: str, blocks: tuple):
    from kernels import triton, triton_tiles

    former, (own, step, warps, stages) = triton._block_sizes, blocks

    def chosen(q, name: str):
        return (own, step, {"num_warps": warps, "num_stages": stages}) if name == kernel else former(q, name)

    with mock.patch.object(triton, "_block_sizes", chosen), mock.patch.object(triton_tiles, "_block_sizes", chosen):
        yield


def present(rows: list[dict]) -> list[Table]:
    def cell(row: dict) -> str:
        if "note" in row:
            return f"{row['verdict']}: {row['note']}" if "verdict" in row else row["note"]
        return f"{row['ms']:.2f} ms, {with_error(row['ratio'], row['error of the ratio'], 2)}"

    named = [row | {"kernel": f"{row['tile']}, {row['kernel']}, T {row['T']:,}, D {row['D']}"} for row in rows]
    caption = "The pass with the kernel in it, by (own rows, rows of a step, warps, stages); ratio over the one in use"
    return [Table(caption, pivot(named, "kernel", "blocks", cell))]


SECTION = Section("Blocks of the Triton kernels", 2.5, run, present)
