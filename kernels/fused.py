"""Attention as one autograd function over fused kernels: softmax with or without a null slot, what may stand in its
place (`TILES`), and every backward pass.

Which kernel computes it is for backends.py to say; what PyTorch's kernels cannot do themselves is derived here.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backends import one_pass, reads_groups, with_triton
from kernels.normalizers import CLIPPED, RELU, SIGMOID, SOFTPICK, running_sums

DEFINITIONS = {definition["tile"]: definition for definition in (CLIPPED, SOFTPICK, SIGMOID, RELU)}
# What TILES take besides scores, in the order of the kernels' two numbers.
CONSTANTS = {"softmax": (), "clipped": ("alpha", "context"), "softpick": (), "sigmoid": ("bias",), "relu": ()}


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_logit: Tensor | None,
    backward: str,
    dropout_p: float,
    scale: float,
    backend: str,
    tile: str = "softmax",
    constants: dict[str, float] | None = None,
) -> Tensor:
    """Attention as model.py's `attention` defines it, on any backend but "materialized", by the weights `tile`, one of
    kernels.normalizers.TILES, and its `constants`, named as there. ValueError where the backend, chosen by
    `use_backend`, has no such variant. k and v may have fewer heads than q, in whole groups (see `repeat_heads`): they
    are repeated only for the kernels of PyTorch that cannot read them so (`reads_groups`)."""
    if backend == "stock" and (backward != "full" or null_logit is not None):
        raise ValueError(f"backend 'stock' has neither a null_logit nor a backward {backward!r}")
    if not (backend == "cpu_native" or (backend == "cuda_triton") == (tile != "softmax")):
        raise ValueError(f"backend {backend!r} has no {tile}: use cpu_native, cuda_triton or materialized")
    if (backend.startswith("cpu") or tile != "softmax") and dropout_p:
        raise ValueError(f"backend {backend!r} has no dropout of {tile}, and dropout_p is {dropout_p}")
    # The fused kernels let query i see the keys up to i, whatever T_q and T_k: rows of zeros in front of q give each
    # query the number of its own key. CUDA's kernels also want D in multiples of 8.
    D, rows, columns = q.size(-1), k.size(-2) - q.size(-2), -q.size(-1) % 8 if backend.startswith("cuda") else 0
    if rows or columns:
        q, k, v = F.pad(q, (0, columns, rows, 0)), F.pad(k, (0, columns)), F.pad(v, (0, columns))
    if backend == "stock":
        if not reads_groups(backend, q):
            k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
        grouped = k.size(1) != q.size(1)
        out = F.scaled_dot_product_attention(q, k, v, None, dropout_p, True, scale=scale, enable_gqa=grouped)
    else:
        given = [float(constants[name]) for name in CONSTANTS[tile]] if constants else []
        numbers = (*given, *(2 - len(given)) * [0.0])  # the kernels take two, whether they need them or not
        out = FusedAttention.apply(q, k, v, null_logit, backward, dropout_p, scale, backend, tile, numbers)
    return out[:, :, rows:, :D] if rows or columns else out


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, H_kv, T, D) → (B, heads, T, D), each head as often in a row as there are queries for it."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def in_front(null: Tensor, x: Tensor) -> Tensor:
    """The null slot's key, or its value, (H_kv, D), in front of those of the tokens, x (B, H_kv, T, D)."""
    return torch.cat((null[None, :, None].expand(len(x), -1, -1, -1).to(x.dtype), x), dim=2)


def sum_groups(x: Tensor, heads: int) -> Tensor:
    """The gradient of `repeat_heads`: (B, H, T, D) → (B, heads, T, D)."""
    return x if x.size(1) == heads else x.unflatten(1, (heads, -1)).sum(2)


