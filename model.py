"""GPT-2 with a pluggable attention, in one file: read it from top to bottom.

- `NORMALIZERS`: how a row of scores becomes attention weights, one entry for each way (softmax; softmax1, which may
  attend to nothing; sink, which learns how readily).
- `attention`: by any of these *normalizers* forward, and one of three *backward* passes (full, diagonal or
  straight-through). The two are chosen independently; the forward pass never depends on the backward.
- `GPT`: pre-LayerNorm, learned positions, tied embeddings. Modules and parameters carry nanoGPT's names, so that its
  checkpoints load.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.backends import attention_backend, use_backend
from kernels.fused import FusedAttention, SlopedProduct
from kernels.loss import cross_entropy, linear_cross_entropy

Backward = Literal["full", "diagonal", "ste"]
Activation = Literal["gelu_tanh", "gelu"]

# --- normalizers: from a row of scores to attention weights ---------------------------------------------------------


def softmax1(x: Tensor, dim: int = -1) -> Tensor:
    """`exp(x_i) / (1 + Σ_j exp(x_j))` along `dim`: a softmax over x and one more logit, 0, whose share is dropped.

    Any shape; integers become the default float type. E. Miller, "Attention Is Off By One" (2023).
    """
    if not x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    if x.numel() == 0:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Subtracting the largest logit keeps exp from overflowing. The null logit, 0, counts among them, hence the clamp.
    shift = wide.detach().amax(dim, keepdim=True).clamp(min=0)
    exp_x = torch.exp(wide - shift)
    return (exp_x / (torch.exp(-shift) + exp_x.sum(dim, keepdim=True))).to(x.dtype)


def softmax_rows(scores: Tensor, null_logit: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A softmax over the keys and, with a `null_logit` (H,), over one slot more, whose value is zero.

    scores (B, H, T_q, T_k) → the keys' weights, of that shape, and the null slot's share (B, H, T_q, 1), or None.
    """
    logsumexp = torch.logsumexp(scores, dim=-1, keepdim=True)
    if null_logit is None:
        return (scores - logsumexp).exp(), None
    null_logit = null_logit.to(scores.dtype).view(-1, 1, 1)
    logsumexp = torch.logaddexp(logsumexp, null_logit)
    return (scores - logsumexp).exp(), (null_logit - logsumexp).exp()


def softmax_weights(scores: Tensor, null_logit: Tensor | None = None) -> Tensor:
    return softmax_rows(scores, null_logit)[0]


