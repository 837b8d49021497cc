"""(b) Every variant of attention, on every backend and dtype that has it, against the readable form in float64.

The error of a tensor is ‖x − x₆₄‖ / ‖x₆₄‖, of the output and every gradient, on inputs that were never used before.
What is allowed: half types round P or dS, the output and the result, by half an ε each, and 2 ε covers them; in float32
a score is a sum of D products, whose error the exponential passes on: 4 √D ε.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from torch import Tensor

from harness.bench_attention import FIRST, VARIANTS, learned, names
from harness.corpus_writing import cpu_count
from harness.gpu_report import Section, Table, Task, pivot
from kernels import fused
from kernels.backends import materialized_attention, use_backend
from model import NORMALIZERS, attention, attention_rows

FLOAT32, HALF = ("float32",), ("float16", "bfloat16")
BACKENDS = {  # on CUDA; the dtypes it takes
    "cuda_flash": HALF,
    "cuda_flash, compiled": ("bfloat16",),
    "cuda_flash without Triton": HALF,
    "cuda_efficient": HALF + FLOAT32,
    "cuda_cudnn": HALF,
    "cuda_cudnn, compiled": ("bfloat16",),
    "cuda_cudnn without Triton": HALF,
    "cuda_triton": HALF + FLOAT32,
    "cuda_triton, compiled": ("bfloat16",),
    "materialized": HALF + FLOAT32,
    "stock": HALF + FLOAT32,
    "stock, compiled": ("bfloat16",),
}
CPU_BACKENDS = {  # the dry run's: Triton's kernels in its interpreter, beside the CPU's flash kernel
    "cuda_flash": ("float16",),
    "cuda_flash, compiled": ("float16",),
    "cuda_triton": ("float16", "float32"),
    "cpu_flash": ("bfloat16", "float32"),
    "materialized": ("bfloat16", "float32"),
    "stock": ("float32",),
}


class Shape(NamedTuple):
    T_q: int
    T_k: int
    D: int
    group: int = 1
    """heads of queries that read one of keys"""


MAIN = [Shape(1024, 1024, 64)]
OTHERS = [
    Shape(1, 1, 64),
    Shape(63, 63, 64),
    Shape(129, 129, 80),
    Shape(129, 129, 20),
    Shape(1000, 1000, 128),
    Shape(1000, 1000, 64, group=4),
    Shape(65, 200, 64),
    Shape(65, 200, 128, group=2),
    Shape(2048, 2048, 32),
    Shape(513, 513, 256),
]
AT_ONCE = 16  # processes, of which each keeps half a GiB of the card for itself
OTHER_DTYPES = ("bfloat16", "float32")
"""those of the other shapes"""
SMALL_MAIN, SMALL_OTHERS = [Shape(17, 17, 16)], [Shape(1, 1, 16), Shape(9, 20, 24, group=2)]


def run(task: Task, shapes: list[Shape], dtypes: tuple[str, ...]) -> Iterator[dict]:
    """A job for each normalizer, shape and dtype, whose rows come as soon as it is done."""
    main, jobs = len(shapes) == 1, list(itertools.product(NORMALIZERS, shapes, dtypes))
    with executor(task.cpu) as pool:
        seeds = itertools.count(task.seed)  # a job's own, whoever takes it and when
        checks = {pool.submit(check, task.cpu, next(seeds), *job, main): job for job in jobs}
        for checked in as_completed(checks):
            normalizer, shape, dtype = checks[checked]
            try:
                yield from checked.result()
            except Exception as error:  # the pool's too, where a process of it has died
                row = shape._asdict() | {"variant": f"{normalizer}/all", "backend": "all", "dtype": dtype}
                yield row | {"error": None, "verdict": "FAILED", "note": f"{type(error).__name__}: {error}"[:200]}


def executor(cpu: bool) -> Executor:
    """As many processes as there are processors, since most of the time goes to compiling; for the dry run one."""
    return ProcessPoolExecutor(1 if cpu else min(AT_ONCE, cpu_count()), multiprocessing.get_context("spawn"))


def check(cpu: bool, seed: int, normalizer: str, shape: Shape, dtype: str, main: bool) -> list[dict]:
    """Every backward pass of a normalizer on every backend that takes the dtype; of the main shape also compiled."""
    generator, rows = torch.Generator().manual_seed(seed), []
    device = torch.device("cpu" if cpu else "cuda")
    for backward in (backward for name, backward in VARIANTS.values() if name == normalizer):
        known = normalizer == "softmax_n" or (backward == "detached" and normalizer != "softmax")
        if main and not cpu and known and dtype in OTHER_DTYPES:
            continue  # softmax1's code, and a part of the other passes': left to the other shapes
        inputs = draw(shape, getattr(torch, dtype), generator, device, normalizer)
        with materialized_attention():
            reference = values([x.double() for x in inputs], normalizer, backward)
        for backend in (name for name, taken in (CPU_BACKENDS if cpu else BACKENDS).items() if dtype in taken):
            if backend.startswith("stock") and (normalizer, backward) != ("softmax", "full"):
                continue  # PyTorch has no other
            if backend != "materialized" and not _takes(backend, normalizer, shape.D):
                continue
            if "compiled" in backend and not (main and f"{normalizer}/{backward}" in names(FIRST)):
                continue  # most of the time goes there
            if "cudnn" in backend and (shape.D > 128 or shape.T_k == 1):
                continue
            row = shape._asdict() | {"variant": f"{normalizer}/{backward}", "backend": backend}
            rows.append(row | {"dtype": dtype} | compare(cpu, inputs, reference, backend, normalizer, backward))
    if not cpu:
        torch.cuda.empty_cache()  # what a large shape took, another process may need
    return rows


def _takes(backend: str, normalizer: str, D: int) -> bool:
    """Whether a kernel has the normalizer: those of softmax any softmax, Triton's what else has a tile."""
    if "cuda_triton" in backend:
        return NORMALIZERS[normalizer].tile not in (None, "softmax") and D <= 128
    return NORMALIZERS[normalizer].tile == "softmax"


