"""The tiles in Triton against their definitions in float64: on a GPU if there is one, else in the interpreter."""

import math

import pytest
import torch

from kernels import normalizers
from tests.kernels.test_triton import DEVICE, TOLERANCE, check, inputs, interpreter  # noqa: F401

with pytest.MonkeyPatch.context() as _environment:
    if DEVICE == "cpu":
        _environment.setenv("TRITON_INTERPRET", "1")  # before the kernels are compiled
    from kernels.triton_tiles import tile_backward, tile_forward

# Of each tile a and b, the same by name, and what is in normalizers.py.
CASES = {
    "clipped": ("clipped", {"alpha": 4.0, "context": 80}),
    "clipped by row": ("clipped", {"alpha": 0.5, "context": 0}),
    "softpick": ("softpick", {}),
    "sigmoid": ("sigmoid", {"bias": -3.0}),
    "relu": ("relu", {}),
}
BACKWARDS = ("full", "diagonal", "detached", "ste")
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def found(q, k, v, g, scale, case: str, backward: str) -> dict[str, torch.Tensor]:
    tile, constants = CASES[case]
    a, b = (*map(float, constants.values()), 0.0, 0.0)[:2]
    out, lse, kept = tile_forward(q, k, v, scale, tile, a, b)
    if tile == "softpick":
        kept = out
    gradients = tile_backward(g, q, k, v, kept, lse, scale, tile, a, b, backward)
    return {"out": out} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def defined(q, k, v, g, scale, case: str, backward: str) -> tuple[dict, dict]:
    """What `found` should be, and by name the magnitudes before cancellation; all float64."""
    tile, constants = CASES[case]
    H_kv = k.size(1)
    q, k, v, g = (x.double().repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (q, k, v, g))
    hidden = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    scores = (scale * q @ k.mT).masked_fill(hidden, -math.inf).requires_grad_()
    weights = getattr(normalizers, f"{tile}_weights")(scores, **constants)
    dp = g @ v.mT
    (full,) = torch.autograd.grad(weights, scores, dp)
    full = full.masked_fill(hidden, 0)
    scores, P = scores.detach(), weights.detach().masked_fill(hidden, 0)
    name = tile if tile in ("clipped", "softpick") else None
    detached = getattr(normalizers, f"{name}_detached" if name else f"{tile}_slope")(scores, P, **constants)
    diagonal = getattr(normalizers, f"{name}_diagonal")(scores, P, **constants) if name else detached
    detached, diagonal = (x.masked_fill(hidden, 0) for x in (detached, diagonal))
    ds = {"full": full, "diagonal": diagonal * dp, "detached": detached * dp, "ste": dp.tril()}[backward]
    magnitude = (torch.ones_like(dp).tril() if backward == "ste" else detached) * dp.abs()
    if backward == "full" and name:  # what the row's statistic takes: of every key, also those that get nothing
        exp_x = detached
        if tile == "clipped":
            exp_x = normalizers.softmax_weights(scores)
        else:
            exp_x, terms, total = normalizers._softpick_terms(scores)
            exp_x = torch.where(terms == 0, 0, exp_x / total)
        moved = P if tile == "softpick" else detached
        magnitude = magnitude + exp_x * (g.abs() * (moved @ v).abs()).sum(-1, keepdim=True)
    values = {"out": P @ v, "dq": scale * ds @ k, "dk": scale * ds.mT @ q, "dv": P.mT @ g}
    sizes = {"dq": scale * magnitude @ k.abs(), "dk": scale * magnitude.mT @ q.abs(), "dv": P.mT @ g.abs()}
    sizes["out"] = P @ v.abs()
    for named in (values, sizes):
        named |= {name: named[name].unflatten(1, (H_kv, -1)).sum(2) for name in ("dk", "dv")}
    return values, sizes


@every_dtype
@every_case
@pytest.mark.parametrize(("H", "H_kv", "T", "D"), [(2, 1, 70, 20)])
def test_output_and_gradients_are_those_of_the_definition(H, H_kv, T, D, case, dtype):
    q, k, v, g = inputs(H, T, D, dtype, H_kv=H_kv)
    q = 2 * q
    for backward in BACKWARDS:
        own = found(q, k, v, g, D**-0.5, case, backward)
        check(own, *defined(q, k, v, g, D**-0.5, case, backward), 2 * TOLERANCE[dtype], dtype)


@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
@pytest.mark.parametrize("case", ["clipped", "softpick", "sigmoid"])
def test_scores_of_a_thousand_stay_finite(case, backward):
    q, k, v, g = inputs(1, 33, 16, torch.float32)
    largest = 1000.0
    own = found(40 * q, 40 * k, v, g, 0.25, case, backward)
    values, sizes = defined(40 * q, 40 * k, v, g, 0.25, case, backward)
    check(own, values, sizes, TOLERANCE[torch.float32] + 16 * largest * 2**-24, torch.float32)


def test_softpick_of_scores_near_0_in_float16():
    """Its slope is up to 1/ε there: dS is beyond float16, dQ and dK are not; and P is made of its smallest numbers."""
    q, k, v, g = inputs(1, 33, 16, torch.float16)
    q, k = q / 1024, k / 1024
    own = found(q, k, v, g, 0.25, "softpick", "full")
    check(own, *defined(q, k, v, g, 0.25, "softpick", "full"), 2 * TOLERANCE[torch.float16], torch.float16)


def test_operators_keep_what_pytorch_asks_of_them():
    q, k, v, g = inputs(2, 2, 16, torch.float32, H_kv=1)
    for tile in ("clipped", "relu"):
        torch.library.opcheck(tile_forward, (q, k, v, 0.25, tile, 4.0, 0.0))
        _, lse, kept = tile_forward(q, k, v, 0.25, tile, 4.0, 0.0)
        torch.library.opcheck(tile_backward, (g, q, k, v, kept, lse, 0.25, tile, 4.0, 0.0, "full"))
