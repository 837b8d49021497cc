"""What flows through a model, in one streaming pass: moments by element, token, channel and sequence; heads that sink.

Each tensor is read once, while the forward pass has it at hand, and nothing of its size is kept: memory is that of a
few numbers a channel and a sequence.
"""

import math
from collections.abc import Collection
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from measure.moments import CHUNK_ACCELERATOR, Moments, RowMoments, float64
from measure.probe import TENSORS, kind_of, watch
from model import GPT, attention_rows, attention_scores, find_normalizer, repeat_heads

OUTLIER_RMS = 6.0
"""A channel is an outlier where its root mean square exceeds this many times the median channel's (of an even
number the lower one's, as of all medians here)."""
SINK = 0.3
"""A head sinks in a sequence where the first key's mean attention exceeds this (Gu et al. 2024)."""
DORMANT = 0.9
"""A head is dormant at a query that gives the first key more than this (Guo et al. 2024)."""
EARLY = 8
"""So many queries of a sequence are early. They see so few keys that their weights are large whatever the head attends
to, unless a null slot takes them: where attention is even, the first 8 queries hold 99 % of all Σ_ij P_ij⁴."""
QUERIES = 64
"""So many rows of a layer's T × T attention are in memory at once."""


class Activations:
    """Statistics of the attention and of everything on the way through `model`, over all the batches given to `update`;
    with `kinds`, keys of TENSORS, of these tensors alone. `triggers`, token ids, are queries apart from the others."""

    def __init__(self, model: GPT, kinds: Collection[str] = tuple(TENSORS), triggers: Collection[int] = ()):
        self.model, self.kinds, self.triggers = model, kinds, torch.tensor(list(triggers), dtype=torch.long)
        self.tensors: dict[str, TensorStatistics] = {}
        self.attention: dict[int, AttentionStatistics] = {}

    @torch.no_grad()
    def update(self, idx: Tensor) -> "Activations":
        """Run the model on idx (B, T) int64, watching; all batches must have the same T."""
        self._is_trigger = torch.isin(idx, self.triggers.to(idx.device)) if len(self.triggers) else None
        with watch(self.model, self._see_tensor, self._see_attention):
            self.model(idx)
        return self

    def _see_tensor(self, name: str, x: Tensor) -> None:
        if kind_of(name) in self.kinds:
            self.tensors.setdefault(name, TensorStatistics()).update(x)

    def _see_attention(self, layer: int, attn, q: Tensor, k: Tensor, v: Tensor) -> None:
        statistics = self.attention.setdefault(layer, AttentionStatistics())
        statistics.update(q, k, v, is_trigger=self._is_trigger, **attn.arguments())


class TensorStatistics:
    """Statistics of one tensor (B, T, C): of `all` its tokens, of the `first` of each sequence, and of the `others`."""

    def __init__(self):
        self.all, self.first, self.others = TokenStatistics(), TokenStatistics(), TokenStatistics()

    @torch.no_grad()
    def update(self, x: Tensor) -> "TensorStatistics":
        tokens, first, others = _read(x)
        self.first.update(RowMoments(*(field[:, :1] for field in tokens)), first)
        if x.size(1) > 1:
            self.others.update(RowMoments(*(field[:, 1:] for field in tokens)), others)
        self.all.update(tokens, first + others)
        return self

    @property
    def first_norm_ratio(self) -> float | None:
        """‖x₀‖ of the first token over ‖x_j‖ of the others, each averaged over the sequences (Guo et al. 2024): of a
        block's output the residual peak, of the values the value drain."""
        first, others = self.first.mean_norm, self.others.mean_norm
        return first / others if first is not None and others else None


class SequenceStatistics:
    """Statistics of all elements together, and of each sequence by itself. A statistic that does not exist is None, and
    so is every one but `moments` where a number is NaN or infinite."""

    def __init__(self):
        self.moments = Moments()
        self._kurtosis: list[float] = []
        self._max_abs: list[float] = []

    def add_sequences(self, sequences: RowMoments) -> None:
        """sequences (B,), each the moments of all elements of one."""
        self.moments.merge(sequences.moments())
        self._kurtosis += (sequences.excess_kurtosis + 3).tolist()
        self._max_abs += sequences.max_abs.tolist()

    @property
    def per_sequence_kurtosis(self) -> float | None:
        """Of the elements of a sequence, averaged over the sequences: *not* excess, a Gaussian gives 3 (Bondarenko et
        al. 2023; they add 1e-6 to σ⁴, which swamps small activations, and take σ² over n − 1)."""
        return self._mean(self._kurtosis)

    @property
    def per_sequence_max_abs(self) -> float | None:
        """The infinity norm of a sequence, averaged over the sequences (Bondarenko et al. 2023)."""
        return self._mean(self._max_abs)

    def _mean(self, values: list[float]) -> float | None:
        mean = math.fsum(values) / len(values) if values and not self.moments.nonfinite else math.nan
        return mean if math.isfinite(mean) else None

    def row(self) -> dict:
        names = ("per_sequence_kurtosis", "per_sequence_max_abs")
        return self.moments.row() | {name: getattr(self, name) for name in names}


