"""What PyTorch's kernels for NVIDIA GPUs lack, in Triton: above all `diagonal` and `ste` in one pass over the scores.

PyTorch's fused kernels need two calls for the diagonal backward (see FusedAttention in fused.py), and for STE they
compute a dQ and dK that nobody uses. Here, from the rows' logsumexp, with `S = scale·QKᵀ` (causal),
`P = exp(S − lse)` and `dP = g Vᵀ`:

    score_backward:  dS = P∘(1 − P)∘dP (diagonal) or dP (ste),   dQ = scale·dS K,   dK = scale·dSᵀ Q,   dV = Pᵀ g
    value_gradient:  dV = Pᵀ g
    row_products:    rowsum(g∘out), for the gradient of a null logit

The first two are as in FlashAttention-2 (Dao 2023): no T × T matrix in memory, sums in float32. One kernel computes dK
and dV, a block of keys at a time, another dQ, a block of queries at a time. So nothing is added atomically, and the
result is the same every time.

Keys and values may have fewer heads than queries, each for a group of them: the first kernel sums dK and dV over the
queries of the whole group, the second reads the group's keys where they lie.

A null logit (softmax1, a sink) needs no code here: it is part of `lse`, which the caller gives.

The two kernels take weights of other tiles than softmax's too, and the backward passes full and detached: `_weights`
has their formulas, and triton_tiles.py their operators.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(tensor, strides, batch, head, rows, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The given rows of one head, (rows, BLOCK_D); zero beyond T and D."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = rows[:, None]
    place = tensor + batch * strides[0] + head * strides[1] + rows * strides[2] + columns * strides[3]
    return tl.load(place, mask=(rows < T) & (columns < D), other=0.0)


@triton.jit
def _store_rows(tensor, strides, batch, head, rows, T, D: tl.constexpr, BLOCK_D: tl.constexpr, values):
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = rows[:, None]
    place = tensor + batch * strides[0] + head * strides[1] + rows * strides[2] + columns * strides[3]
    tl.store(place, values.to(tensor.dtype.element_ty), mask=(rows < T) & (columns < D))


@triton.jit
def _load_lse(lse, strides, batch, head, queries, T, beyond: tl.constexpr):
    """A number for each query, and `beyond` after T: with +∞ such a query has P = 0 everywhere. Zeros for None."""
    if lse is None:
        numbers = tl.full(queries.shape, 0.0, tl.float32)
    else:
        place = lse + batch * strides[0] + head * strides[1] + queries * strides[2]
        numbers = tl.load(place, mask=queries < T, other=beyond)
    return numbers


@triton.jit
def _one_minus_exp(x, exp_x, FLOAT32: tl.constexpr):
    """`1 − P = −expm1(x)` for x ≤ 0, P = exp(x): near 0, where 1 − P would cancel, by the series of expm1.

    Relative error, for an exp that is good to 2⁻²²: in float32 the series to x⁸ leaves |x|⁸/9! < 2⁻²⁵ at |x| ≤ 1/2, and
    1 − P beyond, where it is above 0.39, is good to 2⁻²¹. For half types, whose own rounding is 2⁻¹¹ at best, the
    series to x² leaves x²/6 < 2⁻¹⁴ at |x| ≤ 1/64, and 1 − P beyond is good to 2⁻¹⁶.
    """
    if FLOAT32:
        series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
        return tl.where(x > -1 / 2, -x * series, 1 - exp_x)
    return tl.where(x > -1 / 64, -x * (1 + x / 2), 1 - exp_x)


@triton.jit
def _log_weights(products, lse, queries, keys, scale, MASKED: tl.constexpr):
    """`S − lse` from QKᵀ or KQᵀ; −∞ for keys after the query. At most 0, which large scores exceed by rounding."""
    x = tl.minimum(products * scale - lse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(queries >= keys, x, float("-inf")) if MASKED else x


@triton.jit
def _visible(x, queries, keys, MASKED: tl.constexpr):
    """x, with zero for keys after the query."""
    return tl.where(queries >= keys, x, 0.0) if MASKED else x


@triton.jit
def _weights(
    products, lse, queries, keys, scale, a, b, TILE: tl.constexpr, MASKED: tl.constexpr, FLOAT32: tl.constexpr
):  # fmt: skip
    """(P, slope, pull, x) from QKᵀ or KQᵀ: the weights, and what `_score_gradient` makes dS of. `lse` is the row's
    statistic, where the tile has one; keys after the query get 0. The formulas are those of normalizers.py.

    A comparison that is false for a NaN keeps it.
    """
    # One return at the end: the compiler would take what follows another one for a part of the same function.
    if TILE == "softmax":
        x = _log_weights(products, lse, queries, keys, scale, MASKED)
        p = tl.exp(x)
        slope, pull = p, p
    elif TILE == "clipped":  # a: alpha, b: the context, 0 for the number of keys that the row sees
        x = _log_weights(products, lse, queries, keys, scale, MASKED)
        pull = tl.exp(x)
        gamma = -a / tl.where(b > 0, b, (queries + 1).to(tl.float32))
        y = pull + gamma * _one_minus_exp(x, pull, FLOAT32)
        p, slope = tl.where(y <= 0, 0.0, y), tl.where(y <= 0, 0.0, (1 - gamma) * pull)
    elif TILE == "softpick":  # lse is log(Σ |eˣ − 1| + ε)
        x = _visible(products * scale, queries, keys, MASKED)
        e, nearer = tl.exp(x - lse), -tl.abs(x)
        slope = tl.where(x <= 0, 0.0, e)
        p = slope * _one_minus_exp(nearer, tl.exp(nearer), FLOAT32)
        pull = tl.where(x < 0, -e, slope)
    elif TILE == "sigmoid":  # a: the bias
        x = products * scale + a
        x = tl.where(queries >= keys, x, float("-inf")) if MASKED else x
        e = tl.exp(-tl.abs(x))
        p, slope = tl.where(x >= 0, 1.0, e) / (1 + e), e / ((1 + e) * (1 + e))
        pull = slope
    else:
        tl.static_assert(TILE == "relu")
        x = _visible(products * scale, queries, keys, MASKED)
        share = 1 / (queries + 1).to(tl.float32)
        p, slope = tl.where(x <= 0, 0.0, share * x), tl.where(x <= 0, 0.0, share)
        pull = slope
    return p, slope, pull, x


@triton.jit
def _score_gradient(dp, p, slope, pull, x, delta, TILE: tl.constexpr, SLOPE: tl.constexpr, FLOAT32: tl.constexpr):
    """dS: `slope∘dP` with the row's statistic held constant (detached); the same less what a score takes from its own
    weight by moving that (diagonal); or less what it takes from the whole row, of which delta is the sum (full)."""
    ds = slope * dp
    if SLOPE == "diagonal":
        ds = slope * (1 - p if TILE == "softpick" else _one_minus_exp(x, pull, FLOAT32)) * dp
    elif SLOPE == "full":
        ds = slope * dp - pull * delta
    else:
        tl.static_assert(SLOPE == "detached")
    return ds


@triton.jit
def _add_product(sums, ds, other, WIDE: tl.constexpr):
    """`sums + dS other`, dS rounded to other's dtype; WIDE where dS may exceed float16: divided by its largest first,
    if that is above 1."""
    if WIDE:
        largest = tl.maximum(tl.max(tl.max(tl.abs(ds), 1), 0), 1.0)
        sums += largest * tl.dot((ds / largest).to(other.dtype), other)
    else:
        sums = tl.dot(ds.to(other.dtype), other, sums, input_precision="ieee")
    return sums


@triton.jit
def _keys_kernel(
    q, k, v, g, lse, delta, dk, dv,
    q_strides, k_strides, v_strides, g_strides, lse_strides, delta_strides, out_strides,
    scale, a, b, T, GROUP: tl.constexpr, TILE: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dV of a block of keys and, unless SLOPE is None, dK: sums over the queries that see them, in each of the GROUP
    heads that read this head of keys. Matrices are (keys, queries)."""
    first, key_head, batch = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    keys = first + tl.arange(0, KEYS)
    k_block = _load_rows(k, k_strides, batch, key_head, keys, T, D, BLOCK_D)
    # Not tl.zeros, a compiled function itself: the interpreter of the tests, switched on late, cannot call it.
    dv_block = tl.full((KEYS, BLOCK_D), 0.0, tl.float32)
    if SLOPE is not None:
        v_block = _load_rows(v, v_strides, batch, key_head, keys, T, D, BLOCK_D)
        dk_block = tl.full((KEYS, BLOCK_D), 0.0, tl.float32)

    for member in range(GROUP):
        head = key_head * GROUP + member
        for below in tl.static_range(2):  # first the queries along the diagonal, then those that see all of these keys
            start = first + KEYS if below else first
            end = T if below else tl.minimum(first + KEYS, T)
            for query in range(start, end, QUERIES):
                queries = query + tl.arange(0, QUERIES)
                q_block = _load_rows(q, q_strides, batch, head, queries, T, D, BLOCK_D)
                g_block = _load_rows(g, g_strides, batch, head, queries, T, D, BLOCK_D)
                lse_block = _load_lse(lse, lse_strides, batch, head, queries, T, float("inf"))
                products = tl.dot(k_block, tl.trans(q_block), input_precision="ieee")
                p, slope, pull, x = _weights(
                    products, lse_block[None, :], queries[None, :], keys[:, None], scale, a, b, TILE, not below, FLOAT32
                )
                dv_block = tl.dot(p.to(g_block.dtype), g_block, dv_block, input_precision="ieee")
                if SLOPE is not None:
                    dp = tl.dot(v_block, tl.trans(g_block), input_precision="ieee")
                    if SLOPE == "ste":
                        ds = _visible(dp, queries[None, :], keys[:, None], not below)
                    else:
                        delta_block = _load_lse(delta, delta_strides, batch, head, queries, T, 0.0)
                        ds = _score_gradient(dp, p, slope, pull, x, delta_block[None, :], TILE, SLOPE, FLOAT32)
                    dk_block = _add_product(dk_block, ds, q_block, WIDE)

    _store_rows(dv, out_strides, batch, key_head, keys, T, D, BLOCK_D, dv_block)
    if SLOPE is not None:
        _store_rows(dk, out_strides, batch, key_head, keys, T, D, BLOCK_D, scale * dk_block)


