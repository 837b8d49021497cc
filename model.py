"""GPT-2 with a pluggable attention, in one file: read it from top to bottom.

- `NORMALIZERS`: how a row of scores becomes attention weights, one entry for each way (softmax; softmax1, which may
  attend to nothing; sink, which learns how readily; and their rivals). kernels/normalizers.py has the definitions.
- `attention`: by any of these *normalizers* forward, and one of four *backward* passes (full, diagonal, detached or
  straight-through). The two are chosen independently; the forward pass never depends on the backward.
- `GPT`: GPT-2 by default; grouped queries, rotary positions, RMSNorm, SwiGLU and what else today's models have by the
  fields of `GPTConfig`, each independent of the others. Modules and parameters carry nanoGPT's names, so that its
  checkpoints load.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import normalizers as definitions
from kernels.backends import attention_backend, check_inputs, check_parameters, constant_when_compiled
from kernels.fused import SlopedProduct, fused_attention, in_front, repeat_heads
from kernels.loss import cross_entropy, linear_cross_entropy
from kernels.normalizers import SOFTMAX, Normalizer, scaled_queries, softmax1, softmax_rows, softmax_weights  # noqa: F401

Backward = Literal["full", "diagonal", "ste", "detached"]

# --- normalizers: from a row of scores to attention weights ---------------------------------------------------------


def _zeros(c: "GPTConfig") -> Tensor:
    return torch.zeros(c.kv_heads, c.head_size)


def _each_head(start: str):
    return lambda c: torch.full((c.n_head,), float(c.resolved()[start]))


# `Normalizer` says what an entry has; a new one is all that a new normalizer takes: the config, training and the
# diagnostics read this table. The definitions, with their sources, are in kernels/normalizers.py.
NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Normalizer(**SOFTMAX),
    "softmax1": Normalizer(**SOFTMAX, null_logit=0.0),
    # As many null slots as softmax_n says, any number ≥ 0: exp(x_i) / (n + Σ exp(x_j)).
    "softmax_n": Normalizer(
        **SOFTMAX,
        null_logit="null_logit",
        constants={"null_logit": lambda c: math.log(c.softmax_n) if c.softmax_n else -math.inf},
    ),
    # Each head learns its null slot's logit, as in gpt-oss (OpenAI 2025).
    "sink": Normalizer(**SOFTMAX, null_logit="sink", parameters={"sink": _each_head("sink_init")}),
    # A key that belongs to no token, in front of all others, its value zero or learned too (Gu et al. 2024). Both start
    # as softmax1.
    "kbias": Normalizer(**SOFTMAX, parameters={"null_key": _zeros}),
    "kvbias": Normalizer(**SOFTMAX, parameters={"null_key": _zeros, "null_value": _zeros}),
    "ssmax": Normalizer(**SOFTMAX, queries=scaled_queries, parameters={"ssmax_scale": _each_head("ssmax_init")}),
    "clipped": Normalizer(
        **definitions.CLIPPED,
        constants={"alpha": lambda c: c.clipped_alpha, "context": lambda c: c.block_size * (c.clipped_by == "context")},
    ),
    "softpick": Normalizer(**definitions.SOFTPICK),
    "sigmoid": Normalizer(**definitions.SIGMOID, constants={"bias": lambda c: c.resolved()["sigmoid_bias"]}),
    "relu": Normalizer(**definitions.RELU),
    "entmax15": Normalizer(**definitions.ENTMAX15),
}


def find_normalizer(name: str) -> Normalizer:
    """The entry of `NORMALIZERS`; ValueError, naming those there are, where there is none."""
    if name not in NORMALIZERS:
        raise ValueError(f"unknown normalizer {name!r}: choose from {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "softmax",
    backward: Backward = "full",
    null_logit: Tensor | float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    **parameters: Any,
) -> Tensor:
    """Causal attention: q (B, H, T_q, D), k and v (B, H_kv, T_k, D) → (B, H, T_q, D). Query head h reads the keys of
    head h // (H / H_kv): grouped queries (Ainslie et al. 2023).

    Aligned at the end: query i sees the keys up to i + T_k − T_q, as a key/value cache needs it (T_q ≤ T_k).
    `normalizer` is an entry of `NORMALIZERS`, and `parameters` are what it takes by name: tensors that a model learns,
    as kvbias's null_key and null_value (H_kv, D), and constants, by default those of a `GPTConfig` of T_k tokens.
    `null_logit` (H,), or one number, gives every row one more slot, of that logit and with value zero: −∞ is softmax, 0
    softmax1, log n softmax_n, ∞ gives zeros; a learned one, "sink", is gpt-oss's (OpenAI 2025).
    `backward` chooses dL/dS from P and g = dL/dP: full `P∘(g − Σ P∘g)`, diagonal `P∘(1 − P)∘g`, detached `P∘g`, or ste
    `g`; but for ste, what stands for it where P is no softmax. The gradients of parameters are always the full ones.
    `scale` multiplies q·k, 1/√D by default. Higher derivatives take O(T²) memory. ValueError says what does not fit.
    """
    entry = find_normalizer(normalizer)
    _check_backward(backward, normalizer)
    check_parameters(entry, normalizer, null_logit, parameters)
    check_inputs(q, k, v, null_logit, dropout_p, scale, parameters)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    q, null, parameters = _prepared(normalizer, q, k.size(-2), null_logit, parameters)
    if "null_key" in parameters:
        v = in_front(parameters.get("null_value", torch.zeros_like(parameters["null_key"])), v)
        k, parameters = in_front(parameters["null_key"], k), {}
    stock = backward == "full" and null is None
    # Without queries, or without a batch, PyTorch's kernels would divide by zero.
    backend = attention_backend(q, k, dropout_p, stock, entry.tile) if q.numel() else "materialized"
    if backend == "materialized":
        arguments = parameters if null is None else {"null_logit": null}
        return _materialized(q, k, v, entry, arguments, backward, dropout_p, scale)
    if entry.tile is None:
        raise ValueError(f"backend {backend!r} has no normalizer {normalizer!r}, which runs materialized")
    return fused_attention(q, k, v, null, backward, dropout_p, scale, backend, entry.tile, parameters)


# --- the readable form: reference, fallback and oracle ----------------------------------------------------------------


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    normalizer: str = "softmax",
    null_logit: Tensor | float | None = None,
    scale: float | None = None,
    **parameters: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention weights P by any normalizer. Whatever looks at attention weights takes them from here.

    q (B, H, T_q, D), k (B, H_kv, T_k, D) → P (B, H, T_q, T_k), at least float32, and the null slot's share of each row
    (B, H, T_q, 1), None where there is no such slot. Aligned at the end as in `attention`, so that a block of queries
    needs only the keys up to the block's last query. ValueError for an unknown normalizer.
    """
    entry, has_key = find_normalizer(normalizer), "null_key" in parameters
    q, null, parameters = _prepared(normalizer, q, k.size(-2), null_logit, parameters)
    k = in_front(parameters["null_key"], k) if has_key else k
    scores = attention_scores(q, k, q.size(-1) ** -0.5 if scale is None else scale)
    if not entry.is_softmax:
        return _weights(entry, scores, parameters), None
    P, null = softmax_rows(scores, null)
    return (P[..., 1:], P[..., :1]) if has_key else (P, null)


