"""GPT-2 with a pluggable attention, in one file: read it from top to bottom.

- `NORMALIZERS`: how a row of scores becomes attention weights, one entry for each way (softmax; softmax1, which may
  attend to nothing; sink, which learns how readily; kvbias, which learns to what).
- `attention`: by any of these *normalizers* forward, and one of three *backward* passes (full, diagonal or
  straight-through). The two are chosen independently; the forward pass never depends on the backward.
- `GPT`: GPT-2 by default; grouped queries, rotary positions, RMSNorm, SwiGLU and what else today's models have by the
  fields of `GPTConfig`, each independent of the others. Modules and parameters carry nanoGPT's names, so that its
  checkpoints load.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.backends import attention_backend, check_inputs, check_parameters
from kernels.fused import SlopedProduct, fused_attention, repeat_heads
from kernels.loss import cross_entropy, linear_cross_entropy
from kernels.normalizers import softmax1, softmax_diagonal, softmax_rows, softmax_weights  # noqa: F401

Backward = Literal["full", "diagonal", "ste"]
Activation = Literal["gelu_tanh", "gelu"]
Position = Literal["learned", "rope"]
Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "swiglu"]

# --- normalizers: from a row of scores to attention weights ---------------------------------------------------------


@dataclass(frozen=True)
class Normalizer:
    """One way from scores to attention weights. An entry of `NORMALIZERS` is all that a new one takes: the config, the
    model, training and the diagnostics read that table."""

    weights: Callable[..., Tensor]
    """The definition: scores (B, H, T_q, T_k), float32 at least and −∞ where a key is not visible, and the parameters
    by name → the weights, of that shape, each row from its own scores alone. Keys that are not visible get 0 anyway."""
    parameters: dict[str, Callable[["GPTConfig"], Tensor]] = field(default_factory=dict)
    """What an attention module learns for it: name → its start value."""
    diagonal: Callable[..., Tensor] | None = None
    """(scores, weights, parameters) → ∂weights_ij/∂scores_ij. Without it the backward "diagonal" is refused."""
    null_logit: float | str | None = None
    """Where the softmax covers a null slot besides the keys: the slot's logit, or the parameter that holds it. A slot
    with a key and a value of its own has the parameters null_key and null_value, (H_kv, D) each, instead."""

    def __post_init__(self):
        if not self.is_softmax and self.null_logit is not None:
            raise ValueError("a null_logit goes with softmax_weights: other weights have no slot for it")
        known = {self.null_logit} if isinstance(self.null_logit, str) else set()
        if self.is_softmax and set(self.parameters) not in (known, known or {"null_key", "null_value"}):
            raise ValueError("softmax_weights takes no parameters but its null_logit, or null_key and null_value")

    @property
    def is_softmax(self) -> bool:
        """Whether the weights are a softmax over the keys and perhaps a null slot. Only then do the fused kernels apply
        (others run materialized), and only then is a row, with its null slot, a probability distribution."""
        return self.weights is softmax_weights


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Normalizer(softmax_weights, diagonal=softmax_diagonal),
    "softmax1": Normalizer(softmax_weights, diagonal=softmax_diagonal, null_logit=0.0),
    # Each head learns its null slot's logit, as in gpt-oss (OpenAI 2025).
    "sink": Normalizer(
        softmax_weights,
        diagonal=softmax_diagonal,
        null_logit="sink",
        parameters={"sink": lambda config: torch.full((config.n_head,), config.sink_init)},
    ),
    # A key and a value that belong to no token, in front of all others (Gu et al. 2024). It starts as softmax1.
    "kvbias": Normalizer(
        softmax_weights,
        diagonal=softmax_diagonal,
        parameters=dict.fromkeys(("null_key", "null_value"), lambda c: torch.zeros(c.kv_heads, c.head_size)),
    ),
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
    null_logit: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    **parameters: Tensor,
) -> Tensor:
    """Causal attention: q (B, H, T_q, D), k and v (B, H_kv, T_k, D) → (B, H, T_q, D). Query head h reads the keys of
    head h // (H / H_kv): grouped queries (Ainslie et al. 2023).

    Aligned at the end: query i sees the keys up to i + T_k − T_q, as a key/value cache needs it (T_q ≤ T_k).
    `null_logit` (H,) gives every row one more slot, of that logit and with value zero: −∞ is softmax, 0 softmax1, log n
    softmax_n, ∞ gives zeros; a learned one, "sink", is gpt-oss's (OpenAI 2025). Its gradient is always the full one.
    `backward` chooses dL/dS from P and g = dL/dP: full `P∘(g − Σ P∘g)`, diagonal `P∘(1 − P)∘g`, or ste `g`.
    `normalizer` is an entry of `NORMALIZERS`, and `parameters` are what that entry takes besides a null logit: kvbias
    null_key and null_value (H_kv, D), a key and a value in front of all others, with the gradients of any other.
    `scale` multiplies q·k, 1/√D by default. The result can be differentiated as often as you like, from the second time
    on in O(T²) memory. Raises ValueError, naming what was given and what is allowed.
    """
    entry = find_normalizer(normalizer)
    _check_backward(backward, normalizer)
    check_parameters(entry, normalizer, null_logit, parameters)
    check_inputs(q, k, v, null_logit, dropout_p, scale, parameters)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    null_logit = _null_logit(entry, null_logit, q)
    if "null_key" in parameters:
        k, v, parameters = in_front(parameters["null_key"], k), in_front(parameters["null_value"], v), {}
    stock = backward == "full" and null_logit is None
    # Without queries, or without a batch, PyTorch's kernels would divide by zero.
    backend = attention_backend(q, k, dropout_p, stock, fused=entry.is_softmax) if q.numel() else "materialized"
    if backend != "materialized" and not entry.is_softmax:
        raise ValueError(f"backend {backend!r} has no normalizer {normalizer!r}, which runs materialized")
    if backend == "materialized":
        arguments = parameters if null_logit is None else {"null_logit": null_logit}
        return _materialized(q, k, v, entry, arguments, backward, dropout_p, scale)
    return fused_attention(q, k, v, null_logit, backward, dropout_p, scale, backend)


# --- the readable form: reference, fallback and oracle ----------------------------------------------------------------


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    normalizer: str = "softmax",
    null_logit: Tensor | None = None,
    scale: float | None = None,
    **parameters: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The attention weights P by any normalizer. Whatever looks at attention weights takes them from here.

    q (B, H, T_q, D), k (B, H_kv, T_k, D) → P (B, H, T_q, T_k), at least float32, and the null slot's share of each row
    (B, H, T_q, 1), None where there is no such slot. Aligned at the end as in `attention`, so that a block of queries
    needs only the keys up to the block's last query. ValueError for an unknown normalizer.
    """
    entry, has_key = find_normalizer(normalizer), "null_key" in parameters
    k = in_front(parameters["null_key"], k) if has_key else k
    scores = attention_scores(q, k, q.size(-1) ** -0.5 if scale is None else scale)
    if not entry.is_softmax:
        return _weights(entry, scores, parameters), None
    P, null = softmax_rows(scores, _null_logit(entry, null_logit, q))
    return (P[..., 1:], P[..., :1]) if has_key else (P, null)


