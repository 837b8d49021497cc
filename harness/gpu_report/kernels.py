"""(c) Attention alone, forward and backward: ours beside PyTorch's flash and cuDNN kernels and FlexAttention.

PyTorch's own way to softmax1 is FlexAttention with its output rescaled by σ(logsumexp). As in the FlashAttention papers
16,384 tokens are shared out among the sequences, and 2,048 channels among the heads. Each shape has a process of its
own, in which all compile at the same time; then one after another measures, its calls in turn.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from harness.bench_attention import FIRST, VARIANTS, learned, names
from harness.gpu_report import Section, Table, Task, pivot, with_error
from harness.timing import Laps, in_turn, median, median_ratio
from harness.workers import Worker, WorkerError
from kernels.backends import use_backend
from model import NORMALIZERS, Backward, attention

SHAPES = list(itertools.product((1024, 4096, 16384), (64, 128)))  # T, D
BASELINE = "PyTorch, flash"
TOKENS, CHANNELS = 16384, 2048
ROUNDS = 20


def run(task: Task) -> Iterator[dict]:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of the processes
    shapes = [(64, 16)] if task.cpu else SHAPES
    workers = {shape: Worker(Shape, *shape, task.cpu, task.seed) for shape in shapes}
    for worker in workers.values():
        worker.start("prepare")
    ready = {}
    for (T, D), worker in workers.items():  # all of them, before the first has its time taken
        try:
            ready[T, D] = worker.result()
        except WorkerError as error:
            yield lost(T, D, error)
    for (T, D), refused in ready.items():
        try:
            for row in workers[T, D].ask("measure", 3 if task.cpu else ROUNDS):
                yield {"T": T, "D": D} | row
        except WorkerError as error:
            yield lost(T, D, error)
        for name, reason in refused.items():
            yield {"T": T, "D": D, "attention": name, "note": reason}
    for worker in workers.values():
        worker.stop()


def lost(T: int, D: int, error: WorkerError) -> dict:
    """The row of a shape that failed, which the others go on without."""
    print(f"T {T}, D {D}: {error}\n{error.log}", flush=True)
    return {"T": T, "D": D, "attention": BASELINE, "note": str(error)[:200], "verdict": "FAILED"}


class Shape:
    """All calls of one shape."""

    def __init__(self, T: int, D: int, cpu: bool, seed: int):
        self.T, self.D, self.device = T, D, torch.device("cpu" if cpu else "cuda")
        self.B, self.H = (1, 2) if cpu else (TOKENS // T, CHANNELS // D)
        self.dtype = torch.float32 if cpu else torch.bfloat16
        torch.manual_seed(seed)
        qkv = torch.randn(self.B, T, 3 * self.H * D, device=self.device, dtype=self.dtype)
        q, k, v = (x.view(self.B, T, self.H, D).transpose(1, 2) for x in qkv.split(self.H * D, dim=-1))
        self.qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        self.grad = torch.randn(self.B, T, self.H, D, device=self.device, dtype=self.dtype).transpose(1, 2)
        self.learned = {normalizer: learned(normalizer, q, k) for normalizer in NORMALIZERS}
        self.calls = self._calls(cpu)

    def _calls(self, cpu: bool) -> dict[str, Callable]:
        def ours(normalizer: str, backward: Backward, backend: str | None = None):
            call = functools.partial(attention, normalizer=normalizer, backward=backward, **self.learned[normalizer])
            return within(lambda: use_backend(backend), call) if backend else call

        causal = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        # Without a card `flash` is what PyTorch has for a CPU, and there is no cuDNN.
        calls = {BASELINE: within(lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), causal)}
        if not cpu:
            calls["PyTorch, cuDNN"] = within(lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION), causal)
        calls["PyTorch, its own choice"] = causal
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, self.T, self.T, device=str(self.device))
        flex = functools.partial(flex_attention, block_mask=mask)

        def flex_softmax1(q, k, v):
            out, lse = flex(q, k, v, return_lse=True)
            return (out * torch.sigmoid(lse).unsqueeze(-1)).to(out.dtype)

        how = {"backend": "aot_eager"} if cpu else {"dynamic": False}
        if not cpu:  # on a CPU it has no backward
            calls["FlexAttention, softmax"] = torch.compile(flex, **how)
            calls["FlexAttention, softmax1"] = torch.compile(flex_softmax1, **how)
        # Without a tile it is materialized, in more memory than there is at the longer contexts.
        for name in (name for name in names(FIRST)[1:] if NORMALIZERS[VARIANTS[name][0]].tile):
            calls[name] = ours(*VARIANTS[name])
        for backward in get_args(Backward):
            call = torch.compile(functools.partial(attention, normalizer="softmax1", backward=backward), **how)
            calls[f"softmax1/{backward}, compiled"] = call
            if not cpu:
                calls[f"softmax1/{backward} on flash"] = ours("softmax1", backward, "cuda_flash")
        return calls

    def prepare(self) -> dict[str, str]:
        """Compile and warm up; what fails is left out, and its error returned by its name."""
        refused = {}
        for name in list(self.calls):
            try:
                for _ in range(2):
                    self.step(name, Laps(self.device))
                Laps(self.device).seconds()
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                del self.calls[name]
        return refused

    def step(self, name: str, laps: Laps) -> None:
        inputs = [*self.qkv, *self.learned.get(name.split("/")[0], {}).values()]
        out = self.calls[name](*self.qkv)
        laps.end("forward")
        torch.autograd.grad(out, inputs, self.grad)
        laps.end("backward")

    def measure(self, rounds: int) -> list[dict]:
        calls = {name: functools.partial(self.step, name) for name in self.calls}
        in_turn(calls, self.device, 2)
        laps = in_turn(calls, self.device, rounds)
        total = {name: [sum(each.values()) for each in own] for name, own in laps.items()}
        flops = 3.5 * 2 * self.B * self.H * self.T**2 * self.D  # two products there, five back, half of them masked
        rows = []
        for name, seconds in total.items():
            both, ratio = median(seconds), median_ratio(seconds, total[BASELINE])
            rows.append(
                {
                    "attention": name,
                    "forward, ms": 1e3 * median([each["forward"] for each in laps[name]]).value,
                    "forward + backward, ms": 1e3 * both.value,
                    "error, ms": 1e3 * both.error,
                    "ratio": ratio.value,
                    "error of the ratio": ratio.error,
                    "TFLOP/s": flops / both.value / 1e12,
                }
            )
        return rows


def within(context: Callable, call: Callable) -> Callable:
    def inside(*arguments):
        with context():
            return call(*arguments)

    return inside


def present(rows: list[dict]) -> list[Table]:
    def cell(row: dict) -> str:
        if "note" in row:
            return row["note"]
        return f"{row['forward + backward, ms']:.2f} ms, {with_error(row['ratio'], row['error of the ratio'], 2)}"

    return [
        Table(
            f"Forward and backward of {TOKENS:,} tokens, {CHANNELS:,} channels in heads of {D}, by context length T: "
            f"time, and ratio over {BASELINE} in the same round",
            pivot([row | {"T": f"T = {row['T']:,}"} for row in rows if row["D"] == D], "attention", "T", cell),
        )
        for D in dict.fromkeys(row["D"] for row in rows)
    ]


SECTION = Section("Attention alone, beside PyTorch's kernels and FlexAttention", 1.8, run, present)