def attention_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`scale·q kᵀ`, −∞ where a query does not see a key: (B, H, T_q, T_k), at least float32."""
    k = repeat_heads(k, q.size(1))
    visible = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril(k.size(-2) - q.size(-2))
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(dtype) * scale) @ k.to(dtype).mT
    return scores.masked_fill(~visible, -math.inf)


def _weights(entry: Normalizer, scores: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    """The entry's weights, with 0 for every key that is not visible."""
    weights = entry.weights(scores, **arguments)
    return weights if entry.is_softmax else weights.masked_fill(scores.isneginf(), 0)


@constant_when_compiled  # torch.compile does not trace a GPTConfig
def _constant(normalizer: str, name: str, keys: int) -> float:
    """What the constant is by default for a context of so many tokens."""
    return NORMALIZERS[normalizer].constants[name](GPTConfig(block_size=max(keys, 1)))


def _prepared(normalizer: str, q: Tensor, keys: int, null_logit, parameters: dict) -> tuple[Tensor, Any, dict]:
    """q as it enters the scores; each head's null logit (H,), or None; what is left of parameters and constants."""
    entry = NORMALIZERS[normalizer]
    for name in (name for name in entry.constants if name not in parameters):
        parameters = parameters | {name: _constant(normalizer, name, keys)}
    if entry.queries:
        return entry.queries(q, keys, **parameters), None, {}
    own = parameters.pop("null_logit", None) if isinstance(entry.null_logit, str) else entry.null_logit
    null_logit = own if null_logit is None else null_logit
    if null_logit is None:
        return q, None, parameters
    if not torch.is_tensor(null_logit):
        null_logit = q.new_full((q.size(1),), null_logit, dtype=torch.promote_types(q.dtype, torch.float32))
    # For ±∞, of which the kernels would compute ∞ − ∞, a number beyond all scores: P, and so each result, is the same.
    return q, null_logit.to(torch.promote_types(null_logit.dtype, torch.float32)).clamp(-1e30, 1e30), parameters


