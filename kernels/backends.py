"""Which kernel computes attention on given inputs, and why."""

import contextlib
import importlib.util
import os
import warnings

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def native() -> bool:
    """Can the CPU's kernel be had, kernels/cpu.py's? Then its operators are there, in torch.ops.offbyone."""
    if os.environ.get("OFFBYONE_NATIVE") == "0":
        return False
    from kernels import cpu

    return cpu.load() is not None


@torch.compiler.assume_constant_result  # else torch.compile breaks its graph here: the capability is no tensor
def _is_ampere(device: torch.device) -> bool:
    """Ampere or later, which have the flash kernels and multiply bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    """Hopper, where cuDNN's attention takes 0.53 to 0.74 of the time of PyTorch's flash kernels (benchmarks/)."""
    hopper, version = torch.cuda.get_device_capability(device)[0] == 9, torch.backends.cudnn.version()
    return hopper and version is not None and version >= 90000  # an older one has no sequences below 64


TRITON = importlib.util.find_spec("triton") is not None


def one_pass(backend, D: int, dropout_p: float) -> bool:
    """Is `diagonal`, and STE's dV, for kernels/triton.py? Then its operators are there, in torch.ops.offbyone."""
    fused = backend in ("cuda_flash", "cuda_cudnn")
    if not fused or D > 128 or dropout_p or not TRITON or os.environ.get("OFFBYONE_TRITON") == "0":
        return False
    from kernels import triton  # noqa: F401

    return True


SHORT = 64  # so few queries, a cache's say, attend through a (SHORT, T_k) matrix: it is O(T_k) as well


def attention_backend(q: Tensor, k: Tensor, dropout_p: float = 0.0, stock: bool = False, fused: bool = True) -> str:
    """What computes attention on these: "cpu_native" (kernels/cpu.py), PyTorch's "cpu_flash", "cuda_flash" or
    "cuda_efficient", "cuda_cudnn" (on Hopper), "materialized", or, for the variant that PyTorch itself offers
    (`stock`), "stock": its own function, which chooses a kernel by itself. A normalizer without a fused form (`fused`
    False) is materialized.
    """
    if _backend_in_use is not None:
        return _backend_in_use
    if not fused or (q.size(-2) != k.size(-2) and q.size(-2) <= SHORT):
        return "materialized"
    if q.device.type == "cpu" and dropout_p == 0:
        if q.dtype in (torch.float32, torch.bfloat16) and native():
            return "cpu_native"
        return "stock" if stock else "cpu_flash"
    if q.device.type == "cuda":
        half = q.dtype in (torch.float16, torch.bfloat16)
        ampere = _is_ampere(q.device)
        if half and ampere and q.size(-1) <= 256:
            if stock:
                return "stock"
            # cuDNN has no dropout that the Triton kernels know, and no sequence of one token.
            cudnn = _is_hopper(q.device) and q.size(-1) <= 128 and not dropout_p and q.size(-2) > 1
            return "cuda_cudnn" if cudnn else "cuda_flash"
        if q.dtype == torch.float32 or q.dtype == torch.float16 or (half and ampere):
            return "stock" if stock else "cuda_efficient"
        warnings.warn(f"no fused attention for {q.dtype} on {q.device}: O(T²) memory", stacklevel=3)
    return "stock" if stock else "materialized"


BACKENDS = ("stock", "cpu_native", "cpu_flash", "cuda_flash", "cuda_efficient", "cuda_cudnn", "materialized")
_backend_in_use: str | None = None


@contextlib.contextmanager
def use_backend(name: str):
    """Within this context `attention` takes the backend `name` (see `attention_backend`), whatever suits its inputs.

    ValueError for an unknown one, and from `attention` where "stock" or a CPU's kernel cannot do what is asked.
    """
    global _backend_in_use
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose from {', '.join(BACKENDS)}")
    if name == "cpu_native" and not native():
        raise ValueError("the CPU's own kernel is not there: it needs Linux and a C++ compiler, see kernels/cpu.py")
    former, _backend_in_use = _backend_in_use, name
    try:
        yield
    finally:
        _backend_in_use = former