@triton.jit
def _queries_kernel(
    q, k, v, g, lse, delta, dq,
    q_strides, k_strides, v_strides, g_strides, lse_strides, delta_strides, out_strides,
    scale, a, b, T, GROUP: tl.constexpr, TILE: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries: a sum over the keys that they see. Matrices are (queries, keys)."""
    # The last queries see the most keys: they start first, so that no long block is left over at the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    queries = first + tl.arange(0, QUERIES)
    g_block = _load_rows(g, g_strides, batch, head, queries, T, D, BLOCK_D)
    if SLOPE != "ste":  # which needs no scores here
        q_block = _load_rows(q, q_strides, batch, head, queries, T, D, BLOCK_D)
        lse_block = _load_lse(lse, lse_strides, batch, head, queries, T, float("inf"))
        delta_block = _load_lse(delta, delta_strides, batch, head, queries, T, 0.0)
    dq_block = tl.full((QUERIES, BLOCK_D), 0.0, tl.float32)

    for diagonal in tl.static_range(2):  # first the keys that all of these queries see, then those along the diagonal
        start = first if diagonal else 0
        end = tl.minimum(first + QUERIES, T) if diagonal else first
        for key in range(start, end, KEYS):
            keys = key + tl.arange(0, KEYS)
            k_block = _load_rows(k, k_strides, batch, key_head, keys, T, D, BLOCK_D)
            v_block = _load_rows(v, v_strides, batch, key_head, keys, T, D, BLOCK_D)
            dp = tl.dot(g_block, tl.trans(v_block), input_precision="ieee")
            if SLOPE == "ste":
                ds = _visible(dp, queries[:, None], keys[None, :], diagonal)
            else:
                products = tl.dot(q_block, tl.trans(k_block), input_precision="ieee")
                p, slope, pull, x = _weights(
                    products, lse_block[:, None], queries[:, None], keys[None, :], scale, a, b, TILE, diagonal, FLOAT32
                )
                ds = _score_gradient(dp, p, slope, pull, x, delta_block[:, None], TILE, SLOPE, FLOAT32)
            dq_block = _add_product(dq_block, ds, k_block, WIDE)

    _store_rows(dq, out_strides, batch, head, queries, T, D, BLOCK_D, scale * dq_block)


@triton.jit
def _row_products_kernel(
    a, b, sums, a_strides, b_strides, T, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a_block = _load_rows(a, a_strides, batch, head, rows, T, D, BLOCK_D).to(tl.float32)
    b_block = _load_rows(b, b_strides, batch, head, rows, T, D, BLOCK_D).to(tl.float32)
    place = sums + (batch * tl.num_programs(1) + head) * T + rows
    tl.store(place, tl.sum(a_block * b_block, axis=1), mask=rows < T)


# --- operators ------------------------------------------------------------------------------------------------------
# torch.compile takes each for one opaque operator: its graph does not break, and it generates no code for the kernels.


@torch.library.custom_op("offbyone::score_backward", mutates_args=())
def score_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, slope: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of causal attention. slope "diagonal": through the diagonal of its normalizer's Jacobian,
    `dS = P∘(1 − P)∘dP`; "ste": `dS = dP`.

    grad (dL/dO) and q: (B, H, T, D), k and v: (B, H_kv, T, D), where H_kv divides H; of one dtype, float16, bfloat16 or
    float32 (products without TF32), any strides. lse (B, H, T), float32: of the scaled scores and of the null logit
    where there is one; it may be padded beyond T. The gradients have the inputs' dtype and lie in memory as
    (B, T, H, D), the order of a projection's output.
    """
    return _backward(_arguments(q, k, v, grad, lse, scale) | {"SLOPE": slope})


@torch.library.custom_op("offbyone::value_gradient", mutates_args=())
def value_gradient(grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """`dV = Pᵀ g` of causal attention, alone; the arguments and the result are those of `score_backward`."""
    (dv,) = _empty_gradients(k)
    wide, narrow, options = _block_sizes(q, "values")
    with torch.cuda.device_of(q):
        _keys_kernel[_grid(k, wide)](
            **_arguments(q, k, None, grad, lse, scale), dk=None, dv=dv, out_strides=dv.stride(),
            SLOPE=None, KEYS=wide, QUERIES=narrow, **options,
        )  # fmt: skip
    return dv


@torch.library.custom_op("offbyone::row_products", mutates_args=())
def row_products(a: Tensor, b: Tensor) -> Tensor:
    """`rowsum(a∘b)` in float32, (B, H, T), of a and b (B, H, T, D) of any strides, each read once. PyTorch would first
    write a, b and their product in float32: for half types, six times what is read here."""
    B, H, T, D = a.shape
    sums = a.new_empty(B, H, T, dtype=torch.float32)
    block_d = triton.next_power_of_2(D)
    rows = max(1, 4096 // block_d)  # 32 numbers a thread
    with torch.cuda.device_of(a):
        _row_products_kernel[triton.cdiv(T, rows), H, B](
            a, b, sums, a.stride(), b.stride(), T, D=D, BLOCK_D=block_d, ROWS=rows, num_warps=4
        )
    return sums


@score_backward.register_fake
def _(grad, q, k, v, lse, scale, slope):
    return _empty_gradients(q, k, v)


@value_gradient.register_fake
def _(grad, q, k, lse, scale):
    return _empty_gradients(k)[0]


@row_products.register_fake
def _(a, b):
    return a.new_empty(a.shape[:-1], dtype=torch.float32)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs)


def _backward(arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) by both kernels; `arguments` are those that they share."""
    q, k, v = (arguments[name] for name in "qkv")
    dq, dk, dv = _empty_gradients(q, k, v)
    with torch.cuda.device_of(q):
        wide, narrow, options = _block_sizes(q, "keys")
        _keys_kernel[_grid(k, wide)](
            **arguments, dk=dk, dv=dv, out_strides=dk.stride(), KEYS=wide, QUERIES=narrow, **options
        )
        wide, narrow, options = _block_sizes(q, "queries")
        _queries_kernel[_grid(q, wide)](
            **arguments, dq=dq, out_strides=dq.stride(), KEYS=narrow, QUERIES=wide, **options
        )
    return dq, dk, dv


def _arguments(q, k, v, grad, lse, scale: float) -> dict:
    """What both kernels take for softmax; other tiles replace some of it."""
    T, D = q.shape[-2:]
    tensors = {"q": q, "k": k, "v": v, "g": grad, "lse": lse, "delta": None}
    return tensors | {
        **{f"{name}_strides": None if x is None else x.stride() for name, x in tensors.items()},
        "scale": scale,
        "a": None,
        "b": None,
        "TILE": "softmax",
        "WIDE": False,
        "T": T,
        "GROUP": q.size(1) // k.size(1),
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # tl.dot wants a power of two, 16 at least
    }


def _grid(x: Tensor, block: int) -> tuple[int, int, int]:
    B, H, T, _ = x.shape
    return triton.cdiv(T, block), H, B


def _block_sizes(q: Tensor, kernel: str) -> tuple[int, int, dict[str, int]]:
    """The rows of a program's own block, the rows that a step of its loop takes, and the launch options, for the kernel
    that computes the gradients of the "keys", of the "queries", or of the "values" alone, or a tile's "forward" pass.

    For half types they are the fastest of 26 combinations, or within 9 % of it, timed with heads of 64 and 128 and
    T = 1,024 and 4,096 on an H100 (benchmarks/); the tiles' are the same. They fit into the 100 KB of shared memory
    that other cards have.
    """
    if q.dtype == torch.float32:  # no tensor cores without TF32, and larger blocks do not fit into the registers
        return 32, 32, {"num_warps": 8, "num_stages": 1}
    if kernel == "keys" or (kernel == "values" and q.size(-1) <= 64):
        return 64, 64, {"num_warps": 4, "num_stages": 2}
    return 64, 64 if q.size(-1) <= 64 else 32, {"num_warps": 4, "num_stages": 3}