def _materialized(q, k, v, entry: Normalizer, arguments, backward: Backward, dropout_p: float, scale: float) -> Tensor:
    """`P V` for the weights P (B, H, T_q, T_k) of `attention_rows` after dropout; `backward` chooses the gradient.

    A row's Jacobian, for a softmax `∂P/∂S = diag(P) − P Pᵀ`, has a local part on its diagonal, for a softmax
    `P(1 − P)`, and a lateral part off the diagonal.
    """
    scores, v = attention_scores(q, k, scale), repeat_heads(v, q.size(1))
    if backward == "full":
        return F.dropout(_weights(entry, scores, arguments), dropout_p).to(v.dtype) @ v
    kept = F.dropout(torch.ones_like(scores), dropout_p) if dropout_p else 1
    arguments, constants = ({k: x for k, x in arguments.items() if torch.is_tensor(x) is y} for y in (True, False))

    def weights_and_slope(scores: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(arguments, parameters, strict=True))
        weights, hidden = _weights(entry, scores, named | constants), scores.isneginf()
        if backward == "ste":  # which goes straight through the dropout too
            return weights * kept, (~hidden).to(scores.dtype)
        slope = getattr(entry, backward)(scores, weights, **named, **constants)
        return weights * kept, slope.masked_fill(hidden, 0) * kept

    weights, slope = weights_and_slope(scores.detach(), *arguments.values())
    return SlopedProduct.apply(scores, v, weights, slope.detach(), weights_and_slope, *arguments.values())


