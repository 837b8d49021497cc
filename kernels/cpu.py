"""Attention on a CPU by a kernel of our own, kernels/cpu.cpp, which the system's C++ compiler builds at first use.

PyTorch's fused kernels need two backward passes for `diagonal` and have no STE at all (see FusedAttention in fused.py).
This kernel computes every variant in one pass, the null logit included, what may stand in softmax's place (`TILES`),
and bfloat16 at the speed of float32 where the processor only emulates bfloat16. It is compiled for the processor it
runs on, in some three seconds, into `__pycache__`. Without a compiler, and so far on anything but Linux, attention runs
on PyTorch's kernels instead, and what these do not know in the readable form.

The operators, in torch.ops.offbyone, take float32 or bfloat16 of (B, H, T, D) and sum in float32. Keys and values may
have fewer heads, (B, H_kv, T, D), each for a group of H / H_kv heads of queries: they are read where they lie, and dK
and dV are summed over the group in the order of its heads. The last dimension has to be contiguous: FusedAttention sees
to that, they do not check it. torch.compile takes each of them for one opaque operator, so that its graph does not
break.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from kernels.normalizers import TILES

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fopenmp", "-shared", "-fPIC")
PATIENCE = (10, 120)  # seconds until a slow build is reported, and until it is given up
BACKWARDS = ("full", "diagonal", "ste", "values", "detached")  # kernels/cpu.cpp's enum Backward; values: dV alone

# There are two ways to STE's dQ and dK, which are products with the masked matrix tril(g Vᵀ): to compute that matrix
# tile by tile, in O(T²) time, or to keep running sums, in O(T) time. Where T exceeds this number, running sums are
# taken. Measured on 2 cores of Zen 4 with heads of 64, the whole backward takes
#     T (heads)       128 (96)   256 (48)   384 (16)   512 (24)
#     tile by tile    4.3        6.8        4.5        11.7 ms
#     running sums    6.1        7.6        3.7        9.9 ms
LINEAR_FROM = 256


class _Tensor(ctypes.Structure):
    """kernels/cpu.cpp's Tensor: the address of the data, and the strides of B, H and T, counted in elements."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