class FusedAttention(torch.autograd.Function):
    """Softmax with or without a null slot, or what stands in its place, and every backward, in O(T) memory, by fused
    kernels.

    Our own kernels (kernels/cpu.py, kernels/triton_tiles.py) take the weights and the backward as arguments, that of
    the CPU the null logit too. PyTorch's kernels know softmax and its full gradient alone. But their backward takes the
    output and the rows' logsumexp as arguments, and for any `out` and `lse` it computes, with `P = exp(S − lse)` and
    `dP = g Vᵀ`: `dS = P∘(dP − rowsum(g∘out))`, `dV = Pᵀ g`, `dQ = scale·dS K` and `dK = scale·dSᵀ Q`. A null slot of
    logit b only rescales a row, to `lse₁ = log(exp(lse) + exp(b))` and `out₁ = out·exp(lse − lse₁)`: called with these,
    their backward gives the exact gradients with a null slot; and with `out = 0` it gives the detached ones.

    Where the gradients are to be differentiated again (`create_graph=True`), `differentiable_gradients` computes them.
    """

    @staticmethod
    def forward(ctx, q, k, v, null_logit, backward, dropout_p, scale, backend, tile="softmax", numbers=(0.0, 0.0)):
        given, state, kept = (q, k, v), (), None
        q, k, v = map(_contiguous_rows, given)
        if backend == "cpu_native":
            out, lse, kept = torch.ops.offbyone.cpu_forward(q, k, v, null_logit, scale, tile, *numbers)
        elif tile != "softmax":
            out, lse, kept = torch.ops.offbyone.tile_forward(q, k, v, scale, tile, *numbers)
        else:
            out, lse, state = kernel_forward(backend, q, k, v, dropout_p, scale)
            if null_logit is not None:
                lse_1 = torch.logaddexp(lse, null_logit.to(lse.dtype).view(-1, *[1] * (lse.dim() - 2)))
                share = torch.exp(lse - lse_1)[:, :, : q.size(-2)]  # what the keys keep of a row's weight
                out, lse = _scaled(out, share.view(*q.shape[:-1], 1)), lse_1
        # Not the copies, if there are any: a second derivative has to reach the tensors that were given.
        ctx.save_for_backward(*given, kept if tile == "clipped" else out, lse, null_logit, *state)
        ctx.arguments = (backward, dropout_p, scale, backend, tile, numbers)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, null_logit, *state = ctx.saved_tensors
        backward, dropout_p, scale, backend, tile, numbers = ctx.arguments
        if torch.is_grad_enabled():  # only where a graph of the gradients is asked for
            if dropout_p:  # which weights the kernel dropped is known to its own backward alone
                raise NotImplementedError(f"with dropout ({dropout_p}) backend {backend!r} has no second derivatives")
            gradients = differentiable_gradients(q, k, v, null_logit, grad, backward, scale, tile, numbers)
            return *gradients, *(None,) * 6
        q, k, v, grad = map(_contiguous_rows, (q, k, v, grad))

        def kernel(out, lse, scale):
            return kernel_backward(backend, grad, q, k, v, out, lse, state, dropout_p, scale)

        def zero():  # one row, read over and over, for the CPU's kernel; those of CUDA need a whole tensor
            return out.new_zeros(out.size(-1)).expand_as(out) if backend == "cpu_flash" else torch.zeros_like(out)

        wants_null = null_logit is not None and ctx.needs_input_grad[3]
        # delta = rowsum(g∘out), for the null logit. PyTorch writes the product out in float32: before dQ, dK and dV
        # exist, so that it does not add to the peak of memory.
        if wants_null and with_triton(backend):
            delta = torch.ops.offbyone.row_products(grad, out)
        elif wants_null and backend != "cpu_native":
            delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        rows_lse = lse.reshape(*lse.shape[:2], -1)[:, :, : q.size(-2)]  # (B, H, T): the kernels' shapes differ
        in_one_pass = backward != "full" and one_pass(backend, q.size(-1), dropout_p)
        if backend == "cpu_native":
            operator = torch.ops.offbyone.cpu_backward
            grad_q, grad_k, grad_v, delta = operator(grad, q, k, v, out, lse, scale, backward, tile, *numbers)
        elif tile != "softmax":
            operator = torch.ops.offbyone.tile_backward
            grad_q, grad_k, grad_v = operator(grad, q, k, v, out, lse, scale, tile, *numbers, backward)
        elif backward == "full":
            grad_q, grad_k, grad_v = kernel(out, lse, scale)
        elif backward == "detached":
            grad_q, grad_k, grad_v = kernel(zero(), lse, scale)
        elif in_one_pass and (backward == "diagonal" or (q.size(-2) <= LINEAR_FROM and q.dtype != torch.float16)):
            # (The kernel rounds dS to q's dtype, and STE's, which is dP itself, may exceed float16.)
            operator = torch.ops.offbyone.score_backward
            grad_q, grad_k, grad_v = operator(grad, q, k, v, rows_lse, scale, backward)
        elif backward == "diagonal":
            # dS = P∘(1 − P)∘dP is a difference of two calls. With out = 0 a kernel computes dS = P∘dP. With the scores
            # (so both lse and scale) doubled too, its P is our P²: dS = P²∘dP, and dQ and dK twice what belongs to it.
            zeros = zero()
            grad_q, grad_k, grad_v = kernel(zeros, lse, scale)
            grad_q_2, grad_k_2, _ = kernel(zeros, 2 * lse, 2 * scale)
            grad_q, grad_k = grad_q.sub_(grad_q_2, alpha=0.5), grad_k.sub_(grad_k_2, alpha=0.5)
        else:
            if backend == "cpu_flash" and q.dtype != torch.float16:  # lse / scale may exceed float16
                grad_v = value_gradient_on_cpu(grad, q, k, lse, scale)
            elif in_one_pass:
                grad_v = torch.ops.offbyone.value_gradient(grad, q, k, rows_lse, scale)
            else:
                _, _, grad_v = kernel(out, lse, scale)
            grad_q, grad_k = straight_through_gradients(q, k, v, grad, scale)

        grad_null = None
        if wants_null:
            # dL/db = −Σ P_null (g·out), in full whatever `backward`, which chooses the gradient of the scores alone.
            grad_null = -(torch.exp(null_logit.to(lse.dtype).view(-1, 1) - rows_lse) * delta).sum((0, 2))
        return grad_q, grad_k, grad_v, grad_null, *(None,) * 6