def in_front(null: Tensor, x: Tensor) -> Tensor:
    """The null slot's key, or its value, (H_kv, D), in front of those of the tokens, x (B, H_kv, T, D)."""
    return torch.cat((null[None, :, None].expand(len(x), -1, -1, -1).to(x.dtype), x), dim=2)


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


def _null_logit(entry: Normalizer, given: Tensor | None, q: Tensor) -> Tensor | None:
    """The logit of each head's null slot (H,): the one given, or the entry's own number; None without such a slot. For
    ±∞, of which the kernels would compute ∞ − ∞, a number beyond all scores: P, and so each result, is the same."""
    if isinstance(entry.null_logit, int | float):
        finite, dtype = min(max(entry.null_logit, -1e30), 1e30), torch.promote_types(q.dtype, torch.float32)
        return torch.full((q.size(1),), finite, dtype=dtype, device=q.device)
    return None if given is None else given.to(torch.promote_types(given.dtype, torch.float32)).clamp(-1e30, 1e30)


def _materialized(q, k, v, entry: Normalizer, arguments, backward: Backward, dropout_p: float, scale: float) -> Tensor:
    """`P V` for the weights P (B, H, T_q, T_k) of `attention_rows` after dropout; `backward` chooses the gradient.

    A row's Jacobian, for a softmax `∂P/∂S = diag(P) − P Pᵀ`, has a local part on its diagonal, for a softmax
    `P(1 − P)`, and a lateral part off the diagonal.
    """
    scores, v = attention_scores(q, k, scale), repeat_heads(v, q.size(1))
    if backward == "full":
        return F.dropout(_weights(entry, scores, arguments), dropout_p).to(v.dtype) @ v
    kept = F.dropout(torch.ones_like(scores), dropout_p) if dropout_p else 1

    def weights_and_slope(scores: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(arguments, parameters, strict=True))
        weights, hidden = _weights(entry, scores, named), scores.isneginf()
        if backward == "ste":  # which goes straight through the dropout too
            return weights * kept, (~hidden).to(scores.dtype)
        assert entry.diagonal is not None  # _check_backward has refused it otherwise
        return weights * kept, entry.diagonal(scores, weights, **named).masked_fill(hidden, 0) * kept

    weights, slope = weights_and_slope(scores.detach(), *arguments.values())
    return SlopedProduct.apply(scores, v, weights, slope.detach(), weights_and_slope, *arguments.values())


