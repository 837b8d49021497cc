"""How much of the gradient through attention is lateral, and what learning loses without it.

For one row of attention weights A the normaliser's Jacobian is `diag(A) − A Aᵀ`: a local term, A(1 − A) on its
diagonal, and a lateral one off it. With `g = dL/dA = (dL/dO) Vᵀ` over the visible keys and `m_i = Σ_k A_ik g_ik`, the
gradient of the scores is

    full  s_ij = A_ij (g_ij − m_i)     diagonal  d_ij = A_ij (1 − A_ij) g_ij     lateral  o_ij = s_ij − d_ij

and `Σ s² = Σ d² + Σ o² + 2 Σ d·o`. The maps exist in float64, one row block of one layer and sequence at a time. A null
slot of value 0 (softmax1, sink) adds nothing to m, one with a value (kvbias) its own A g; the sums run over the keys
alone.

For a normalizer that is no softmax, s is the derivative of its weights A(S), `s_ij = Σ_k g_ik ∂A_ik/∂S_ij`, and d is g
times the diagonal that its entry in `model.NORMALIZERS` gives.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backends import check_inputs, check_parameters
from measure.activations import row_entropy
from measure.moments import float64
from measure.probe import capture_attention
from model import GPT, GPTConfig, attention_rows, attention_scores, find_normalizer, repeat_heads

# Elements of one map of a row block: 2 MiB in float64, of which some eight are alive at once. (Four times as many leave
# the cache and take half as long again, a quarter as many make more calls than sums.)
BLOCK_ELEMENTS = 2**18


def jacobian_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    normalizer: str = "softmax",
    scale: float | None = None,
    *,
    null_logit: Tensor | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """The split of causal attention's score gradient, per head: q and dL/dO (B, H, T, D), k and v (B, H_kv, T, D), the
    keys of query head h those of head h // (H / H_kv) → (H,) float64 each.

    e_full, e_diag, e_lateral, e_cross: energies summed over batch and positions; e_full is the sum of the others.
    r_diag, r_lateral, r_cross: those over e_full, adding up to 1; r_offdiag = 1 − r_diag.
    cos_diag, cos_ste: cosine of d, and of g, with s over each sequence's (i, j ≤ i), averaged over the sequences.
    mean_attention over (i, j ≤ i); entropy in nats, the null slot counted (`row_entropy`); row_mass `Σ_j A_ij`; and of
    the Jacobian alone jacobian_diag `Σ A²(1 − A)²` and jacobian_offdiag `(Σ A²)² − Σ A⁴`: means over rows.

    A ratio or cosine with a zero norm is NaN; a sequence without one is left out of the average. For a normalizer that
    is no softmax jacobian_offdiag is NaN, and so is, where its entry gives no diagonal, all that needs the diagonal.
    `scale` multiplies q·k, 1/√D by default; `null_logit` (H,) goes with the normalizer "sink", `parameters` with those
    that take some. ValueError where the arguments do not fit.
    """
    shapes = [tuple(x.shape) for x in (q, k, v, grad_out)]
    grouped = q.dim() == k.dim() == 4 and k.size(1) > 0 and q.size(1) % k.size(1) == 0
    if not grouped or not q.numel() or q.shape != grad_out.shape or not k.shape == v.shape == q[:, : k.size(1)].shape:
        raise ValueError(
            "q and grad_out must share one shape (B, H, T, D), and k and v the same with H or fewer heads, of which H "
            f"is a multiple, not {', '.join(map(str, shapes))}"
        )
    entry = find_normalizer(normalizer)
    check_parameters(entry, normalizer, null_logit, parameters)
    check_inputs(q, k, v, null_logit, 0.0, scale, parameters)
    constants = entry.constants.keys() - parameters.keys()
    parameters |= {name: entry.constants[name](GPTConfig(block_size=q.size(-2))) for name in constants}
    if null_logit is not None:
        if entry.null_logit is None:
            raise ValueError(f"a null_logit, one learned logit a head, goes with 'sink', and not with {normalizer!r}")
        parameters["null_logit"] = null_logit
    tensors = zip(q, k, v, grad_out, strict=True)
    return pool([split_of_sequence(*one, normalizer, scale, **parameters) for one in tensors])


@torch.no_grad()
def split_of_sequence(
    q, k, v, grad_out, normalizer: str = "softmax", scale: float | None = None, **parameters: Any
) -> dict[str, Tensor]:
    """The sums and means of one sequence, from which `pool` makes the columns: q and dL/dO (H, T, D), k and
    v (H_kv, T, D) → (H,) float64 each. The normalizer, its parameters (a null logit among them) and the scale as
    `attention` takes them."""
    q, k, v, grad_out = map(float64, (q, k, v, grad_out))
    parameters = {name: float64(x) if torch.is_tensor(x) else x for name, x in parameters.items()}
    null_value = parameters.get("null_value", v.new_zeros(len(v), v.size(-1)))
    v, null_value = (repeat_heads(x[None], len(q))[0] for x in (v, null_value[:, None]))  # (H, T, D), (H, 1, D)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    H, T, _ = q.shape
    sums: dict[str, Tensor] = {}
    at_once = max(1, BLOCK_ELEMENTS // (H * T))
    for start in range(0, T, at_once):
        end = min(start + at_once, T)
        # (1, H, rows, end): the weights of these queries over all the keys that any of them sees
        rows, keys = q[None, :, start:end], k[None, :, :end]
        A, null = attention_rows(rows, keys, normalizer=normalizer, scale=scale, **parameters)
        A, null = A[0], None if null is None else null[0]
        g = (grad_out[:, start:end] @ v[:, :end].mT).tril(start)
        if find_normalizer(normalizer).is_softmax:
            of_null = 0 if null is None else null * (grad_out[:, start:end] @ null_value.mT)
            gradients = softmax_gradients(A, g, of_null)
        else:
            scores = attention_scores(rows, keys, scale)
            gradients = general_gradients(scores, g, normalizer, parameters)
        block = _sums_of_rows(A, g, *gradients) | {"entropy": row_entropy(A, null, normalizer).sum(-1)}
        for name, value in block.items():
            sums[name] = sums[name] + value if name in sums else value
    means = {"mean_attention": T * (T + 1) / 2, "entropy": T, "row_mass": T, "jacobian_diag": T, "jacobian_offdiag": T}
    return {name: value / means.get(name, 1) for name, value in sums.items()}


class ScoreGradients(NamedTuple):
    """What `_sums_of_rows` needs of a block of rows: of the shape of the weights (H, rows, keys), but for the last."""

    s: Tensor  # the full gradient of the scores
    d: Tensor  # its diagonal part
    jacobian_diag: Tensor  # the diagonal of each row's Jacobian
    jacobian_offdiag: Tensor  # (H, rows): the squared norm of the rest of it


def softmax_gradients(A: Tensor, g: Tensor, of_null: Tensor | float = 0) -> ScoreGradients:
    """Of a softmax over the keys and perhaps a null slot, in closed form: A and g (H, rows, keys), and the slot's own
    A g (H, rows, 1), a part of the row's mean."""
    s = A * (g - (A * g).sum(-1, keepdim=True) - of_null)
    diagonal = A * (1 - A)
    A_squared = A.square()
    offdiag = (A_squared.sum(-1).square() - A_squared.square().sum(-1)).clamp(min=0)
    return ScoreGradients(s, diagonal * g, diagonal, offdiag)


