"""Which kernel computes attention on given inputs, and why."""

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without importing the compiler: a second that few programs need."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def native() -> bool:
    """Whether the CPU kernel of kernels/cpu.py runs here. If so, its operators are registered in torch.ops.offbyone."""
    if os.environ.get("OFFBYONE_NATIVE") == "0":
        return False
    from kernels import cpu

    return cpu.load() is not None


@constant_when_compiled  # torch.compile cannot trace the query, and would break its graph here
def _is_ampere(device: torch.device) -> bool:
    """Whether the GPU is an Ampere or later: these have PyTorch's flash kernels and multiply bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@constant_when_compiled
def _flash_head_size(device: torch.device) -> int:
    """The largest head that PyTorch's flash kernels train on the GPU: 256 where a multiprocessor has the shared memory
    of a data centre's card (A100, H100, B200), 192 elsewhere."""
    return 256 if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0)) else 192


@constant_when_compiled
def _is_hopper(device: torch.device) -> bool:
    """Whether the GPU is a Hopper, on which cuDNN's attention takes 0.51 to 0.74 of the time of PyTorch's flash kernels
    (benchmarks/)."""
    hopper, version = torch.cuda.get_device_capability(device)[0] == 9, torch.backends.cudnn.version()
    return hopper and version is not None and version >= 90000  # older versions take no sequence below 64


def _has_flash(q: Tensor) -> bool:
    """Whether PyTorch's flash kernels train such q on its GPU."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and _is_ampere(q.device) and q.size(-1) <= _flash_head_size(q.device)


def reads_groups(backend: str, q: Tensor) -> bool:
    """Whether the backend reads keys and values with fewer heads than q as they are. PyTorch's efficient kernel does
    not; its own function ("stock") would not choose that one for them, and compute a T × T matrix instead."""
    if backend == "stock" and q.device.type != "cpu":
        return q.device.type == "cuda" and _has_flash(q)
    return backend != "cuda_efficient"


TRITON = importlib.util.find_spec("triton") is not None


def triton_allowed() -> bool:
    return TRITON and os.environ.get("OFFBYONE_TRITON") != "0"


def with_triton(backend: str) -> bool:
    """Whether kernels/triton.py completes this backend's backward. If so, its operators are registered in
    torch.ops.offbyone."""
    if backend not in ("cuda_flash", "cuda_cudnn") or not triton_allowed():
        return False
    from kernels import triton  # noqa: F401

    return True


def has_tiles(q: Tensor, dropout_p: float) -> bool:
    """Whether kernels/triton_tiles.py computes attention on such q. If so, its operators are registered in
    torch.ops.offbyone."""
    half = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and _is_ampere(q.device))
    return (half or q.dtype == torch.float32) and q.size(-1) <= 128 and not dropout_p and register_tiles()


def register_tiles() -> bool:
    if triton_allowed():
        from kernels import triton_tiles  # noqa: F401
    return triton_allowed()


def one_pass(backend: str, D: int, dropout_p: float) -> bool:
    """Whether kernels/triton.py computes the `diagonal` gradients, and dV for `ste`, in one pass over the scores, where
    PyTorch's kernels would take two or more."""
    return D <= 128 and not dropout_p and with_triton(backend)


# At most so many queries (one, when a key/value cache is in use) are materialized against a longer context: a matrix of
# SHORT × T_k scores is O(T_k) memory, as a fused kernel's is. One key more is no longer context, but a null slot's.
SHORT = 64


def attention_backend(
    q: Tensor, k: Tensor, dropout_p: float = 0.0, stock: bool = False, tile: str | None = "softmax"
) -> str:
    """The kernel that computes attention on such q and k: "cpu_native" (kernels/cpu.py), PyTorch's "cpu_flash",
    "cuda_flash" or "cuda_efficient", "cuda_cudnn" (on Hopper), or "materialized". In place of the two CUDA kernels in
    the middle it is "stock" for the variant that PyTorch itself offers (`stock`): PyTorch's own function, which chooses
    a kernel by itself. A `tile` that is no softmax has kernels of our own alone, "cpu_native" and "cuda_triton"
    (kernels/triton_tiles.py); what has none (None) is always materialized.
    """
    if _backend_in_use is not None:
        return _backend_in_use
    if tile is None or (q.size(-2) <= SHORT and k.size(-2) > q.size(-2) + 1):
        return "materialized"
    if tile != "softmax":
        if q.device.type == "cpu" and not dropout_p and q.dtype in (torch.float32, torch.bfloat16) and native():
            return "cpu_native"
        return "cuda_triton" if q.device.type == "cuda" and has_tiles(q, dropout_p) else "materialized"
    if q.device.type == "cpu" and dropout_p == 0:
        if q.dtype in (torch.float32, torch.bfloat16) and native():
            return "cpu_native"
        return "cpu_flash"  # `stock` would choose the same kernel, but has no second derivatives
    if q.device.type == "cuda":
        half = q.dtype in (torch.float16, torch.bfloat16)
        ampere = _is_ampere(q.device)
        if _has_flash(q):
            # Dropout stays with flash, since the Triton kernels that complete cuDNN's backward have none. And cuDNN
            # takes no sequence of one token. There PyTorch's own function would choose cuDNN too, and give a wrong
            # gradient where one process runs it both compiled and not: see kernel_backward in fused.py. Its backward is
            # not deterministic.
            cudnn = q.size(-1) <= 128 and not dropout_p and q.size(-2) > 1
            if _is_hopper(q.device) and cudnn and not torch.are_deterministic_algorithms_enabled():
                return "cuda_cudnn"
            return "stock" if stock else "cuda_flash"
        if q.dtype == torch.float32 or q.dtype == torch.float16 or (half and ampere):
            return "stock" if stock else "cuda_efficient"
        warnings.warn(f"no fused attention for {q.dtype} on {q.device}: O(T²) memory", stacklevel=3)
    return "stock" if stock else "materialized"


