"""Simulated post-training quantization: round weights and activations to a grid of integers, and compute in float.

The rounding is PyTorch's own (`torch.fake_quantize_*`: to the nearest point of the grid, ties to even, clipped at its
ends). Weights have symmetric grids, activations asymmetric ones that always hold 0. A `Site` is a place where a tensor
is rounded. Hooks do the rounding, and when a context ends, the model is as it was before.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from model import GPT, Block, CausalSelfAttention, attention_rows, find_normalizer, in_front, repeat_heads

LINEAR = {  # a block's linear layers, in the order of the forward pass → what each reads; not all blocks have gates
    "attn.c_attn": "attn.c_attn input",
    "attn.c_gate": "attn.c_attn input",  # the same tensor
    "attn.c_proj": "attn.c_proj input",
    "mlp.c_gate": "mlp.c_fc input",  # the same tensor
    "mlp.c_fc": "mlp.c_fc input",
    "mlp.c_proj": "mlp.c_proj input",
}
PROBABILITIES, RESIDUAL, HEAD = "attention probabilities", "residual stream", "lm_head input"
KINDS = ("attn.c_attn input", PROBABILITIES, "attn.c_proj input", "mlp.c_fc input", "mlp.c_proj input", RESIDUAL)

# A range of 0 still needs a scale. The kernels multiply by its inverse, which below this one would be infinite.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_CHUNK = 2**25  # attention probabilities held at a time


# --- rounding ---------------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, bits: int, per_channel: bool) -> Tensor:
    """weight (out, in) on the grid scale · {−m, …, m}, m = 2^(bits−1) − 1, with scale = max |w| / m: one for the
    tensor, or one for each output channel."""
    m = 2 ** (bits - 1) - 1
    peak = weight.detach().abs().amax(1) if per_channel else weight.detach().abs().amax()
    scale = (peak / m).float().clamp(min=_SMALLEST_SCALE)  # the kernels take no other dtype
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if per_channel:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -m, m)
    return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -m, m)


def quantize_range(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x of any shape on the 2^bits points from `low` to `high` (scalars), moved so that 0 is one of them; clipped."""
    scale, zero = _affine(low, high, bits)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 2**bits - 1)


def quantize_per_token(x: Tensor, bits: int) -> Tensor:
    """x (…, C) with a grid for each row of C values: 2^bits points from its least to its largest, 0 among them."""
    rows = x.reshape(-1, x.size(-1))
    scale, zero = _affine(*rows.aminmax(dim=-1), bits)
    return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, 0, 2**bits - 1).view_as(x)


def _affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (the integer that stands for 0) of ranges widened to hold 0."""
    low, high, levels = low.clamp(max=0), high.clamp(min=0), 2**bits - 1
    scale = (high / levels - low / levels).float().clamp(min=_SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, levels).int()


# --- where ------------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """A tensor of the forward pass that a quantized model holds in integers."""

    kind: str
    """one of KINDS, or HEAD"""
    name: str
    layer: int | None
    """the block it is in; None for the embedding and the head"""
    module: nn.Module
    """the module that takes the tensor (a linear layer), computes it (the attention) or returns it (a block)"""
    then: Callable[..., Tensor]
    """what the model makes of it: the linear layer's output (`forward`, past its hooks), that of the norm or norms that
    read it next, or, for the probabilities P, their product with v, which is known only while the model runs:
    `then(P, v)`"""


def sites(model: GPT, head: bool = False) -> list[Site]:
    """All sites of a model, in the order of the forward pass; that of lm_head only with `head`."""
    t = model.transformer
    found, readers = [], [*(partial(_norms, block) for block in t.h), t.ln_f]
    found.append(Site(RESIDUAL, "residual after embedding", None, t.drop, readers[0]))
    for layer, block in enumerate(t.h):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name in sorted(linears, key=list(LINEAR).index):
            if name == "attn.c_proj":
                found.append(Site(PROBABILITIES, f"h.{layer}.attn probabilities", layer, block.attn, torch.matmul))
            found.append(Site(LINEAR[name], f"h.{layer}.{name}", layer, linears[name], linears[name].forward))
        found.append(Site(RESIDUAL, f"residual after h.{layer}", layer, block, readers[layer + 1]))
    if head:
        found.append(Site(HEAD, "lm_head", None, model.lm_head, model.lm_head.forward))
    return found


def _norms(block: Block, x: Tensor) -> Tensor:
    """What a block's norms make of its input: ln_1 alone, or, where attention and MLP both read it, ln_1 and ln_2."""
    return torch.cat((block.ln_1(x), block.ln_2(x)), -1) if block.parallel_residual else block.ln_1(x)


