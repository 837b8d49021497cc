"""What the hardware offers: a device, the dtype it multiplies fastest in, and its peak rate."""

import ctypes
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from harness.errors import UserError


def choose_device(name: str) -> torch.device:
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N → the device. UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "mps", "cuda"):
        raise UserError(f"no device '{name}': choose auto, cpu, mps, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not there: PyTorch sees no Apple GPU")
    return device


def float64_on(device: torch.device) -> torch.dtype:
    """float64, where the device computes in it; UserError where it does not."""
    if device.type == "mps":
        raise UserError("--dtype float64: device 'mps' has no such numbers; give --device cpu")
    return torch.float64


def add_dtype(parser: ArgumentParser, *more: str) -> None:
    """--dtype float32 or float64, or one of `more`."""
    choices = ("float32", "float64", *more)
    what = "of the model's own numbers; default: float32. Sums are float64"
    parser.add_argument("--dtype", choices=choices, default="float32", help=what)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. auto: bfloat16 where the hardware multiplies in it, else float16 on CUDA, else
    float32 (a CPU that only emulates bfloat16 is several times slower in it)."""
    if name == "float16" and device.type == "cpu":
        raise UserError("training.dtype float16 needs a GPU: choose bfloat16 or float32 on a CPU")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has AVX512-BF16 or AMX, as Linux names them; other systems have no public way to tell."""
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_compile(setting: bool | str, device: torch.device, feedback: str = "backprop") -> bool:
    """Whether to compile. auto: on CUDA, where a C compiler is at hand for what Triton builds, and never under feedback
    dfa, whose error goes from layer to layer outside of the graph: UserError if it is to be compiled."""
    if setting == "auto":
        return device.type == "cuda" and shutil.which("cc") is not None and feedback != "dfa"
    if setting and feedback == "dfa":
        raise UserError("training.compile: feedback dfa cannot be compiled: leave it at auto, or give false")
    return bool(setting)


def make_deterministic() -> None:
    """Have PyTorch use deterministic algorithms alone, from here on: RuntimeError where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product runs
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # in no stub; no result needs it


def deterministic_cost(model: nn.Module, batch: tuple[Tensor, Tensor], autocast) -> str:
    """What deterministic algorithms cost here: the time of a forward and backward pass with them and without, by turns.
    They are in use afterwards, and there are gradients."""
    device = batch[0].device
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(4):
        for deterministic, times in seconds.items():
            torch.use_deterministic_algorithms(deterministic)
            start = now(device)
            with autocast:
                _, loss = model(*batch, with_logits=False)
            loss.backward()
            times.append(now(device) - start)
    torch.use_deterministic_algorithms(True)
    with_them, without = (statistics.median(times[1:]) for times in seconds.values())  # the first one warms up
    return (
        f"deterministic algorithms: a forward and backward pass of one sequence, not compiled, takes "
        f"{1e3 * with_them:.3g} ms, with any algorithm {1e3 * without:.3g} ms ({with_them / without:.2f} times as long)"
    )


def keep_freed_memory() -> None:
    """Have glibc keep what a training step frees for the next one. By default it hands large blocks back to the kernel,
    which clears every page of them again, step after step. Elsewhere than on glibc nothing happens."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):  # an older glibc takes no more than 32 MiB
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def processor_name() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


# Dense bfloat16 or float16 matrix products in FLOP/s, from the vendors' datasheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The FLOP/s that MFU is a share of and where the figure is from: a datasheet, or a matrix product timed here."""
    if device.type == "cuda" and dtype != torch.float32:
        card = torch.cuda.get_device_name(device)
        for name, flops in _PEAK_FLOPS.items():
            if name in card:
                return flops, f"the datasheet of {card}"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    seconds: list[float] = []
    while len(seconds) < 6 and sum(seconds) < 0.5:  # an emulated dtype takes seconds for each
        start = now(device)
        a @ a
        seconds.append(now(device) - start)
    return 2 * n**3 / min(seconds), f"a {n} × {n} product timed on this device"


def peak_memory(device: torch.device) -> int:
    """Bytes in use at the most, of the GPU's memory by this process (since `torch.cuda.reset_peak_memory_stats`) or of
    the process itself, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return perf_counter()


def commit() -> str:
    """The code's own, as git describes it, with what has changed since told by "-dirty"."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"
