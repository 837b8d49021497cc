"""Attention on a CPU by a kernel of our own, model_cpu.cpp, which the system's C++ compiler builds at first use.

PyTorch's fused kernels give `diagonal` in two backward passes and no STE at all (see FusedAttention in model.py); this
one does every variant in one, the null logit included, and bfloat16 at the speed of float32 where the processor only
emulates it. It is compiled for the processor it runs on, in some three seconds, into `__pycache__`; where there is no
compiler (Linux only, so far) `load` says so and attention runs on PyTorch's kernels.

The operators, in torch.ops.offbyone, take float32 or bfloat16 of (B, H, T, D), the last dimension contiguous, and sum
in float32. They are opaque to torch.compile, which so keeps one graph.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("model_cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fopenmp", "-shared", "-fPIC")
_MODES = ("full", "diagonal", "ste", "values")  # model_cpu.cpp's enum Backward
LINEAR_FROM = (
    256  # up to so many tokens STE's products with the masked matrix, tile by tile, cost less than running sums
)


class _Tensor(ctypes.Structure):
    """model_cpu.cpp's Tensor: the data and the strides of (B, H, T), in numbers."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


_t, _p, _i, _f, _b = _Tensor, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_bool
_SIGNATURES = {  # each ends with B, H, T, D, the scale, and the threads
    "attention_forward": (_b, _t, _t, _t, _p, _t, _p, _i, _i, _i, _i, _i, _f, _i),
    "attention_backward": (_b, _i, *[_t] * 5, _p, _t, ctypes.c_int64, _t, _t, _i, _i, _i, _i, _i, _f, _i),
    "linear_attention": (_b, _b, _t, _t, _t, _t, _i, _i, _i, _i, _f, _i),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built, with a warning if that is the compiler's failure."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if platform.system() != "Linux" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        warnings.warn(f"{SOURCE.name} cannot be used, attention runs on PyTorch's kernels: {reason}", stacklevel=2)
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, None
    return library


def build(compiler: str) -> Path:
    """The shared library of this source, this compiler and this processor, made if it is not there yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(), version, *FLAGS, processor())
    name = f"model_cpu-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    folder = SOURCE.parent / "__pycache__"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # a checkout that cannot be written to
        made = folder = Path(tempfile.mkdtemp())
    try:
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", made / name], capture_output=True, text=True, check=True)
        return (made / name).replace(folder / name)  # at once: other processes may be building the same
    finally:
        if made != folder:
            shutil.rmtree(made)


def processor() -> str:
    """What -march=native depends on: a library must not wander to a processor without its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kept)})])


# --- operators --------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments) -> None:
    """Tensors of four dimensions go by their strides, others as pointers; None is the null pointer."""
    getattr(load(), name)(*(_converted(x) if torch.is_tensor(x) else x for x in arguments))


def _converted(x: Tensor) -> _Tensor | int:
    return _Tensor(x.data_ptr(), *x.stride()[:3]) if x.dim() == 4 else x.data_ptr()


def _empty_result(q: Tensor) -> Tensor:
    """Like q (B, H, T, D), but (B, T, H, D) in memory: the order of a projection's output and input."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _parts(q: Tensor) -> int:
    """Into how many each head is divided, so that every thread has as many of them to do."""
    threads = torch.get_num_threads()
    return threads // math.gcd(q.size(0) * q.size(1), threads)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, null_logit: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and each row's logsumexp (B, H, T) in float32, the null logit (H,) of its head included."""
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the CPU's own kernel takes float32 and bfloat16, not {q.dtype}")
    out, lse = _empty_result(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    null_logit = None if null_logit is None else null_logit.float().contiguous()
    half, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    _call("attention_forward", half, q, k, v, null_logit, out, lse, _parts(q), *q.shape, scale, threads)
    return out, lse


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, backward: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from dL/dO, what the forward gave, and `backward`: full, diagonal or ste."""
    B, H, T, D = q.shape
    half, threads, parts = q.dtype == torch.bfloat16, torch.get_num_threads(), _parts(q)
    dq, dk, dv = (_empty_result(q) for _ in range(3))
    if backward == "ste" and T > LINEAR_FROM:
        inputs = (grad, q, k, v, out, lse, dq, 0, dk, dv)  # but dq and dk are left alone
        _call("attention_backward", half, _MODES.index("values"), *inputs, parts, B, H, T, D, scale, threads)
        _call("linear_attention", half, False, grad, v, k, dq, B, H, T, D, scale, threads)
        _call("linear_attention", half, True, v, grad, q, dk, B, H, T, D, scale, threads)
        return dq, dk, dv
    if parts > 1 or half:  # dQ is summed in float32
        sums = q.new_empty(parts, B, T, H, D, dtype=torch.float32)
        dq = sums[0].transpose(1, 2)
    inputs = (grad, q, k, v, out, lse, dq, sums.stride(0) if parts > 1 else 0, dk, dv)
    _call("attention_backward", half, _MODES.index(backward), *inputs, parts, B, H, T, D, scale, threads)
    return (sums.sum(0).transpose(1, 2) if parts > 1 else dq).to(q.dtype), dk, dv


# Not by torch.library.custom_op, whose wrapping costs 10 µs a call, a tenth of a short context's time.
_library = torch.library.Library("offbyone", "FRAGMENT")
_library.define("cpu_forward(Tensor q, Tensor k, Tensor v, Tensor? null_logit, float scale) -> (Tensor, Tensor)")
_library.define(
    "cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str backward)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("cpu_forward", cpu_forward, "CPU")
_library.impl("cpu_backward", cpu_backward, "CPU")


@torch.library.register_fake("offbyone::cpu_forward", lib=_library)
def _(q, k, v, null_logit, scale):
    return _empty_result(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("offbyone::cpu_backward", lib=_library)
def _(grad, q, k, v, out, lse, scale, backward):
    return tuple(_empty_result(q) for _ in range(3))