_tensor, _pointer, _stride, _flag, _count = _Tensor, ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool, ctypes.c_int
_number = ctypes.c_float
_kind = (_flag, _count, _number, _number)  # whether bfloat16; of TILES; its two constants
_shape = (*[_count] * 5, _number, _count)  # B, H, H_kv (or H_terms), T, D; the scale; the threads
_SIGNATURES = {
    "attention_forward": (*_kind, *[_tensor] * 3, _pointer, _tensor, _tensor, _pointer, _count, *_shape),
    "attention_backward": (
        *(*_kind, _count, *[_tensor] * 5, _pointer, _pointer, _tensor, _stride, _tensor, _tensor, _count),
        *_shape,
    ),
    "linear_attention": (_flag, _flag, *[_tensor] * 4, *_shape),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernel, or None. Warns if it fails to build or to load; having no `c++` is no failure."""
    if platform.system() != "Linux":
        return None
    words = os.environ.get("CXX", "").strip() or "c++"
    try:
        path = build(shlex.split(words))
        library = _opened(path, shlex.split(words)) if path else None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        message = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
        warnings.warn(
            f"no kernel from {SOURCE.name} by {words}: attention runs on PyTorch's, slower. Mend it, "
            f"set CXX to another compiler, or OFFBYONE_NATIVE=0 to do without. What was said:\n{message}",
            stacklevel=2,
        )
        return None
    for name, signature in _SIGNATURES.items() if library else ():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, None
    return library


def _opened(path: Path, compiler: list[str]) -> ctypes.CDLL | None:
    """The library at `path`, built anew if that cannot be loaded: another system may have built it."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    path.unlink()
    anew = build(compiler)
    try:
        return ctypes.CDLL(str(anew)) if anew else None
    except OSError:
        path.unlink(missing_ok=True)  # or the next process would try it again
        raise


def build(compiler: list[str]) -> Path | None:
    """The shared library of this source, this compiler and this processor, made if it is not there yet, whole.

    It lies in `__pycache__` beside the source, or in the user's cache where that cannot be written to. No compiler is
    needed once it is there. None where there is no `c++`. Raises OSError where another compiler is not found or neither
    folder can be written to, SubprocessError where the compiler fails or takes longer than PATIENCE.
    """
    parts = (SOURCE.read_bytes(), compiler, FLAGS, processor())
    name = f"{SOURCE.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = (SOURCE.parent / "__pycache__", Path(cache, "offbyone"))
    for folder in folders:
        if _is_whole(folder / name):
            return folder / name
    if shutil.which(compiler[0]) is None:
        if compiler == ["c++"]:
            return None
        raise FileNotFoundError(f"no such compiler: {compiler[0]}")
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.is_dir():
            break
    else:
        raise OSError(f"no folder to keep it in: neither {folders[0]} nor {folders[1]} can be written to")
    _remove_leftovers(folder)
    made = folder / f"{name}.{os.getpid()}.tmp"
    try:
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        with open(made, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())  # at the end, which the loader does not read
            with contextlib.suppress(OSError):  # not every file system can; what a crash cuts short is built again
                os.fsync(file.fileno())
        return made.replace(folder / name)  # atomic: other processes may build the same
    finally:
        with contextlib.suppress(OSError):
            made.unlink()


def _is_whole(path: Path) -> bool:
    """Whether the library is there, and ends with the hash of the rest. One that is cut short would not fail to load,
    but end the process by a SIGBUS."""
    try:
        content = path.read_bytes()
    except OSError:  # it is not there, or may not be read
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _run(command: list[str]) -> None:
    """Run the compiler, and say so if it takes long; CalledProcessError if it fails, TimeoutExpired if it hangs."""
    # With its children in a group of its own, so that all of them can be ended.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, limit = PATIENCE
        try:
            output, _ = process.communicate(timeout=said)
        except subprocess.TimeoutExpired:
            line = (
                f"{command[0]} is still building {SOURCE.name}: {limit - said:g} s more, and attention does without it"
            )
            print(line, file=sys.stderr, flush=True)
            output, _ = process.communicate(timeout=limit - said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=output)


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished libraries of processes that were killed."""
    for path in folder.glob(f"{SOURCE.stem}-*.so.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                path.unlink()


def processor() -> str:
    """What -march=native depends on. A library must not be loaded on a processor that lacks its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kept)})])


# --- operators --------------------------------------------------------------------------------------------------------


def _call(name: str, *arguments) -> None:
    """Call a function of the library. Tensors of four dimensions are passed with their strides, others as pointers, and
    None as the null pointer."""
    getattr(load(), name)(*(_converted(x) if torch.is_tensor(x) else x for x in arguments))


def _converted(x: Tensor) -> _Tensor | int:
    return _Tensor(x.data_ptr(), *x.stride()[:3]) if x.dim() == 4 else x.data_ptr()