class TokenStatistics(SequenceStatistics):
    """Statistics of some tokens of a tensor: those above, of each token, and of each channel over all these tokens."""

    def __init__(self):
        super().__init__()
        self._tokens, self._squares = 0, torch.zeros(())
        self._token_kurtosis, self._token_count, self._norms = 0.0, 0, 0.0

    def update(self, tokens: RowMoments, squares: Tensor) -> None:
        """tokens (B, T), each the moments over the channels of one; squares (C,), summed over all of them."""
        self.add_sequences(tokens.pooled())
        self._tokens += tokens.count.numel()
        self._squares = self._squares.to(squares.device) + squares
        self._norms += (tokens.m2 + tokens.count * tokens.mean.square()).sqrt().sum().item()
        kurtosis = tokens.excess_kurtosis
        self._token_kurtosis += kurtosis.nansum().item()
        self._token_count += int((~kurtosis.isnan()).sum())

    @property
    def per_token_kurtosis(self) -> float | None:
        """Excess, over the channels of each token, averaged over the tokens that vary (Kaul et al. 2025)."""
        exists = self._token_count > 0 and not self.moments.nonfinite
        return self._token_kurtosis / self._token_count if exists else None

    @property
    def mean_norm(self) -> float | None:
        """The Euclidean norm of a token, averaged over the tokens."""
        return self._norms / self._tokens if self._tokens and not self.moments.nonfinite else None

    @property
    def channel_rms(self) -> Tensor | None:
        """The root mean square of each channel (C,), float64."""
        return (self._squares / self._tokens).sqrt() if self._tokens and not self.moments.nonfinite else None

    @property
    def channel_rms_kurtosis(self) -> float | None:
        """E[s⁴]/E[s²]² over the channels' root mean squares s: 1 where all are alike, C where one has everything
        (He et al. 2024)."""
        if self.channel_rms is None or not self._squares.any():
            return None
        return (self._squares / self._squares.mean()).square().mean().item()

    @property
    def outlier_channels(self) -> dict[int, float] | None:
        """Channel → its root mean square over the median channel's, where that exceeds `OUTLIER_RMS`; largest first."""
        if (rms := self.channel_rms) is None:
            return None
        median = rms.median()
        channels = (rms > OUTLIER_RMS * median).nonzero().flatten()
        ratios = zip(channels.tolist(), (rms[channels] / median).tolist(), strict=True)
        return dict(sorted(ratios, key=lambda item: -item[1]))

    def row(self) -> dict:
        outliers = self.outlier_channels
        return super().row() | {
            "mean_norm": self.mean_norm,
            "per_token_kurtosis": self.per_token_kurtosis,
            "channel_rms_kurtosis": self.channel_rms_kurtosis,
            "outlier_channels": None if outliers is None else list(outliers),
        }


def chunk_size(x: Tensor) -> int:
    """How many elements are read at once: enough to be worth some twenty calls; on a CPU, few enough for its cache."""
    return 2**17 if x.device.type == "cpu" else CHUNK_ACCELERATOR


