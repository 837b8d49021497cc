"""Attention with weights that are no softmax, on NVIDIA GPUs: clipped, softpick, sigmoid and relu, in O(T) memory.

Causal, forward and every backward, as in FlashAttention-2 (Dao 2023). The definitions are those of normalizers.py; the
kernels of the backward are triton.py's. A row has at most one statistic, `lse`:

    clipped    log Σ eˣ             by a first loop over the keys, as all of it is needed to tell which weights are 0
    softpick   log(Σ |eˣ − 1| + ε)  in one loop with the output, as a softmax's logsumexp
    sigmoid, relu                   none

How a row's weights move together, of the backward "full", takes one number more: `rowsum(g∘kept)`, where `kept` is the
output for softpick, and for clipped the values weighted by ∂P_ij/∂S_ij with the sum held constant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.normalizers import SOFTPICK_EPSILON
from kernels.triton import (
    _arguments,
    _backward,
    _block_sizes,
    _empty_gradients,
    _grid,
    _load_rows,
    _one_minus_exp,
    _store_rows,
    _visible,
    _weights,
    row_products,
)

EPSILON = tl.constexpr(SOFTPICK_EPSILON)
LIFT = tl.constexpr(2.0**14)  # softpick's terms, at most 1, times this are far from float16's smallest numbers


@triton.jit
def _logsumexp(
    q_block, k, k_strides, batch, key_head, first, scale, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Of the scores of a block of queries: (QUERIES,)."""
    queries = first + tl.arange(0, QUERIES)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.full((QUERIES,), 0.0, tl.float32)
    for diagonal in tl.static_range(2):
        start = first if diagonal else 0
        end = tl.minimum(first + QUERIES, T) if diagonal else first
        for key in range(start, end, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_block = _load_rows(k, k_strides, batch, key_head, keys, T, D, BLOCK_D)
            x = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale
            if diagonal:
                x = tl.where(queries[:, None] >= keys[None, :], x, float("-inf"))
            former = largest
            largest = tl.maximum(former, tl.max(x, 1))
            total = total * tl.exp(former - largest) + tl.sum(tl.exp(x - largest[:, None]), 1)
    return largest + tl.log(total)


@triton.jit
def _forward_kernel(
    q, k, v, out, kept, lse, q_strides, k_strides, v_strides, out_strides, kept_strides, lse_strides,
    scale, a, b, T, GROUP: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The output of a block of queries, its rows' statistic and, of clipped, `kept`. Matrices are (queries, keys)."""
    # The last queries see the most keys: they start first, so that no long block is left over at the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    queries = first + tl.arange(0, QUERIES)
    q_block = _load_rows(q, q_strides, batch, head, queries, T, D, BLOCK_D)
    out_block = tl.full((QUERIES, BLOCK_D), 0.0, tl.float32)
    kept_block = tl.full((QUERIES, BLOCK_D), 0.0, tl.float32)
    # softpick's running sums: the largest score, or 0, and Σ |eˣ − 1| times e to minus that
    largest = tl.full((QUERIES,), 0.0, tl.float32)
    total = tl.full((QUERIES,), 0.0, tl.float32)
    lse_block = total
    if TILE == "clipped":
        lse_block = _logsumexp(
            q_block, k, k_strides, batch, key_head, first, scale, T, D, BLOCK_D, KEYS, QUERIES
        )  # fmt: skip

    for diagonal in tl.static_range(2):  # first the keys that all of these queries see, then those along the diagonal
        start = first if diagonal else 0
        end = tl.minimum(first + QUERIES, T) if diagonal else first
        for key in range(start, end, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_block = _load_rows(k, k_strides, batch, key_head, keys, T, D, BLOCK_D)
            v_block = _load_rows(v, v_strides, batch, key_head, keys, T, D, BLOCK_D)
            products = tl.dot(q_block, tl.trans(k_block), input_precision="ieee")
            if TILE == "softpick":
                x = _visible(products * scale, queries[:, None], keys[None, :], diagonal)  # a score of 0 adds nothing
                former, nearer = largest, -tl.abs(x)
                largest = tl.maximum(former, tl.max(x, 1))
                terms = tl.exp(tl.maximum(x, 0.0) - largest[:, None])
                terms *= _one_minus_exp(nearer, tl.exp(nearer), FLOAT32)
                shrink = tl.exp(former - largest)
                total = total * shrink + tl.sum(terms, 1)
                out_block *= shrink[:, None]
                p = LIFT * tl.where(x <= 0, 0.0, terms)
            else:
                p, slope, _, _ = _weights(
                    products, lse_block[:, None], queries[:, None], keys[None, :], scale, a, b, TILE, diagonal, FLOAT32
                )
                if TILE == "clipped":
                    kept_block = tl.dot(slope.to(v_block.dtype), v_block, kept_block, input_precision="ieee")
            out_block = tl.dot(p.to(v_block.dtype), v_block, out_block, input_precision="ieee")

    if TILE == "softpick":
        total += EPSILON * tl.exp(-largest)
        out_block /= LIFT * total[:, None]
        lse_block = largest + tl.log(total)
    if lse is not None:
        place = lse + batch * lse_strides[0] + head * lse_strides[1] + queries * lse_strides[2]
        tl.store(place, lse_block, mask=queries < T)
    if kept is not None:
        _store_rows(kept, kept_strides, batch, head, queries, T, D, BLOCK_D, kept_block)
    _store_rows(out, out_strides, batch, head, queries, T, D, BLOCK_D, out_block)


# --- operators ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("offbyone::tile_forward", mutates_args=())
def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: str, a: float, b: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, kept) of causal attention by a tile of normalizers.py that is no softmax. a and b are its constants:
    alpha and the context of "clipped" (0 for each row's number of keys), the bias of "sigmoid"; else 0.

    q (B, H, T, D), D up to 128, k and v (B, H_kv, T, D), where H_kv divides H; of one dtype, float16, bfloat16 or
    float32 (products without TF32), any strides. out lies in memory as (B, T, H, D). lse (B, H, T), float32, is the
    row's statistic; (B, H, 0) where there is none. kept, like out, is empty unless the tile is "clipped".
    """
    out, lse, kept = _outputs(q, tile)
    own = {"out": out, "kept": kept if kept.numel() else None, "lse": lse if lse.numel() else None}
    shared = _arguments(q, k, v, None, None, scale)
    arguments = {name: shared[name] for name in ("q", "k", "v", "scale", "T", "GROUP", "D", "BLOCK_D")} | own
    strides = {f"{name}_strides": None if x is None else x.stride() for name, x in own.items()}
    strides |= {f"{name}_strides": shared[f"{name}_strides"] for name in "qkv"}
    wide, narrow, options = _block_sizes(q, "forward")
    with torch.cuda.device_of(q):
        _forward_kernel[_grid(q, wide)](
            **arguments, **strides, a=a, b=b, TILE=tile, KEYS=narrow, QUERIES=wide, **options
        )
    return out, lse, kept


@torch.library.custom_op("offbyone::tile_backward", mutates_args=())
def tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, lse: Tensor,
    scale: float, tile: str, a: float, b: float, backward: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV), laid out as `out`, by one of the backward passes "full", "diagonal", "detached" and "ste".

    grad (dL/dO) like q; lse and kept are those of `tile_forward`, but for "softpick" kept is its `out` (an operator may
    not return a tensor twice). Only "full" reads kept.
    """
    rows = tile in ("clipped", "softpick")
    # Where no weight depends on another score, the derivative is its own diagonal.
    slope = backward if rows or backward == "ste" else "detached"
    arguments = _arguments(q, k, v, grad, lse if rows else None, scale)
    if slope == "full":
        delta = row_products(grad, kept)
        arguments |= {"delta": delta, "delta_strides": delta.stride()}
    # softpick's slope is up to 1/ε, and dP has no bound either.
    wide = q.dtype == torch.float16 and (tile == "softpick" or backward == "ste")
    return _backward(arguments | {"a": a, "b": b, "TILE": tile, "SLOPE": slope, "WIDE": wide})


@tile_forward.register_fake
def _(q, k, v, scale, tile, a, b):
    return _outputs(q, tile)


@tile_backward.register_fake
def _(grad, q, k, v, kept, lse, scale, tile, a, b, backward):
    return _empty_gradients(q, k, v)


def _outputs(q: Tensor, tile: str) -> tuple[Tensor, Tensor, Tensor]:
    (out,) = _empty_gradients(q)
    lse = q.new_empty(*q.shape[:2], q.size(2) if tile in ("clipped", "softpick") else 0, dtype=torch.float32)
    return out, lse, _empty_gradients(q)[0] if tile == "clipped" else q.new_empty(0)