def _empty_result(q: Tensor) -> Tensor:
    """Like q (B, H, T, D), but (B, T, H, D) in memory: the order of a projection's output and input."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def _parts(x: Tensor) -> int:
    """Into how many parts each head of x (queries forward, keys backward) is divided, so that all threads have the same
    amount of work.

    One part where there are enough heads, since parts cost memory: each thread copies a head's rows three times, and dQ
    is a sum over the parts.
    """
    heads, blocks, threads = x.size(0) * x.size(1), -(-x.size(2) // 64), torch.get_num_threads()
    return 1 if heads >= 4 * threads else min(blocks, threads // math.gcd(heads, threads))


def _sizes(x: Tensor, other: Tensor) -> tuple[int, ...]:
    """B, the heads of x and those of the other, T, D."""
    return *x.shape[:2], other.size(1), *x.shape[2:]


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, null_logit: Tensor | None, scale: float, tile: str = "softmax", a=0.0, b=0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; each row's statistic (B, H, T) in float32: of softmax the logsumexp, the null logit (H,) of its head
    included, of softpick `log(Σ |eˣ − 1| + ε)`; and what the backward needs in place of the output: of clipped softmax
    the output with the weights that softmax gives to the keys which are not clipped, of others nothing, (0,).

    `tile` is one of TILES; a and b are clipped's alpha and context (0: each row's number of keys), or sigmoid's bias.
    """
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the CPU's own kernel takes float32 and bfloat16, not {q.dtype}")
    out, lse = _empty_result(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    kept = _empty_result(q) if tile == "clipped" else q.new_empty(0)
    null_logit = None if null_logit is None else null_logit.float().contiguous()
    kind = (q.dtype == torch.bfloat16, TILES.index(tile), a, b)
    common = (_parts(q), *_sizes(q, k), scale, torch.get_num_threads())
    _call("attention_forward", *kind, q, k, v, null_logit, out, kept if kept.numel() else out, lse, *common)
    return out, lse, kept


def cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backward: str,
    tile: str = "softmax",
    a: float = 0.0,
    b: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, delta) from dL/dO, what the forward gave (for clipped softmax its third result in place of the
    output), and `backward`: full, diagonal, detached or ste.

    delta (B, H, T), float32, is each row's `Σ_j P_ij dP_ij = g_i·out_i`, which the null logit's gradient needs.
    """
    B, H, T, D = q.shape
    parts, rest = _parts(k), (scale, torch.get_num_threads())
    is_bfloat16, linear = q.dtype == torch.bfloat16, backward == "ste" and T > LINEAR_FROM
    kind = (is_bfloat16, TILES.index(tile), a, b)
    dk, dv, delta = _empty_result(k), _empty_result(v), torch.empty_like(lse)
    if linear:  # the first call computes dV and delta alone
        dq = _empty_result(q)
        inputs = (*kind, BACKWARDS.index("values"), grad, q, k, v, out, lse, delta)
        _call("attention_backward", *inputs, dq, 0, dk, dv, parts, *_sizes(q, k), *rest)
        _call("linear_attention", is_bfloat16, False, grad, v, k, dq, *_sizes(q, k), *rest)
        _call("linear_attention", is_bfloat16, True, v, grad, q, dk, *_sizes(k, q), *rest)
        return dq, dk, dv, delta
    dq = q.new_empty(parts, B, T, H, D, dtype=torch.float32)
    inputs = (*kind, BACKWARDS.index(backward), grad, q, k, v, out, lse, delta)
    _call("attention_backward", *inputs, dq[0].transpose(1, 2), dq.stride(0), dk, dv, parts, *_sizes(q, k), *rest)
    dq = (dq.sum(0) if parts > 1 else dq[0]).transpose(1, 2)
    return dq.to(q.dtype), dk, dv, delta


# torch.library.custom_op would be shorter, but its wrapping costs 10 µs a call, a tenth of a short context's time.
_library = torch.library.Library("offbyone", "FRAGMENT")
_TILE = "float scale, {}str tile='softmax', float a=0, float b=0"
_library.define(
    f"cpu_forward(Tensor q, Tensor k, Tensor v, Tensor? null_logit, {_TILE.format('')}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "cpu_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TILE.format('str backward, ')}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("cpu_forward", cpu_forward, "CPU")
_library.impl("cpu_backward", cpu_backward, "CPU")


@torch.library.register_fake("offbyone::cpu_forward", lib=_library)
def _(q, k, v, null_logit, scale, tile="softmax", a=0.0, b=0.0):
    kept = _empty_result(q) if tile == "clipped" else q.new_empty(0)
    return _empty_result(q), q.new_empty(q.shape[:-1], dtype=torch.float32), kept


@torch.library.register_fake("offbyone::cpu_backward", lib=_library)
def _(grad, q, k, v, out, lse, scale, backward, tile="softmax", a=0.0, b=0.0):
    return *(_empty_result(x) for x in (q, k, v)), torch.empty_like(lse)