def differentiable_gradients(q, k, v, null_logit, grad, backward, scale, tile="softmax", numbers=(0.0, 0.0)):
    """(dQ, dK, dV, db) by their definition, in operations that autograd can differentiate: the derivative of these
    formulas in q, k, v, b and grad is the exact one, whatever `backward`. In O(T²) memory."""
    B, H, T, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, g = (repeat_heads(x.to(wide), H) for x in (q, k, v, grad))
        scores = (scale * q_ @ k_.mT).masked_fill(hidden, -math.inf)
        if null_logit is not None:  # one more column; a logit of +∞ would give ∞ / ∞
            column = null_logit.to(wide).clamp(max=torch.finfo(wide).max).view(-1, 1, 1)
            scores = torch.cat((scores, column.expand(B, H, T, 1)), dim=-1)
        dP = g @ v_.mT
        if tile == "softmax":
            P, null = scores.softmax(-1).tensor_split([T], dim=-1)
            mean = (P * dP).sum(-1, keepdim=True)
            slope = P * (1 - P) if backward == "diagonal" else P
        else:
            constants = dict(zip(CONSTANTS[tile], numbers, strict=False))
            P = DEFINITIONS[tile]["weights"](scores.requires_grad_(), **constants)
            slope = DEFINITIONS[tile]["diagonal" if backward == "diagonal" else "detached"](scores, P, **constants)
        if backward == "full" and tile == "softmax":
            dS = P * (dP - mean)
        elif backward == "full":
            (dS,) = torch.autograd.grad(P, scores, dP, create_graph=True)
        else:
            dS = dP.tril() if backward == "ste" else slope * dP
        gradients = scale * dS @ k_, *(sum_groups(x, k.size(1)) for x in (scale * dS.mT @ q_, P.mT @ g))
    grad_null = None if null_logit is None else -(null * mean).sum((0, 2, 3)).to(null_logit.dtype)
    return *(x.to(q.dtype) for x in gradients), grad_null


def _contiguous_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, which the kernels assume and do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scaled(out: Tensor, share: Tensor) -> Tensor:
    """out (B, H, T, D) times share (B, H, T, 1), in out's dtype.

    In place, which saves a copy, except under torch.compile: there PyTorch 2.11 gives a gradient of zeros to an output
    that is an alias of another tensor, such as the result of `mul_`, or of a `to` that has nothing to convert.
    """
    if not torch.compiler.is_compiling():
        return out.mul_(share)
    product = out * share
    return product if product.dtype == out.dtype else product.to(out.dtype)


CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention
CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def kernel_forward(backend, q, k, v, dropout_p, scale):
    """(out, the rows' logsumexp, what the backward needs besides). PyTorch's private operators are named only here and
    in kernel_backward."""
    if not reads_groups(backend, q):
        k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    if backend == "cpu_flash":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, True, scale=scale)
        return out, lse, ()
    if backend == "cuda_flash":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, _, _, _, _, seed, offset, _ = kernel(q, k, v, dropout_p, True, scale=scale)
        return out, lse, (seed, offset)
    if backend == "cuda_cudnn":
        out, lse, _, _, _, _, seed, offset, _ = CUDNN(q, k, v, None, True, dropout_p, True, scale=scale)
        return out, lse, (seed, offset)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, seed, offset = kernel(q, k, v, None, True, dropout_p, True, scale=scale)
    return out, lse, (seed, offset)