def has_static_range(site: Site) -> bool:
    """Whether the values lie in [0, 1] whatever the text is, as a softmax's probabilities do; not all weights do."""
    return isinstance(site.module, CausalSelfAttention) and find_normalizer(site.module.normalizer).bounded


Visit = Callable[[Site, Tensor, Callable[[Tensor], Tensor]], Tensor]


@contextlib.contextmanager
def visiting(places: Iterable[Site], visit: Visit) -> Iterator[None]:
    """While the model runs, `visit(site, tensor, then)` replaces the tensor of each site; `then` is what follows it."""
    with contextlib.ExitStack() as stack:
        for site in places:
            stack.callback(_hook(site, visit).remove)
        yield


def _hook(site: Site, visit: Visit) -> RemovableHandle:
    module = site.module
    if isinstance(module, CausalSelfAttention):
        return module.core.register_forward_hook(lambda _core, qkv, _out: _attend(site, visit, module, *qkv))
    if isinstance(module, nn.Linear):
        return module.register_forward_pre_hook(lambda _module, args: visit(site, args[0], site.then))
    return module.register_forward_hook(lambda _module, _args, x: visit(site, x, site.then))


def _attend(site: Site, visit: Visit, attn: CausalSelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention's output (B, H, T, D) with its probabilities as `visit` leaves them, in place of the fused one."""
    at_once = max(1, _CHUNK // (q.size(1) * q.size(2) * k.size(2)))  # sequences
    outputs = []
    for q_, k_, v_ in zip(*(x.split(at_once) for x in (q, k, v)), strict=True):
        P, null = attention_rows(q_, k_, **(arguments := attn.arguments()))
        if null is not None and "null_value" in arguments:  # a weight and a value like all others
            P, v_ = torch.cat((null, P), dim=-1), in_front(arguments["null_value"], v_)
        then = partial(site.then, other=repeat_heads(v_, q.size(1)))
        outputs.append(then(visit(site, P, then)))
    return torch.cat(outputs)


# --- schemes ----------------------------------------------------------------------------------------------------------

How = Literal["min-max", "percentile", "per token"]


@dataclass(frozen=True)
class Scheme:
    """What is rounded to how many bits; None leaves it in float."""

    name: str
    weight_bits: int | None = None
    per_channel: bool = False
    """a scale for each output channel of a weight, or one for the tensor"""
    activation_bits: int | None = None
    activations: How = "min-max"
    """how an activation's range is found: over the calibration windows, all of it or without its extremes; or anew for
    each token. A softmax's probabilities have the static range [0, 1], and need none."""
    kinds: tuple[str, ...] = KINDS
    """the sites whose activations are rounded"""

    def calibrated(self, model: GPT) -> bool:
        """Whether its result depends on the calibration windows."""
        ranges_matter = self.activation_bits is not None and self.activations != "per token"
        return ranges_matter and any(s.kind in self.kinds and not has_static_range(s) for s in sites(model, head=True))


def schemes(head: bool = False) -> list[Scheme]:
    """The usual ones: weights alone, per channel; weights and activations, the weights per tensor, so that these differ
    in the activations only; and the activations of each kind of site alone."""
    kinds = (*KINDS, HEAD) if head else KINDS
    return [
        *(Scheme(f"W{bits} per channel", bits, True, kinds=kinds) for bits in (8, 4)),
        *(
            Scheme(f"W{bits}A{bits} {how}", bits, False, bits, how, kinds)
            for bits in (8, 6)
            for how in ("min-max", "percentile", "per token")
        ),
        *(Scheme(f"A{bits} only {kind}", activation_bits=bits, kinds=(kind,)) for bits in (8, 6) for kind in kinds),
    ]


class Range(NamedTuple):
    """The range of a site's values over the calibration windows, and that without the extremes: scalars."""

    low: Tensor
    high: Tensor
    percentile_low: Tensor
    percentile_high: Tensor


@torch.no_grad()
def calibrate(model: GPT, windows: Tensor, batch_size: int, percentile: float, head: bool = False) -> dict[str, Range]:
    """The ranges of the float model's activations on `windows` (N, T) int64, by site.

    The percentile's range leaves out the (1 − percentile/100)·n largest of the n values, and as many of the least. It
    is exact, since the largest and the least so far are kept from batch to batch, as many as could be left out.
    """
    largest: dict[str, tuple[Tensor, Tensor]] = {}  # of −x and of x, in falling order

    def observe(site: Site, x: Tensor, _then) -> Tensor:
        total = x[0].numel() * len(windows)
        keep = round((1 - percentile / 100) * total) + 1
        down, up = largest.get(site.name, (x.new_empty(0), x.new_empty(0)))
        largest[site.name] = _largest(keep, down, -x), _largest(keep, up, x)
        return x

    with visiting([site for site in sites(model, head) if not has_static_range(site)], observe):
        for x in windows.split(batch_size):
            model(x)
    return {name: Range(-down[0], up[0], -down[-1], up[-1]) for name, (down, up) in largest.items()}


def _largest(count: int, former: Tensor, x: Tensor) -> Tensor:
    """The largest of `former` (n,) and of x, of any shape: (count,) in falling order, or all where they are fewer."""
    values = torch.cat((former, x.flatten()))
    return values.topk(min(count, len(values))).values


def quantize_activation(x: Tensor, site: Site, scheme: Scheme, ranges: dict[str, Range]) -> Tensor:
    """The tensor of a site as the scheme has it; unchanged where the scheme leaves the site alone."""
    bits = scheme.activation_bits
    if bits is None or site.kind not in scheme.kinds:
        return x
    if scheme.activations == "per token":
        return quantize_per_token(x, bits)
    if has_static_range(site):
        return quantize_range(x, x.new_zeros(()), x.new_ones(()), bits)
    found = ranges[site.name]
    return quantize_range(x, *(found[:2] if scheme.activations == "min-max" else found[2:]), bits)


@contextlib.contextmanager
def quantized(model: GPT, scheme: Scheme, ranges: dict[str, Range], head: bool = False) -> Iterator[None]:
    """Within this context the model computes as the scheme has it: the weights of its linear layers (the head's only
    with `head`, and never the embedding that it is tied to) and the activations of the scheme's sites."""
    places = sites(model, head)
    linears = [site.module for site in places if isinstance(site.module, nn.Linear)]
    former = [linear.weight for linear in linears]
    visited = [site for site in places if scheme.activation_bits and site.kind in scheme.kinds]
    try:
        if scheme.weight_bits:
            for linear in linears:
                weight = quantize_weight(linear.weight.detach(), scheme.weight_bits, scheme.per_channel)
                linear.weight = nn.Parameter(weight, requires_grad=False)
        with visiting(visited, lambda site, x, _then: quantize_activation(x, site, scheme, ranges)):
            yield
    finally:
        for linear, weight in zip(linears, former, strict=True):
            linear.weight = weight


@torch.no_grad()
def signal_to_noise(
    model: GPT, batches: Iterable[Tensor], compared: list[Scheme], ranges: dict[str, Range], head: bool = False
) -> list[dict]:
    """What each site alone adds to the noise: rows with `name`, `site` (its kind), `layer` and, by scheme, the
    signal-to-noise ratio in dB, `10 log₁₀ Σy² / Σ(ŷ − y)²`, of what the model makes of the tensor.

    y is the linear layer's output, the attention's P v, or the output of the norm that reads the residual stream next
    (of both norms, where a block's attention and MLP read it in parallel), for the float model's own tensors on
    `batches` of (B, T) int64; ŷ is the same with the tensor (and the linear layer's weight) as the scheme has it. The
    ratio is not that of the tensor itself, where one outlier channel would pass for a strong signal. It is None where
    there is no noise.
    """
    places = sites(model, head)
    signal = {site.name: 0.0 for site in places}
    noise = {(site.name, scheme.name): 0.0 for site in places for scheme in compared}

    def look(site: Site, x: Tensor, then) -> Tensor:
        y = then(x)
        signal[site.name] += y.double().square().sum().item()
        rounded: dict[tuple[int, bool], Tensor] = {}  # the weight, which several schemes round alike
        for scheme in compared:
            x_q = quantize_activation(x, site, scheme, ranges)
            if isinstance(site.module, nn.Linear) and scheme.weight_bits:
                how = scheme.weight_bits, scheme.per_channel
                if how not in rounded:
                    rounded[how] = quantize_weight(site.module.weight, *how)
                y_q = F.linear(x_q, rounded[how], site.module.bias)
            else:
                y_q = then(x_q)
            noise[site.name, scheme.name] += (y_q.double() - y.double()).square().sum().item()
        return x

    with visiting(places, look):
        for x in batches:
            model(x)
    return [
        {
            "name": site.name,
            "site": site.kind,
            "layer": site.layer,
            **{
                scheme.name: 10 * math.log10(signal[site.name] / n) if (n := noise[site.name, scheme.name]) else None
                for scheme in compared
            },
        }
        for site in places
    ]