def softmax_diagonal(scores: Tensor, weights: Tensor, null_logit: Tensor | None = None) -> Tensor:
    return weights * (1 - weights)


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
    """Where the softmax covers a null slot besides the keys: the slot's logit, or the parameter that holds it."""

    def __post_init__(self):
        if not self.is_softmax and self.null_logit is not None:
            raise ValueError("a null_logit goes with softmax_weights: other weights have no slot for it")
        known = {self.null_logit} if isinstance(self.null_logit, str) else set()
        if self.is_softmax and set(self.parameters) != known:
            raise ValueError("softmax_weights takes no parameter but the one that null_logit names")

    @property
    def is_softmax(self) -> bool:
        """Whether the weights are a softmax over the keys and perhaps a null slot. Only then do the fused kernels apply
        (others run materialized), and only then is a row, with its null slot, a probability distribution."""
        return self.weights is softmax_weights


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Normalizer(softmax_weights, diagonal=softmax_diagonal),
    "softmax1": Normalizer(softmax_weights, diagonal=softmax_diagonal, null_logit=0.0),
    # Each head learns its null slot's logit, as in gpt-oss (OpenAI 2025); it starts as softmax1.
    "sink": Normalizer(
        softmax_weights,
        diagonal=softmax_diagonal,
        null_logit="sink",
        parameters={"sink": lambda config: torch.zeros(config.n_head)},
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
    """Causal attention: q (B, H, T_q, D), k and v (B, H, T_k, D) → (B, H, T_q, D).

    Aligned at the end: query i sees the keys up to i + T_k − T_q, as a key/value cache needs it (T_q ≤ T_k).
    `null_logit` (H,) gives every row one more slot, of that logit and with value zero: −∞ is softmax, 0 softmax1, log n
    softmax_n, ∞ gives zeros; a learned one, "sink", is gpt-oss's (OpenAI 2025). Its gradient is always the full one.
    `backward` chooses dL/dS from P and g = dL/dP: full `P∘(g − Σ P∘g)`, diagonal `P∘(1 − P)∘g`, or ste `g`.
    `normalizer` is an entry of `NORMALIZERS`, and `parameters` are what that entry takes besides a null logit.
    `scale` multiplies q·k, 1/√D by default. The result can be differentiated as often as you like, from the second time
    on in O(T²) memory. Raises ValueError, naming what was given and what is allowed.
    """
    _check_attention_arguments(q, k, v, normalizer, backward, null_logit, dropout_p, scale, parameters)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    entry = NORMALIZERS[normalizer]
    null_logit = _null_logit(entry, null_logit, q)
    stock = backward == "full" and null_logit is None
    # Without queries, or without a batch, PyTorch's kernels would divide by zero.
    backend = attention_backend(q, k, dropout_p, stock, fused=entry.is_softmax) if q.numel() else "materialized"
    if backend != "materialized" and not entry.is_softmax:
        raise ValueError(f"backend {backend!r} has no normalizer {normalizer!r}, which runs materialized")
    if backend == "stock" and not stock:
        raise ValueError(f"backend 'stock' has neither a null_logit nor a backward {backward!r}")
    if backend.startswith("cpu") and dropout_p:
        raise ValueError(f"backend {backend!r} has no dropout, and dropout_p is {dropout_p}")
    if backend == "materialized":
        arguments = parameters if null_logit is None else {"null_logit": null_logit}
        return _materialized(q, k, v, entry, arguments, backward, dropout_p, scale)
    # The fused kernels let query i see the keys up to i, whatever T_q and T_k: rows of zeros in front of q give each
    # query the number of its own key. CUDA's kernels also want D in multiples of 8.
    D, rows, columns = q.size(-1), k.size(-2) - q.size(-2), -q.size(-1) % 8 if backend.startswith("cuda") else 0
    if rows or columns:
        q, k, v = F.pad(q, (0, columns, rows, 0)), F.pad(k, (0, columns)), F.pad(v, (0, columns))
    if backend == "stock":
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    else:
        out = FusedAttention.apply(q, k, v, null_logit, backward, dropout_p, scale, backend)
    return out[:, :, rows:, :D] if rows or columns else out


# --- the readable form: reference, fallback and oracle ----------------------------------------------------------------


def materialized_attention():
    """Within this context `attention` takes the readable form everywhere."""
    return use_backend("materialized")


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

    q (B, H, T_q, D), k (B, H, T_k, D) → P (B, H, T_q, T_k), at least float32, and the null slot's share of each row
    (B, H, T_q, 1), None where there is no such slot. Aligned at the end as in `attention`, so that a block of queries
    needs only the keys up to the block's last query. ValueError for an unknown normalizer.
    """
    entry = find_normalizer(normalizer)
    scores = attention_scores(q, k, q.size(-1) ** -0.5 if scale is None else scale)
    if entry.is_softmax:
        return softmax_rows(scores, _null_logit(entry, null_logit, q))
    return _weights(entry, scores, parameters), None


def attention_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`scale·q kᵀ`, −∞ where a query does not see a key: (B, H, T_q, T_k), at least float32."""
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
    scores = attention_scores(q, k, scale)
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


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_backward(backward: str, normalizer: str) -> None:
    if backward not in get_args(Backward):
        raise ValueError(f"unknown backward {backward!r}: choose from {', '.join(get_args(Backward))}")
    if backward == "diagonal" and find_normalizer(normalizer).diagonal is None:
        raise ValueError(f"normalizer {normalizer!r} has no backward 'diagonal': its entry does not say the diagonal")


def _check_attention_arguments(q, k, v, normalizer, backward, null_logit, dropout_p, scale, parameters) -> None:
    entry = find_normalizer(normalizer)
    _check_backward(backward, normalizer)
    if set(parameters) != (wanted := set(entry.parameters) - {entry.null_logit}):
        what = f"takes the parameters {', '.join(sorted(wanted))}" if wanted else "takes no parameters"
        raise ValueError(f"normalizer {normalizer!r} {what}, and not {', '.join(sorted(parameters)) or 'none'}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but must be positive and finite (the kernels' masks need it)")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but must lie in [0, 1)")
    tensors = {"q": q, "k": k, "v": v} | ({} if null_logit is None else {"null_logit": null_logit}) | parameters
    for name, x in tensors.items():
        if not (torch.is_tensor(x) and x.dtype in FLOATS):
            given = f"a tensor of {x.dtype}" if torch.is_tensor(x) else f"a {type(x).__name__}"
            raise ValueError(f"{name} is {given}, but must be a tensor of {', '.join(map(str, FLOATS))}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.size(-1) != k.size(-1) or not q.size(-1):
        raise ValueError(f"{shapes}: need q (B, H, T_q, D) and k, v (B, H, T_k, D), D ≥ 1")
    if q.size(-2) > k.size(-2):
        raise ValueError(f"{shapes}: more queries than keys, and the queries are the last of the keys' positions")
    if null_logit is not None and not entry.is_softmax:
        raise ValueError(f"normalizer {normalizer!r} has no null slot, so a null_logit does not go with it")
    if null_logit is not None and isinstance(entry.null_logit, int | float):
        raise ValueError(f"{normalizer} is the null logit {entry.null_logit:g}: a null_logit goes with sink or softmax")
    if null_logit is None and isinstance(entry.null_logit, str):
        raise ValueError(f"normalizer {normalizer!r} needs its null_logit, one learned logit a head")
    if null_logit is not None and null_logit.shape != (q.size(1),):
        raise ValueError(f"null_logit {tuple(null_logit.shape)}: need one logit a head, ({q.size(1)},)")


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError where it makes no sense.

    A field's metadata tells the rest of the project how to treat it, so that a new field needs no other list:
    `choices` is the table whose names are the values; `free`, weights trained with one value may go on with another;
    `in_weights`, the shapes of the weights tell the value; `forward` False, evaluation does not depend on it.
    """

    block_size: int = field(default=1024, metadata={"in_weights": True})
    """longest context, in tokens"""
    vocab_size: int = field(default=50304, metadata={"in_weights": True})
    """token ids; GPT-2's 50257 padded to a multiple of 64 is faster"""
    n_layer: int = field(default=12, metadata={"in_weights": True})
    """transformer blocks"""
    n_head: int = 12
    """attention heads a block"""
    n_embd: int = field(default=768, metadata={"in_weights": True})
    """width of the residual stream; a multiple of n_head"""
    dropout: float = field(default=0.0, metadata={"free": True, "forward": False})
    """dropout of embeddings, attention weights and residual branches"""
    bias: bool = field(default=True, metadata={"in_weights": True})
    """biases in linear layers and layer norms, as GPT-2; without is a bit faster"""
    normalizer: str = field(default="softmax", metadata={"free": True, "choices": NORMALIZERS})
    """how scores become attention weights; softmax1 may attend to nothing, sink learns how readily"""
    backward: Backward = field(default="full", metadata={"free": True, "forward": False})
    """what flows back through the normalizer: its whole Jacobian, the diagonal, or straight through"""
    activation: Activation = "gelu_tanh"
    """gelu_tanh is GPT-2's own; gelu is the exact form of nanoGPT's models"""

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if (value := getattr(self, name)) is not None and (isinstance(value, float) or value < 1):
                raise ValueError(f"{name} is {value}, but must be an integer and at least 1")
        find_normalizer(self.normalizer)
        _check_backward(self.backward, self.normalizer)
        if self.activation not in get_args(Activation):
            raise ValueError(f"unknown activation {self.activation!r}: choose from {', '.join(get_args(Activation))}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must lie in [0, 1)")


class KVCache:
    """The keys and values of the tokens seen so far, for every layer: (n_layer, B, H, block_size, D) each."""

    def __init__(self, config: GPTConfig, batch_size: int, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0  # tokens held so far; the model counts new ones once every layer has appended them

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens (B, H, T, D); return those of all tokens so far."""
        end = self.length + k.size(-2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class AttentionCore(nn.Module):
    """From queries, keys and values to what the heads read: the one seam at which attention is watched and replaced.

    It has no parameters and no buffers. Its hooks see q (B, H, T_q, D) and k (B, H, T_k, D) as they enter the scores,
    v (B, H, T_k, D) and the output (B, H, T_q, D).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        return attention(q, k, v, **how)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.normalizer, self.backward_mode = config.normalizer, config.backward
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        for name, start in NORMALIZERS[config.normalizer].parameters.items():
            setattr(self, name, nn.Parameter(start(config)))
        self.core = AttentionCore()

    def arguments(self) -> dict[str, Any]:
        """The normalizer's name and its parameters, as `attention` and `attention_rows` take them, by keyword."""
        entry = NORMALIZERS[self.normalizer]
        names = {name: "null_logit" if name == entry.null_logit else name for name in entry.parameters}
        return {"normalizer": self.normalizer} | {taken: getattr(self, name) for name, taken in names.items()}

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for z in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout_p = self.dropout if self.training else 0.0
        y = self.core(q, k, v, backward=self.backward_mode, dropout_p=dropout_p, **self.arguments())
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    transformer: Any  # a ModuleDict, of whose entries a type checker knows nothing

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        }
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

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
        without targets. Not `with_logits`: None and the loss, and the logits are never in memory all at once."""
        x = self.features(idx)
        if targets is not None and not with_logits:
            return None, linear_cross_entropy(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def features(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final layer norm's output (B, T, C). With a cache, idx are the tokens that follow those in the cache."""
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens is longer than block_size, {self.config.block_size}")
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[start:end])
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, *, stop_token: int | None = None, use_cache: bool = True, **sampling
    ) -> Iterator[Tensor]:
        """Continue idx (B, T), yielding the next tokens (B, 1) one step at a time, at most `max_new_tokens` of them.

        `sampling` goes to `sample`: temperature, top_k, top_p, generator. A row that drew `stop_token` repeats it; when
        all have, generation ends. Beyond block_size the context is the last block_size tokens: the position of each
        changes with every step then, so that the cache is of no use and a token costs a whole forward pass.
        """
        block_size, device = self.config.block_size, idx.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.lm_head.weight.dtype
        cache = KVCache(self.config, idx.size(0), device, dtype) if use_cache else None
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            if cache is not None and idx.size(1) <= block_size:
                x = self.features(idx[:, cache.length :], cache)
            else:
                x = self.features(idx[:, -block_size:])
            token = sample(self.lm_head(x[:, -1]).float(), **sampling)
            if stop_token is not None:
                token = torch.where(stopped, stop_token, token)
                stopped |= token == stop_token
            yield token
            if stop_token is not None and stopped.all():
                return
            idx = torch.cat((idx, token), dim=1)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For the optimizer: matrices and embeddings decay; biases and layer norms (one dimension) do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

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

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, dropping the later positions. ValueError if it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
        self.transformer.wpe.num_embeddings = block_size


def sample(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw one token a row from logits (B, V) → (B, 1). Temperature 0 takes the likeliest token; `top_k` (an int) keeps
    the k likeliest, `top_p` (a float) the fewest that together hold that probability."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # at most 0: nothing overflows to +∞
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        p, order = F.softmax(logits, dim=-1).sort(descending=True)
        outside = p.cumsum(-1) - p >= max(top_p, 1e-30)  # the likelier tokens already hold top_p; never the likeliest
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