def kernel_backward(backend, grad, q, k, v, out, lse, state, dropout_p, scale):
    """(dQ, dK, dV) from the given output and logsumexp; see FusedAttention."""
    T = q.size(-2)
    if not reads_groups(backend, q) and k.size(1) != q.size(1):
        k_, v_ = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
        grad_q, *rest = kernel_backward(backend, grad, q, k_, v_, out, lse, state, dropout_p, scale)
        return grad_q, *(sum_groups(x, k.size(1)) for x in rest)
    if backend == "cpu_flash":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    if backend == "cuda_flash":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return kernel(grad, q, k, v, out, lse, None, None, T, T, dropout_p, True, *state, scale=scale)
    if backend == "cuda_cudnn":
        if grad.stride() != out.stride():
            # PyTorch looks up cuDNN's plans by the strides of q, k and v alone. The output's follow from those; a dL/dO
            # with other strides than the first one's would run on the plan made for those, and give garbage.
            grad = torch.empty_like(out).copy_(grad)
        return CUDNN_BACKWARD(grad, q, k, v, out, lse, *state, None, None, None, T, T, dropout_p, True, scale=scale)
    kernel, needed = torch.ops.aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    return kernel(grad, q, k, v, None, out, lse, *state, dropout_p, needed, True, scale=scale)[:3]


# --- STE ------------------------------------------------------------------------------------------------------------

# On a GPU there are two ways to STE's dQ and dK, which are products with the masked matrix tril(g Vᵀ).
# kernels/triton.py computes that matrix block by block, in O(T²) time; `linear_attention` keeps running sums instead,
# in O(T) time, but by many small operations. Where T exceeds this number, running sums are taken. Measured on an H100
# with heads of 64 and 16,384 tokens a batch, the whole backward takes
#     T                 2,048   4,096   8,192   16,384
#     block by block    1.0     1.9     3.7     7.5 ms
#     running sums      3.1     3.7     4.8     6.2 ms
# Some 2 ms of the latter are launches, which torch.compile joins, so that the two meet earlier where it is compiled.
LINEAR_FROM = 4096

# value_gradient_on_cpu copies its inputs. Where q has more elements than this, it goes head by head to save memory.
AT_ONCE = 2**20


def value_gradient_on_cpu(grad, q, k, lse, scale: float) -> Tensor:
    """`dV_j = Σ_{i ≥ j} exp(S_ij − lse_i) g_i`, (B, H_kv, T, D), by one *forward* pass of the CPU's flash kernel.

    With time reversed, the sum over i ≥ j is causal attention in which our keys ask, our queries answer, and g are the
    values. Two things remain. The −lse_i enter the scores as one more column of q, against a column of ones in k. And
    the kernel divides each row by its sum, so the result is multiplied by that sum again. This takes half the time of a
    backward pass, the other way to dV. Keys that a group of queries shares ask once for each of these.
    """
    H_kv, D = k.size(1), q.size(-1)
    if q.numel() > AT_ONCE and H_kv > 1:
        groups = zip(*(x.chunk(H_kv, dim=1) for x in (grad, q, k, lse)), strict=True)
        return torch.cat([value_gradient_on_cpu(g, q_h, k_h, lse_h, scale) for g, q_h, k_h, lse_h in groups], dim=1)
    columns, rest = [], -lse.flip(2).unsqueeze(-1) / scale
    for _ in range(3 if q.dtype == torch.bfloat16 else 1):  # a float32 is the sum of three bfloat16
        columns.append(rest.to(q.dtype))
        rest = rest - columns[-1]
    queries = torch.cat((q.flip(2), *columns), dim=-1)
    keys = repeat_heads(F.pad(k.flip(2), (0, len(columns)), value=1.0), q.size(1))
    out, log_sum, _ = kernel_forward("cpu_flash", keys, queries, F.pad(grad.flip(2), (0, len(columns))), 0.0, scale)
    del queries, keys
    return sum_groups(out[..., :D] * log_sum.exp().unsqueeze(-1), H_kv).flip(2).to(q.dtype)


def straight_through_gradients(q, k, v, grad, scale: float) -> tuple[Tensor, Tensor]:
    """`dQ = scale·tril(g Vᵀ) K`, (B, H, T, D), and `dK = scale·tril(g Vᵀ)ᵀ Q`, (B, H_kv, T, D), in O(T) time and
    memory."""
    return linear_attention(grad, v, k, scale), linear_attention(v, grad, q, scale, anticausal=True)