def draw(shape: Shape, dtype, generator, device, normalizer: str) -> list[Tensor]:
    """q, k, v as views of one projection where T_q = T_k, dL/dO, and what the normalizer learns."""
    T_q, T_k, D, group = shape
    B, H = 2 if T_k > 1 else 8, 4  # of a single score one or another is near 0, where it has lost its digits
    widths = [heads * D for heads in (H, H // group, H // group)]
    qkv = torch.randn(B, T_k, sum(widths), generator=generator).to(device, dtype)
    q, k, v = (x.view(B, T_k, -1, D).transpose(1, 2) for x in qkv.split(widths, dim=-1))
    grad = torch.randn(B, T_q, H, D, generator=generator).to(device, dtype).transpose(1, 2)
    # In float32, as a model has them, but in the dtype's own numbers, to which a null key is rounded beside the others.
    own = []
    for start in learned(normalizer, q, k).values():
        noise = torch.randn(start.shape, generator=generator).to(device)
        own.append(torch.where(start == 0, noise, start * (1 + noise / 8)).detach().to(dtype).float())
    return [q[:, :, T_k - T_q :], k, v, grad, *own]


def values(inputs: list[Tensor], normalizer: str, backward: str, function=attention) -> dict[str, Tensor]:
    """The output, and the gradients of q, k, v and of what the normalizer learns."""
    q, k, v, grad, *own = (x.detach() for x in inputs)
    names = learned(normalizer, q, k)
    wanted = {"dQ": q, "dK": k, "dV": v} | {f"d{name}": x for name, x in zip(names, own, strict=True)}
    for x in wanted.values():
        x.requires_grad_()
    out = function(q, k, v, normalizer=normalizer, backward=backward, **dict(zip(names, own, strict=True)))
    return {"out": out} | dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))


def compare(cpu: bool, inputs, reference: dict[str, Tensor], backend: str, normalizer: str, backward: str) -> dict:
    """The worst error of a backend's output and gradients against the materialised form's in float64."""
    function, dtype, D = attention, inputs[0].dtype, inputs[0].size(-1)
    if "compiled" in backend:
        torch.compiler.reset()
        # As far as autograd's graph; what Inductor makes of it shows in the steps.
        function = torch.compile(attention, fullgraph=True, backend="aot_eager")
    try:
        with backend_of(backend, cpu):
            found = values(inputs, normalizer, backward, function)
    except Exception as error:
        return {"error": None, "verdict": "FAILED", "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    norms = {name: x.norm() for name, x in reference.items()} | before_cancelling(
        inputs, reference, normalizer, backward
    )
    errors = {name: (x.double() - reference[name]).norm().item() for name, x in found.items()}
    # What is 0, as what kbias's key learns from a value of zeros by all but the full backward, has to be 0.
    errors = {name: error / norms[name].item() if norms[name] else error for name, error in errors.items()}
    if inputs[1].size(2) == 1:
        # Of one key: 1 − P may be near 0, and then the scores' gradient has lost its digits, as in every form. Where it
        # is 0, as under softmax, it must be.
        errors = {
            name: error
            for name, error in errors.items()
            if name in ("out", "dV") or (name in ("dQ", "dK") and not reference[name].any())
        }
    eps = torch.finfo(dtype).eps
    allowed = 4 * D**0.5 * eps if dtype == torch.float32 else 2 * eps
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    good = all(error <= allowed for error in errors.values())
    largest = errors[worst] if math.isfinite(errors[worst]) else None
    return {"error": largest, "of": worst, "allowed": allowed, "verdict": "ok" if good else "WRONG"}


