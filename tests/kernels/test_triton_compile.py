"""The Triton kernels are compiled for a GPU, without one: the interpreter takes more than the compiler does."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

from kernels.backends import TRITON
from tests.processes import CONTEXT, started


def compile_for_hopper(pipe, folder) -> None:
    """In a process without the interpreter: (name, wgmma, cp.async, min.NaN, bytes of shared memory) of each kernel."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    with open(folder / "errors", "w") as f:
        os.dup2(f.fileno(), 2)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from kernels.triton import row_products, score_backward, value_gradient
    from kernels.triton_tiles import tile_backward, tile_forward

    hopper, device, stream = lambda: GPUTarget("cuda", 90, 32), lambda: 0, lambda device: 0
    driver.set_active(SimpleNamespace(get_current_target=hopper, get_current_device=device, get_current_stream=stream))
    compiled = []
    triton.JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: compiled.append(self.warmup(*a, grid=grid, **k))
    x, lse = torch.zeros(1, 2, 100, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 100)
    for k in (x, x[:, :1]):  # a head of keys for each of queries, and one for two
        for slope in ("diagonal", "ste"):
            score_backward(x, x, k, k, lse, 0.125, slope)
        value_gradient(x, x, k, lse, 0.125)
    row_products(x, x)
    x = torch.zeros(1, 2, 100, 128, dtype=torch.bfloat16)  # the widest heads
    for tile in ("clipped", "softpick"):
        out, lse, _ = tile_forward(x, x, x, 0.125, tile, 4.0, 0.0)
        tile_backward(x, x, x, x, out, lse, 0.125, tile, 4.0, 0.0, "full")
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        found = (words in ptx for words in ("wgmma", "cp.async.cg.shared.global", "min.NaN.f32"))
        pipe.send((kernel.name, *found, kernel.metadata.shared))


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="Triton is not installed (requirements-dev.txt)")
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    """On Hopper, and within its shared memory: tensor cores, copies of 16 bytes, and NaNs kept wherever a weight is
    held at 1 (STE's dQ has no weights, and softpick's are none that rounding takes beyond 1)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which the server would keep, if it starts here
    here, there = CONTEXT.Pipe(duplex=False)
    process = started(compile_for_hopper, there, tmp_path)
    there.close()
    kernels = []
    with contextlib.suppress(EOFError):
        while True:
            *kernel, shared = here.recv()
            assert shared <= 227 * 1024, kernel
            kernels.append(tuple(kernel))
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    products = [("_row_products_kernel", False, False, False)]
    forward, keys, queries = ((f"_{name}_kernel", True, True, True) for name in ("forward", "keys", "queries"))
    ste_queries = (*queries[:3], False)
    softpick = [(*kernel[:3], False) for kernel in (forward, keys, queries)]
    expected = 2 * [keys, queries, keys, ste_queries, keys] + products
    for first, *rest in ((forward, keys, queries), softpick):
        expected += [first, *products, *rest]
    assert kernels == expected