def _read(x: Tensor) -> tuple[RowMoments, Tensor, Tensor]:
    """x (B, T, C) → the moments of each token over its channels (B, T), and each channel's sum of squares (C,) over the
    first tokens and over the others. Computed in float64, a few tokens at a time."""
    B, T, C = x.shape
    step = max(1, chunk_size(x) // C)
    # One piece of memory for all results: small ones left between large short-lived ones would fragment the heap.
    tokens = float64(x.new_zeros(len(RowMoments._fields), B, T))
    squares = float64(x.new_zeros(2, C))
    for b, sequence in enumerate(x):
        for start in range(0, T, step):
            chunk = float64(sequence[start : start + step])
            tokens[:, b, start : start + step] = torch.stack(RowMoments.of(chunk))
            chunk_squares = chunk.square()
            if start == 0:
                squares[0] += chunk_squares[0]
                chunk_squares = chunk_squares[1:]
            squares[1] += chunk_squares.sum(0)
    return RowMoments(*tokens), *squares


class AttentionStatistics:
    """Statistics of one layer's attention probabilities P (B, H, T, T), computed a few rows of a sequence at a time.

    `visible` holds the probabilities on and below the diagonal, `all` the zeros above it too: the quantity that
    quietGPT logs. `late` is `all` without the first `EARLY` queries, whose large weights a null slot takes away by its
    definition. `figures` are those of a head.
    """

    def __init__(self):
        self.all, self.visible, self.late = SequenceStatistics(), SequenceStatistics(), SequenceStatistics()
        self.sequences = 0
        self._sums: dict[str, Tensor] = {}  # over the sequences
        self._of_queries: dict[str, Tensor] = {}  # over the trigger queries of all sequences, and over the others
        self._max_score, self._value_norms = torch.tensor(-math.inf, dtype=torch.float64), torch.zeros(2, 1)

    @torch.no_grad()
    def update(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        normalizer: str = "softmax",
        is_trigger: Tensor | None = None,
        **parameters: Any,
    ) -> "AttentionStatistics":
        """q (B, H, T, D) and k (B, H_kv, T, D) as they enter the scores, v (B, H_kv, T, D); normalizer and parameters
        as `attention` takes them; is_trigger (B, T) bool, of the queries. Without v there is no value drain, without
        is_trigger no figure of one kind of query."""
        device = "cpu" if q.device.type == "mps" else q.device  # MPS has no float64
        parameters = {name: x.to(device) if torch.is_tensor(x) else x for name, x in parameters.items()}
        for b, (q_1, k_1) in enumerate(zip(q.split(1), k.split(1), strict=True)):
            masses = self._update_sequence(q_1.to(device), k_1.to(device), normalizer, parameters)
            if is_trigger is not None:
                late = torch.arange(q.size(2), device=device) >= EARLY
                for kind, queries in (("trigger", is_trigger[b]), ("ordinary", ~is_trigger[b])):
                    chosen = queries.to(device) & late  # (T,)
                    counted = torch.cat((masses, torch.ones_like(masses[:1])))
                    self._of_queries[kind] = self._of_queries.get(kind, 0) + counted[..., chosen].sum(-1)  # (4, H)
        if v is not None:
            norms = repeat_heads(float64(v), q.size(1)).norm(dim=-1)  # (B, H, T)
            first, others = norms[..., :1].mean(-1).sum(0), norms[..., 1:].mean(-1).sum(0)
            self._value_norms = self._value_norms.to(norms) + torch.stack((first, others))
        return self

    def _update_sequence(self, q: Tensor, k: Tensor, normalizer: str, parameters: dict[str, Any]) -> Tensor:
        """What each query of the sequence, whose batch size is 1, gives to the first key, that over its row mass, and
        the row mass, which it gives to all: (3, H, T)."""
        _, H, T, D = q.shape
        blocks, queries = [], []
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            q_rows, k_seen = q[:, :, start:end], k[:, :, :end]
            largest = attention_scores(q_rows, k_seen, D**-0.5).amax((0, 2, 3)).double()
            self._max_score = torch.maximum(self._max_score.to(largest), largest)
            P, null = attention_rows(q_rows, k_seen, normalizer=normalizer, **parameters)
            P, null = P[0], None if null is None else null[0]  # (H, end − start, end) and (H, end − start, 1)
            # Before the block all keys are visible; within it a query sees those up to its own.
            visible = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril()
            rows = RowMoments.of(P[:, :, start:], visible)  # (H, end − start)
            if start:
                heads = P[:, :, :start].split(max(1, chunk_size(P) // (start * (end - start))))
                before = RowMoments(*map(torch.cat, zip(*map(RowMoments.of, heads), strict=True)))
                rows = RowMoments(*map(torch.stack, zip(before, rows, strict=True), repeat(-1))).pooled()
            blocks.append(rows)
            entropy = row_entropy(P, null, normalizer).double()
            null_mass = torch.zeros_like(entropy) if null is None else null[..., 0].double()
            queries.append(torch.stack((P[:, :, 0].double(), entropy, null_mass)))
        rows = RowMoments(*(torch.cat(field, dim=-1) for field in zip(*blocks, strict=True)))  # (H, T)
        first, entropy, null_mass = torch.cat(queries, dim=-1)  # (H, T) each
        if not find_normalizer(normalizer).is_softmax:
            null_mass = torch.full_like(null_mass, math.nan)  # it has no such slot, though its rows may not sum to 1
        row_mass = torch.where(rows.nonfinite > 0, math.nan, rows.count * rows.mean)
        figures = {"row_mass": row_mass.mean(-1), "null_mass": null_mass.mean(-1), "entropy": entropy.mean(-1)}
        over_row_mass = torch.where(row_mass == 0, 0.0, first / row_mass)
        for suffix, mass in (("", first), ("_over_row_mass", over_row_mass)):
            figures |= {
                f"sink_rate{suffix}": _exceeds(mass.mean(-1), SINK),
                f"first_mass{suffix}": mass.mean(-1),
                f"first_mass_without_query0{suffix}": mass[:, 1:].mean(-1),
                f"dormant{suffix}": _exceeds(mass[:, 1:], DORMANT).mean(-1),
            }
        self._sums = {name: self._sums.get(name, 0) + figure for name, figure in figures.items()}
        self.sequences += 1
        sequence = RowMoments(*(field.reshape(1, -1) for field in rows)).pooled()
        self.visible.add_sequences(sequence)
        self.all.add_sequences(sequence.with_zeros(H * T * (T - 1) // 2))
        if (n := T - EARLY) > 0:
            late = RowMoments(*(field[:, EARLY:].reshape(1, -1) for field in rows)).pooled()
            self.late.add_sequences(late.with_zeros(H * n * (n - 1) // 2))
        return torch.stack((first, over_row_mass, row_mass))

    @property
    def figures(self) -> dict[str, Tensor]:
        """Of each head (H,) float64, NaN where there is no value; but for sink rates, scores and value drains
        they are averages over queries and sequences.

        row_mass: what a query gives to keys, Σ_j P_ij: 1 under softmax. null_mass: what the null slot gets.
        entropy: of a query's attention in nats (see `row_entropy`).
        first_mass: what a query gives to the first key; …_without_query0, which sees no other.
        sink_rate: the share of sequences in which that, averaged over all queries, exceeds `SINK`.
        dormant: the share of queries, without query 0, that give the first key more than `DORMANT`.
        …_over_row_mass: the same of what a query gives to the first key over its row mass; 0 where it gives nothing.
        max_score: the largest visible scaled score q·k/√D.
        value_drain: ‖v₀‖ over ‖v_j‖, j ≥ 1, of the head's values, each averaged.
        first_token_…, first_token_…_over_row_mass, row_mass_…, of trigger and of ordinary queries, where there are
        triggers: what a query gives to the first key, raw and over its row mass, and to all, averaged over these
        queries of all sequences, without the `EARLY` ones.
        """
        first, others = self._value_norms
        means = {name: total / self.sequences for name, total in self._sums.items()}
        for kind, (*totals, queries) in self._of_queries.items():
            names = (f"first_token_{kind}", f"first_token_{kind}_over_row_mass", f"row_mass_{kind}")
            means |= {name: total / queries for name, total in zip(names, totals, strict=True)}
        return means | {"max_score": self._max_score, "value_drain": (first / others).expand(self._max_score.shape)}

    @property
    def sink_rate(self) -> Tensor:
        return self.figures["sink_rate"]

    @property
    def row_mass(self) -> Tensor:
        return self.figures["row_mass"]

    @property
    def entropy(self) -> Tensor:
        return self.figures["entropy"]


def _exceeds(x: Tensor, limit: float) -> Tensor:
    """1 or 0. NaN stays NaN: a comparison would give False, and so claim that the head does not sink."""
    return torch.where(x.isnan(), math.nan, (x > limit).double())


def no_distribution(model: GPT) -> list[str]:
    """A note on the entropy, where the model's attention rows are no probability distributions."""
    name = model.config.normalizer
    if find_normalizer(name).is_softmax:
        return []
    return [f"{name} is no softmax over the keys and perhaps a null slot: entropy is of each row over its own mass"]


def row_entropy(P: Tensor, null: Tensor | None, normalizer: str) -> Tensor:
    """In nats, of each row of attention weights P (…, T_k), null slot (…, 1) or None: (…,).

    A softmax's row is a probability distribution together with its null slot. Other weights are none: theirs is the
    entropy of the row over its own mass, 0 where that is 0.
    """

    def minus_x_log_x(x: Tensor) -> Tensor:  # torch.special.entr takes twice as long
        return -x.clamp(min=torch.finfo(x.dtype).tiny).log_().mul_(x).sum(-1)

    entropy = minus_x_log_x(P)
    if find_normalizer(normalizer).is_softmax:
        return entropy if null is None else entropy + minus_x_log_x(null)
    mass = P.sum(-1)
    return torch.where(mass == 0, 0.0, entropy / mass + mass.log())