def general_gradients(scores: Tensor, g: Tensor, normalizer: str, parameters: dict[str, Tensor]) -> ScoreGradients:
    """Of any normalizer, by a vector-Jacobian product through its weights: scores (1, H, rows, keys), −∞ where a key is
    not visible, and g (H, rows, keys). What the normalizer's entry does not give is NaN."""
    entry = find_normalizer(normalizer)
    with torch.enable_grad():
        scores.requires_grad_()
        weights = entry.weights(scores, **parameters)
        (s,) = torch.autograd.grad(weights, scores, g[None])
    scores, visible = scores.detach(), ~scores.isneginf()
    if entry.diagonal is None:
        diagonal = torch.full_like(scores, math.nan)
    else:
        diagonal = entry.diagonal(scores, weights.detach(), **parameters)
    s, diagonal = (torch.where(visible, x, 0)[0] for x in (s, diagonal))
    return ScoreGradients(s, diagonal * g, diagonal, torch.full(g.shape[:-1], math.nan).to(g))


def _sums_of_rows(A: Tensor, g: Tensor, s: Tensor, d: Tensor, diagonal: Tensor, offdiag: Tensor) -> dict[str, Tensor]:
    """Sums over a block of rows, A and g (H, rows, keys) and their `ScoreGradients` → (H,) each."""

    def total(x: Tensor) -> Tensor:
        return x.sum((-2, -1))

    o = s - d
    return {
        "mean_attention": total(A),
        "row_mass": A.sum(-1).sum(-1),
        "e_full": total(s.square()),
        "e_diag": total(d.square()),
        "e_lateral": total(o.square()),
        "e_cross": 2 * total(d * o),
        "e_ste": total(g.square()),
        "diag_dot_full": total(d * s),
        "ste_dot_full": total(g * s),
        "jacobian_diag": total(diagonal.square()),
        "jacobian_offdiag": offdiag.sum(-1),
    }