BACKENDS = (
    *("stock", "cpu_native", "cpu_flash", "cuda_flash", "cuda_efficient", "cuda_cudnn", "cuda_triton"),
    "materialized",
)
_backend_in_use: str | None = None


@contextlib.contextmanager
def use_backend(name: str):
    """Within this context `attention` takes the backend `name` (see `attention_backend`), whatever suits its inputs.

    ValueError for an unknown name; `attention` raises one too where "stock" or a CPU kernel cannot do what is asked.
    """
    global _backend_in_use
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose from {', '.join(BACKENDS)}")
    if name == "cpu_native" and not native():
        raise ValueError("the CPU's own kernel is not there: it needs Linux and a C++ compiler, see kernels/cpu.py")
    if name == "cuda_triton" and not register_tiles():
        raise ValueError("backend 'cuda_triton' needs the package triton, and OFFBYONE_TRITON not to be 0")
    former, _backend_in_use = _backend_in_use, name
    try:
        yield
    finally:
        _backend_in_use = former


def materialized_attention():
    """Within this context `attention` takes the readable form everywhere."""
    return use_backend("materialized")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(q, k, v, null_logit, dropout_p: float, scale: float | None, parameters: dict[str, Any]) -> None:
    """ValueError, naming what was given, where attention is not defined for these arguments."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but must be positive and finite (the kernels' masks need it)")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but must lie in [0, 1)")
    tensors = {"q": q, "k": k, "v": v} | {name: x for name, x in parameters.items() if torch.is_tensor(x)}
    tensors |= {} if isinstance(null_logit, int | float | None) else {"null_logit": null_logit}
    for name, x in tensors.items():
        if not (torch.is_tensor(x) and x.dtype in FLOATS):
            given = f"a tensor of {x.dtype}" if torch.is_tensor(x) else f"a {type(x).__name__}"
            raise ValueError(f"{name} is {given}, but must be a tensor of {', '.join(map(str, FLOATS))}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"{shapes}: need q (B, H, T_q, D) and k, v (B, H_kv, T_k, D)")
    if not q.size(-1) or (q.size(1) != k.size(1) and (not k.size(1) or q.size(1) % k.size(1))):
        raise ValueError(f"{shapes}: need D ≥ 1, and a number of query heads that the key heads divide")
    if q.size(-2) > k.size(-2):
        raise ValueError(f"{shapes}: more queries than keys, and the queries are the last of the keys' positions")
    if torch.is_tensor(null_logit) and null_logit.shape != (q.size(1),):
        raise ValueError(f"null_logit {tuple(null_logit.shape)}: need one logit a head, ({q.size(1)},)")
    for name, wanted in {
        "null_key": (k.size(1), k.size(-1)),
        "null_value": (k.size(1), k.size(-1)),
        "ssmax_scale": (q.size(1),),
    }.items():
        if name in parameters and (shape := parameters[name].shape) != wanted:
            raise ValueError(f"{name} {tuple(shape)}: need one for each head{' of keys' * (len(wanted) > 1)}, {wanted}")


def check_parameters(entry, normalizer: str, null_logit, parameters: dict[str, Any]) -> None:
    """ValueError where a normalizer, an entry of `model.NORMALIZERS` and its name, is not given just what it takes."""
    wanted, free = set(entry.parameters) - {entry.null_logit}, set(entry.constants) - {entry.null_logit}
    if not wanted <= set(parameters) <= wanted | free:
        what = f"takes the parameters {', '.join(sorted(wanted | free))}" if wanted | free else "takes no parameters"
        raise ValueError(f"normalizer {normalizer!r} {what}, and not {', '.join(sorted(parameters)) or 'none'}")
    for name, value in parameters.items():
        kind, right = ("number", isinstance(value, int | float)) if name in free else ("tensor", torch.is_tensor(value))
        if not right:
            raise ValueError(f"{name} is a {type(value).__name__}, but must be a {kind}")
    if null_logit is not None and (not entry.is_softmax or entry.queries):
        raise ValueError(f"normalizer {normalizer!r} has no null slot, so a null_logit does not go with it")
    if null_logit is not None and "null_key" in parameters:
        raise ValueError(f"normalizer {normalizer!r} has a null slot with a key, so a null_logit does not go with it")
    if null_logit is not None and isinstance(entry.null_logit, int | float):
        raise ValueError(f"{normalizer} is the null logit {entry.null_logit:g}: a null_logit goes with sink or softmax")
    if null_logit is None and entry.null_logit in entry.parameters:
        raise ValueError(f"normalizer {normalizer!r} needs its null_logit, one learned logit a head")