def _check_backward(backward: str, normalizer: str) -> None:
    entry = find_normalizer(normalizer)
    if backward not in get_args(Backward):
        raise ValueError(f"unknown backward {backward!r}: choose from {', '.join(get_args(Backward))}")
    if backward in ("diagonal", "detached") and getattr(entry, backward) is None:
        raise ValueError(f"normalizer {normalizer!r} has no backward {backward!r}: its entry does not say it")


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError where it makes no sense.

    A field's metadata tells the rest of the project how to treat it: `choices` is the table whose names are the values;
    `free`, weights trained with one value may go on with another; `in_weights`, their names and shapes tell the value;
    `forward` False, evaluation does not depend on it; `constant`, it matters to one normalizer alone.
    """

    block_size: int = field(default=1024, metadata={"in_weights": True})
    """longest context, in tokens"""
    vocab_size: int = field(default=50304, metadata={"in_weights": True})
    """token ids; GPT-2's 50257 padded to a multiple of 64 is faster"""
    n_layer: int = field(default=12, metadata={"in_weights": True})
    """transformer blocks"""
    n_head: int = 12
    """attention heads a block"""
    n_kv_head: int | None = field(default=None, metadata={"in_weights": True})
    """heads of keys and values, each read by n_head / n_kv_head heads of queries (grouped queries); null: n_head"""
    n_embd: int = field(default=768, metadata={"in_weights": True})
    """width of the residual stream; a multiple of n_head, unless head_dim is given"""
    head_dim: int | None = field(default=None, metadata={"in_weights": True})
    """width of a head; null: n_embd / n_head"""
    n_inner: int | None = field(default=None, metadata={"in_weights": True})
    """width of the MLP's hidden layer; null: 4 n_embd, or for swiglu 8/3 n_embd, rounded up to a multiple of 64"""
    dropout: float = field(default=0.0, metadata={"free": True, "forward": False})
    """dropout of embeddings, attention weights and residual branches"""
    bias: bool = field(default=True, metadata={"in_weights": True})
    """biases in linear layers and layer norms, as GPT-2; without is a bit faster"""
    qkv_bias: bool | None = field(default=None, metadata={"in_weights": True})
    """biases of queries, keys and values; null: as bias"""
    tie_embeddings: bool = field(default=True, metadata={"in_weights": True})
    """whether the output layer's weights are the token embedding's"""
    position: Literal["learned", "rope"] = "learned"
    """learned: an embedding of the position is added to the token's; rope: queries and keys are rotated by it"""
    rope_theta: float = 10000.0
    """rope: the pairs of channels turn once in 2π tokens, the first, to nearly 2π rope_theta, the last"""
    rope_fraction: float = 1.0
    """rope: the share of a head's channels that is rotated, from the first on"""
    rope_scaling: float = 1.0
    """rope: the factor by which long wavelengths are stretched, as in Llama 3.1; 1: none is"""
    rope_original_context: int = 8192
    """rope: with rope_scaling, wavelengths above so many tokens are stretched, below a quarter not, between in part"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """layernorm, or rmsnorm, which does not subtract the mean and has no bias"""
    norm_eps: float = 1e-5
    """added to the variance, or to the mean square, of a norm"""
    qk_norm: bool = field(default=False, metadata={"in_weights": True})
    """an RMSNorm of each head's queries and keys, before the rotation"""
    parallel_residual: bool = False
    """attention and MLP both read the block's input, as in GPT-NeoX; otherwise the MLP reads the attention's result"""
    mlp: Literal["gelu", "swiglu"] = field(default="gelu", metadata={"in_weights": True})
    """gelu: c_proj(gelu(c_fc(x))); swiglu: c_proj(silu(c_gate(x)) · c_fc(x))"""
    normalizer: str = field(default="softmax", metadata={"free": True, "choices": NORMALIZERS})
    """how scores become attention weights; softmax1 may attend to nothing, sink learns how readily, kvbias to what"""
    softmax_n: float = field(default=1.0, metadata={"free": True, "constant": True})
    """normalizer softmax_n: n in exp(x_i) / (n + Σ exp(x_j)); 0 is softmax, 1 softmax1"""
    sink_init: float = field(default=0.0, metadata={"free": True, "forward": False})
    """normalizer sink: its logit at the start; 0 is softmax1, far below every score, as −20, softmax"""
    ssmax_init: float | None = field(default=None, metadata={"free": True, "forward": False})
    """normalizer ssmax: s at the start, in queries times s·log(keys seen); null: 1 / log(block_size)"""
    clipped_alpha: float = field(default=4.0, metadata={"free": True, "constant": True})
    """normalizer clipped: α in clip((1 − γ) softmax + γ, 0, 1), γ = −α / T; 0 is softmax"""
    clipped_by: Literal["context", "row"] = field(default="context", metadata={"free": True, "constant": True})
    """normalizer clipped: T is the context, block_size, or for each row the number of keys that it sees"""
    sigmoid_bias: float | None = field(default=None, metadata={"free": True, "constant": True})
    """normalizer sigmoid: b in σ(score + b); null: −log(block_size)"""
    backward: Backward = field(default="full", metadata={"free": True, "forward": False})
    """what flows back through the normalizer: its whole Jacobian, the diagonal, or straight through"""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """of mlp gelu: gelu_tanh is GPT-2's own; gelu is the exact form of nanoGPT's models"""
    gate: Literal["none", "head", "element"] = field(default="none", metadata={"in_weights": True})
    """σ(W x), x the block's normed input, times what the heads read: one a head or an element (Qiu et al. 2025)"""
    gate_init: float | None = field(default=None, metadata={"forward": False})
    """gate: how far it is open at the start, by a bias (.25: Bondarenko et al. 2023); null: half, W as other weights"""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if int in (f.type, *get_args(f.type)) and value is not None and (isinstance(value, float) or value < 1):
                raise ValueError(f"{f.name} is {value}, but must be an integer and at least 1")
            if get_origin(f.type) is Literal and value not in get_args(f.type):
                raise ValueError(f"unknown {f.name} {value!r}: choose from {', '.join(get_args(f.type))}")
        _check_backward(self.backward, self.normalizer)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head})")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) is not divisible by n_kv_head ({self.n_kv_head})")
        for names, fits, words in (
            ("dropout", lambda x: 0 <= x < 1, "lie in [0, 1)"),
            ("gate_init", lambda x: 0 < x < 1, "lie between 0 and 1"),
            ("sink_init ssmax_init sigmoid_bias", lambda x: abs(x) <= 1e30, "lie in [-1e30, 1e30]"),
            ("softmax_n clipped_alpha", lambda x: 0 <= x < math.inf, "be at least 0 and finite"),
            ("rope_theta rope_fraction rope_scaling norm_eps", lambda x: 0 < x < math.inf, "be positive and finite"),
        ):
            for name in names.split():
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise ValueError(f"{name} is {value}, but must {words}")
        if self.position == "rope" and (self.rotated % 2 or not 2 <= self.rotated <= self.head_size):
            raise ValueError(f"rope_fraction {self.rope_fraction} of {self.head_size} channels is no number of pairs")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotated(self) -> int:
        return int(self.rope_fraction * self.head_size)  # channels of a head

    def resolved(self) -> dict[str, Any]:
        """The fields by name, each null replaced by what it stands for: equal for two configs of the same model."""
        inner = -(-8 * self.n_embd // 192) * 64 if self.mlp == "swiglu" else 4 * self.n_embd
        meant: dict[str, Any] = {"n_kv_head": self.n_head, "head_dim": self.head_size, "qkv_bias": self.bias}
        log_T = math.log(max(self.block_size, 2))
        meant |= {"n_inner": inner, "ssmax_init": 1 / log_T, "sigmoid_bias": -log_T}
        return {f.name: meant.get(f.name) if (v := getattr(self, f.name)) is None else v for f in fields(self)}


class AttentionCore(nn.Module):
    """From queries, keys and values to what the heads read: the one seam at which attention is watched and replaced.

    It has no parameters and no buffers. Its hooks see q (B, H, T_q, D) and k (B, H_kv, T_k, D) as they enter the
    scores, v (B, H_kv, T_k, D) and the output (B, H, T_q, D).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        return attention(q, k, v, **how)


class RMSNorm(nn.RMSNorm):
    """x / √(mean x² + ε) · weight, along the last dimension (Zhang & Sennrich 2019), in the wider type of x and weight:
    autocast gives it half types beside float32 weights. The result has the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype))).to(x.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rotation(config: GPTConfig, start: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), (T, R / 2) each, of the angles by which rope turns the R / 2 pairs of channels at the positions from
    start up to end (Su et al. 2021), long wavelengths stretched as in Llama 3.1; float32 at least."""
    kind: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    frequencies = 1 / config.rope_theta ** (torch.arange(0, config.rotated, 2, **kind) / config.rotated)
    if config.rope_scaling != 1:
        turns = config.rope_original_context * frequencies / (2 * math.pi)
        kept = ((turns - 1) / 3).clamp(0, 1)  # 0 for less than one turn in the original context, 1 for more than four
        frequencies = frequencies * (kept + (1 - kept) / config.rope_scaling)
    angles = torch.outer(torch.arange(start, end, **kind), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of x (…, T, D) with channel i + R / 2, for i < R / 2; those from R on stay as they are."""
    a, b, rest = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_size
        self.normalizer, self.backward_mode = config.normalizer, config.backward
        self.sizes = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]  # of q, k, v
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.resolved()["qkv_bias"])
        self.c_proj = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        gates = {"none": 0, "head": self.n_head, "element": self.sizes[0]}[config.gate]
        self.c_gate = nn.Linear(config.n_embd, gates, config.bias or config.gate_init is not None) if gates else None
        self.resid_dropout = nn.Dropout(config.dropout)
        entry = NORMALIZERS[config.normalizer]
        for name, start in entry.parameters.items():
            setattr(self, name, nn.Parameter(start(config)))
        self.constants = {name: value(config) for name, value in entry.constants.items()}
        self.core = AttentionCore()

    def learned(self) -> dict[str, Tensor]:
        """The normalizer's parameters by name."""
        return {name: getattr(self, name) for name in NORMALIZERS[self.normalizer].parameters}

    def arguments(self) -> dict[str, Any]:
        """The normalizer, its parameters and constants, as `attention` and `attention_rows` take them by keyword beside
        the q, k and v that `core` sees, where what ssmax does to q is done."""
        entry = NORMALIZERS[self.normalizer]
        if entry.queries:
            return {"normalizer": "softmax"}
        values = {"normalizer": self.normalizer} | self.learned() | self.constants
        return {"null_logit" if name == entry.null_logit else name: value for name, value in values.items()}

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache=None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            z.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or H_kv, T, D)
            for z in self.c_attn(x).split(self.sizes, dim=2)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if change := NORMALIZERS[self.normalizer].queries:
            q = change(q, k.size(-2), **self.learned())
        dropout_p = self.dropout if self.training else 0.0
        y = self.core(q, k, v, backward=self.backward_mode, dropout_p=dropout_p, **self.arguments())
        y = y.transpose(1, 2)  # (B, T, H, D)
        if self.c_gate is not None:
            y = y * self.c_gate(x).sigmoid().view(B, T, self.n_head, -1)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, -1)))