def _check_backward(backward: str, normalizer: str) -> None:
    if backward not in get_args(Backward):
        raise ValueError(f"unknown backward {backward!r}: choose from {', '.join(get_args(Backward))}")
    if find_normalizer(normalizer).diagonal is None and backward == "diagonal":
        raise ValueError(f"normalizer {normalizer!r} has no backward 'diagonal': its entry does not say the diagonal")


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError where it makes no sense.

    A field's metadata tells the rest of the project how to treat it, so that a new field needs no other list:
    `choices` is the table whose names are the values; `free`, weights trained with one value may go on with another;
    `in_weights`, the weights' names and shapes tell the value; `forward` False, evaluation does not depend on it.
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
    position: Position = "learned"
    """learned: an embedding of the position is added to the token's; rope: queries and keys are rotated by it"""
    rope_theta: float = 10000.0
    """rope: the pairs of channels turn once in 2π tokens, the first, to nearly 2π rope_theta, the last"""
    rope_fraction: float = 1.0
    """rope: the share of a head's channels that is rotated, from the first on"""
    rope_scaling: float = 1.0
    """rope: the factor by which long wavelengths are stretched, as in Llama 3.1; 1: none is"""
    rope_original_context: int = 8192
    """rope: with rope_scaling, wavelengths above so many tokens are stretched, below a quarter not, between in part"""
    norm: Norm = "layernorm"
    """layernorm, or rmsnorm, which does not subtract the mean and has no bias"""
    norm_eps: float = 1e-5
    """added to the variance, or to the mean square, of a norm"""
    qk_norm: bool = field(default=False, metadata={"in_weights": True})
    """an RMSNorm of each head's queries and keys, before the rotation"""
    parallel_residual: bool = False
    """attention and MLP both read the block's input, as in GPT-NeoX; otherwise the MLP reads the attention's result"""
    mlp: Mlp = field(default="gelu", metadata={"in_weights": True})
    """gelu: c_proj(gelu(c_fc(x))); swiglu: c_proj(silu(c_gate(x)) · c_fc(x))"""
    normalizer: str = field(default="softmax", metadata={"free": True, "choices": NORMALIZERS})
    """how scores become attention weights; softmax1 may attend to nothing, sink learns how readily, kvbias to what"""
    sink_init: float = field(default=0.0, metadata={"free": True, "forward": False})
    """normalizer sink: its logit at the start; 0 is softmax1, far below every score, as −20, softmax"""
    backward: Backward = field(default="full", metadata={"free": True, "forward": False})
    """what flows back through the normalizer: its whole Jacobian, the diagonal, or straight through"""
    activation: Activation = "gelu_tanh"
    """of mlp gelu: gelu_tanh is GPT-2's own; gelu is the exact form of nanoGPT's models"""

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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must lie in [0, 1)")
        if not abs(self.sink_init) <= 1e30:  # `_null_logit` takes no larger one, and float32 hardly
            raise ValueError(f"sink_init is {self.sink_init}, but must lie in [-1e30, 1e30]")
        for name in ("rope_theta", "rope_fraction", "rope_scaling", "norm_eps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}, but must be positive and finite")
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
        meant = {"n_kv_head": self.n_head, "head_dim": self.head_size, "n_inner": inner, "qkv_bias": self.bias}
        return {f.name: meant[f.name] if (v := getattr(self, f.name)) is None else v for f in fields(self)}


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
        self.resid_dropout = nn.Dropout(config.dropout)
        for name, start in NORMALIZERS[config.normalizer].parameters.items():
            setattr(self, name, nn.Parameter(start(config)))
        self.core = AttentionCore()

    def arguments(self) -> dict[str, Any]:
        """The normalizer's name and its parameters, as `attention` and `attention_rows` take them, by keyword."""
        entry = NORMALIZERS[self.normalizer]
        names = {name: "null_logit" if name == entry.null_logit else name for name in entry.parameters}
        return {"normalizer": self.normalizer} | {taken: getattr(self, name) for name, taken in names.items()}

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
        dropout_p = self.dropout if self.training else 0.0
        y = self.core(q, k, v, backward=self.backward_mode, dropout_p=dropout_p, **self.arguments())
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


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
            if name.endswith("c_proj.weight"):  # the residual stream sums 2·n_layer branches: keep its variance (GPT-2)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None, with_logits: bool = True) -> tuple[Any, Any]:
        """idx and targets (B, T) int64 → logits (B, T, V) and the mean loss in nats a target, −1 ignored, or None
        without targets. Not `with_logits`: None and the loss, and the logits are never in memory all at once, unless
        the head is a layer with a backward of its own (measure/feedback.py)."""
        x = self.features(idx)
        if targets is not None and not with_logits and type(self.lm_head) is nn.Linear:
            return None, linear_cross_entropy(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)
        loss = None if targets is None else cross_entropy(logits, targets)
        return logits if with_logits or loss is None else None, loss

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
        names, layers = NORMALIZERS[self.config.normalizer].parameters, enumerate(self.transformer.h)
        return {f"transformer.h.{i}.attn.{name}": getattr(block.attn, name) for i, block in layers for name in names}

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