def linear_attention(a, b, c, scale: float, anticausal: bool = False, chunk: int = 128, segment: int = 1024) -> Tensor:
    """`scale·tril(a bᵀ) c`, or triu if anticausal, in O(T) (Katharopoulos et al. 2020).

    a and the result are (B, H_a, T, D), b and c (B, H_b, T, D). Either several heads of a share one of b and c, or one
    is for several of these, and its result is the sum over them: a group's rows stand one below the other in a product.
    Within a chunk of rows the masked product is computed as it stands. What lies before the chunk (after it, if
    anticausal) enters through the running sum `Σ b cᵀ`. The chunks of a segment are computed together, one segment
    after another, which bounds the memory. Sums are at least float32. So are the factors of products, except bfloat16
    on CUDA: there they stay bfloat16, as the weights do in a flash kernel.
    """
    B, H, T, D = a.shape
    groups = min(H, b.size(1))
    sums_dtype = torch.promote_types(a.dtype, torch.float32)
    factors = a.dtype if a.is_cuda and a.dtype == torch.bfloat16 else sums_dtype
    chunk, segment = min(chunk, T), 4 * segment if a.is_cuda else segment
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=a.device).triu(1)
    hidden = (hidden.mT if anticausal else hidden).unsqueeze(1)  # (rows, 1, columns): the same for all heads of a group
    out, outside = torch.empty_like(a), None  # Σ b cᵀ of the segments that are done (B·groups, 1, D, D)
    starts = range(0, T, segment)
    with torch.autocast(a.device.type, enabled=False):
        for start in reversed(starts) if anticausal else starts:
            rows = min(segment, T - start)
            padded = (F.pad(x[:, :, start : start + rows].to(factors), (0, 0, 0, -rows % chunk)) for x in (a, b, c))
            split = (x.unflatten(1, (groups, -1)).unflatten(3, (-1, chunk)) for x in padded)
            a_, b_, c_ = (x.transpose(2, 3).flatten(3, 4).flatten(0, 2) for x in split)  # (B·groups·N, heads·chunk, D)
            scores = torch.bmm(a_, b_.mT)
            scores.unflatten(2, (-1, chunk)).unflatten(1, (-1, chunk)).masked_fill_(hidden, 0)
            part = torch.bmm(scores, c_)
            if chunk < T:
                own = torch.bmm(b_.mT, c_).view(B * groups, -1, D, D).to(sums_dtype)  # Σ b cᵀ of each chunk
                sums = running_sums(own.flip(1), 1).flip(1) if anticausal else running_sums(own, 1)
                sums = sums if outside is None else sums + outside
                part.baddbmm_(a_, (sums - own).view(-1, D, D).to(factors))
                outside = sums[:, :1] if anticausal else sums[:, -1:]
            part = part.mul_(scale).view(B, groups, -1, H // groups, chunk, D).transpose(2, 3)
            out[:, :, start : start + rows] = part.reshape(B, H, -1, D)[:, :, :rows]
    return out


# --- the readable form ------------------------------------------------------------------------------------------------


class SlopedProduct(torch.autograd.Function):
    """`P V` with `dL/dS = slope∘dL/dP`, whatever the weights P (…, T_q, T_k) are of the scores S and of the parameters;
    V (…, T_k, D) and the parameters get their exact gradients.

    `weights_and_slope` computes P and the slope from (scores, *parameters). Where the gradients are to be
    differentiated again, it is part of what is differentiated, and so their derivative in S is exact. What it gives
    for these scores is passed in, too: weights whose graph leads to the parameters alone, and a slope without a graph.
    """

    @staticmethod
    def forward(ctx, scores, v, weights, slope, weights_and_slope, *parameters):
        ctx.save_for_backward(scores, v, weights, slope, *parameters)
        ctx.weights_and_slope = weights_and_slope
        return weights.to(v.dtype) @ v

    @staticmethod
    def backward(ctx, grad):
        scores, v, weights, slope, *parameters = ctx.saved_tensors
        grad_weights = (grad @ v.mT).to(weights.dtype)
        if not torch.is_grad_enabled():
            rest = (None,) * (2 + len(parameters))
            return slope * grad_weights, weights.to(v.dtype).mT @ grad, grad_weights, *rest
        parameters = [p.view_as(p) for p in parameters]  # apart from what the scores may have been made of
        weights, slope = ctx.weights_and_slope(scores, *parameters)
        grads = [
            torch.autograd.grad(weights, p, grad_weights, create_graph=True)[0] if p.requires_grad else None
            for p in parameters
        ]
        return slope * grad_weights, weights.to(v.dtype).mT @ grad, None, None, None, *grads