class MLP(nn.Module):
    """`c_proj(gelu(c_fc(x)))`, or SwiGLU's `c_proj(silu(c_gate(x)) · c_fc(x))` (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.resolved()["n_inner"]
        self.c_gate = nn.Linear(config.n_embd, width, bias=config.bias) if config.mlp == "swiglu" else None
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gelu(self.c_fc(x)) if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)
        return self.dropout(self.c_proj(hidden))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache=None) -> Tensor:
        attended = x + self.attn(self.ln_1(x), rope, cache)
        return attended + self.mlp(self.ln_2(x if self.parallel_residual else attended))


class GPT(nn.Module):
    transformer: Any  # a ModuleDict, of whose entries a type checker knows nothing

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("attn.c_gate.bias") and (pi := config.gate_init) is not None:
                nn.init.constant_(parameter, math.log(pi / (1 - pi)))
            if name.endswith("c_proj.weight"):  # the residual stream sums 2·n_layer branches: keep its variance (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None, with_logits: bool = True) -> tuple[Any, Any]:
        """idx and targets (B, T) int64 → logits (B, T, V) and the mean loss in nats a target, −1 ignored, or None
        without targets. Not `with_logits`, a head that is a plain layer never has them in memory all at once: None."""
        x = self.features(idx)
        if targets is not None and not with_logits and type(self.lm_head) is nn.Linear:
            return None, linear_cross_entropy(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def features(self, idx: Tensor, cache=None) -> Tensor:
        """The final norm's output (B, T, C). With a cache (harness/generation.py), idx follow the tokens in it."""
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens is longer than block_size, {self.config.block_size}")
        x = self.transformer.wte(idx)
        rope = rotation(self.config, start, end, like=x) if self.config.position == "rope" else None
        if rope is None:
            x = x + self.transformer.wpe.weight[start:end]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, rope, cache)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    def normalizer_parameters(self) -> dict[str, Tensor]:
        """What the attention's normalizer learns, by the name of the parameter."""
        layers = enumerate(self.transformer.h)
        return {f"transformer.h.{i}.attn.{name}": p for i, block in layers for name, p in block.attn.learned().items()}

    def num_parameters(self) -> int:
        """All parameters but the tables in which rows are only looked up, since no matrix product takes them: the
        positions' embedding, and the tokens' where the head does not share it."""
        multiplied = {module.weight for module in self.modules() if isinstance(module, nn.Linear)}
        tables = {module.weight for module in self.modules() if isinstance(module, nn.Embedding)} - multiplied
        return sum(p.numel() for p in self.parameters()) - sum(table.numel() for table in tables)

    def flops_per_token(self) -> int:
        """FLOPs of one forward and backward pass: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B), where N is
        `num_parameters` and C the width of all of a layer's heads together."""
        widths = sum(m.c_proj.in_features for m in self.modules() if isinstance(m, CausalSelfAttention))
        return 6 * self.num_parameters() + 12 * widths * self.config.block_size