def pool(splits: list[dict[str, Tensor]], over_heads: bool = False) -> dict[str, Tensor]:
    """The columns of `jacobian_energy` from any number of sequences' splits: (H,) each, or, over heads (and layers, if
    the list holds several), scalars. Energies are summed, ratios are ratios of these sums, the rest is averaged."""
    stacked = {name: torch.stack([split[name] for split in splits]) for name in splits[0]}  # (N, H)
    if over_heads:
        stacked = {name: x.flatten() for name, x in stacked.items()}
    full, diag, ste = (stacked[name].sqrt() for name in ("e_full", "e_diag", "e_ste"))
    energy = {name: stacked[name].sum(0) for name in ("e_full", "e_diag", "e_lateral", "e_cross")}
    mean = {name: stacked[name].mean(0) for name in ("mean_attention", "entropy", "row_mass")}
    ratio = {f"r_{part}": energy[f"e_{part}"] / energy["e_full"] for part in ("diag", "lateral", "cross")}
    return {
        **mean,
        **energy,
        **ratio,
        "r_offdiag": 1 - ratio["r_diag"],
        "cos_diag": _mean_cosine(stacked["diag_dot_full"], diag, full),
        "cos_ste": _mean_cosine(stacked["ste_dot_full"], ste, full),
        **{name: stacked[name].mean(0) for name in ("jacobian_diag", "jacobian_offdiag")},
    }


def _mean_cosine(dot: Tensor, norm_a: Tensor, norm_b: Tensor) -> Tensor:
    """The cosine averaged over the first dimension, without entries where a norm is zero; a NaN makes it NaN."""
    exists = (norm_a != 0) & (norm_b != 0)
    cosine = torch.where(exists, dot / norm_a / norm_b, 0.0)
    return cosine.sum(0) / exists.sum(0)


# --- a model on a batch ---------------------------------------------------------------------------------------------


def backpropagate(model: GPT, x: Tensor, y: Tensor, splits: list[list[dict[str, Tensor]]] | None = None) -> float:
    """Add the gradient of the mean loss over the batch x, y (B, T) to the parameters', and return that loss.

    Sequence by sequence, each loss with the weight 1/B, so that the activations of only one are in memory. `splits`, a
    list for each layer, takes the `split_of_sequence` of every sequence, of that same gradient.
    """
    total = 0.0
    for x_1, y_1 in zip(x.split(1), y.split(1), strict=True):
        with capture_attention(model) as captured:
            _, loss = model(x_1, y_1)
            (loss / len(x)).backward()
        total += loss.item() / len(x)
        if splits is not None:
            for layer, (attn, *tensors) in enumerate(captured):
                q, k, v, grad_out = (tensor[0] for tensor in tensors)
                splits[layer].append(split_of_sequence(q, k, v, grad_out, **attn.arguments()))
    return total


def take_gradients(model: GPT) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, by name, taken from the model, which starts anew without any."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def dot_products(a: Tensor, b: Tensor) -> Tensor:
    """(a·b, a·a, b·b) over all elements of two tensors of one shape: (3,) float64, which add up over parameters."""
    total = torch.zeros(3, dtype=torch.float64)
    for pieces in zip(a.reshape(-1).split(BLOCK_ELEMENTS), b.reshape(-1).split(BLOCK_ELEMENTS), strict=True):
        x, y = map(float64, pieces)
        total += torch.stack((x @ y, x @ x, y @ y)).cpu()
    return total


def cosine_and_norm_ratio(products: Tensor) -> tuple[float | None, float | None]:
    """cos(a, b) and |a|/|b| from their `dot_products`; None with a zero norm."""
    ab, aa, bb = products.tolist()
    if bb == 0:
        return None, None
    return ab / math.sqrt(aa) / math.sqrt(bb) if aa != 0 else None, math.sqrt(aa) / math.sqrt(bb)


@contextlib.contextmanager
def backward_mode(model: GPT, backward: str) -> Iterator[None]:
    """Within this context gradients flow back through every layer's normaliser as `backward` says."""
    former = [block.attn.backward_mode for block in model.transformer.h]
    try:
        for block in model.transformer.h:
            block.attn.backward_mode = backward
        yield
    finally:
        for block, mode in zip(model.transformer.h, former, strict=True):
            block.attn.backward_mode = mode