def before_cancelling(inputs, reference: dict[str, Tensor], normalizer: str, backward: str) -> dict[str, Tensor]:
    """Of gradients that are sums of terms which cancel, the norm of the terms' absolute values: what rounding is
    relative to."""
    if "dnull_logit" in reference:
        return {"dnull_logit": terms_of_dsink(inputs, normalizer).norm()}
    if "dssmax_scale" in reference:  # Σ q·dQ over the queries, over the scale
        terms = (inputs[0].double() * reference["dQ"]).abs().sum((0, 2, 3)) / inputs[-1].double().abs()
        return {"dssmax_scale": terms.norm()}
    # E (g − Σ P g) or E (1 − P) g, where softpick's E is large if all scores are near 0; of one key g is Σ P g
    if backward in ("full", "diagonal") and (normalizer == "softpick" or inputs[1].size(2) == 1):
        with materialized_attention():
            terms = values([x.double() for x in inputs], normalizer, "detached")
        return {name: terms[name].norm() + (reference[name] - terms[name]).norm() for name in ("dQ", "dK")}
    return {}


def terms_of_dsink(inputs: list[Tensor], normalizer: str) -> Tensor:
    """Σ P_null |g·out| of each head (H,), in float64: what the gradient of its sink is a sum of."""
    q, k, v, grad, sink = (x.double() for x in inputs)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    P, null = attention_rows(q, k, normalizer=normalizer, null_logit=sink)
    assert null is not None  # a normalizer that learns its null logit has such a slot
    return (null.squeeze(-1) * (grad * (P @ v)).sum(-1).abs()).sum((0, 2))


@contextlib.contextmanager
def backend_of(name: str, cpu: bool):
    """`attention` on that backend; in the dry run the CPU's flash kernel stands in for CUDA's."""
    triton, kernels = os.environ.pop("OFFBYONE_TRITON", None), (fused.kernel_forward, fused.kernel_backward)
    try:
        if "without Triton" in name:
            os.environ["OFFBYONE_TRITON"] = "0"
        if cpu and name.startswith("cuda"):
            forward, backward = kernels
            fused.kernel_forward = lambda backend, *arguments: forward("cpu_flash", *arguments)
            fused.kernel_backward = lambda backend, *arguments: backward("cpu_flash", *arguments)
        with use_backend(name.split(",")[0].split()[0]):
            yield
    finally:
        fused.kernel_forward, fused.kernel_backward = kernels
        os.environ.pop("OFFBYONE_TRITON", None)
        if triton is not None:
            os.environ["OFFBYONE_TRITON"] = triton


def present(rows: list[dict]) -> list[Table]:
    kinds: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        kinds.setdefault((row["backend"], row["dtype"], row["variant"].split("/")[1]), []).append(row)
    cells = []
    for (backend, dtype, backward), own in sorted(kinds.items()):
        errors = [row["error"] for row in own if row["error"] is not None]
        bad = [row for row in own if row["verdict"] != "ok"]
        shown = f"{max(errors):.1e}" if errors else "–"
        shown += f", {len(bad)} of {len(own)} {bad[0]['verdict']}" if bad else ""
        cells.append({"backend, dtype": f"{backend}, {dtype}", "backward": backward, "shown": shown})
    tables = [
        Table(
            "The largest relative error against float64 of the output and of all gradients, over the normalizers and "
            f"{len({tuple(row[name] for name in Shape._fields) for row in rows})} shapes, {len(rows)} checks in all",
            pivot(cells, "backend, dtype", "backward", lambda row: row["shown"]),
        )
    ]
    bad = [row for row in rows if row["verdict"] != "ok"]
    return tables + ([Table("Not as they should be", bad)] if bad else [])


def main_shape(task: Task) -> Iterator[dict]:
    return run(task, SMALL_MAIN if task.cpu else MAIN, HALF + FLOAT32)


def other_shapes(task: Task) -> Iterator[dict]:
    return run(task, SMALL_OTHERS if task.cpu else OTHERS, OTHER_DTYPES)


SECTION = Section("Attention against float64, T = 1,024", 1.2, main_shape, present)
OTHER_SHAPES = Section("Attention against float64, other shapes", 1.5, other_shapes, present)
