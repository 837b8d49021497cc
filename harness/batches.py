"""Which windows of a corpus a step sees: a function of (seed, step) alone, so there is nothing to save or restore.

`Windows` are those of one split: of the text as one stream, or of its documents, each by itself.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from harness.corpus import Corpus
from harness.errors import UserError
from harness.shards import Tokens
from kernels.loss import IGNORED
from measure.perplexity import sliding_offsets

KINDS = ("stream", "documents")


class Windows:
    """The windows of block_size inputs, each with the token after it as its target, of one split of a corpus.

    A window is named by its offset, the place of its first input in `tokens`. `stream`: the split is one text, and a
    window may start anywhere in it. `documents`: a window lies within a document. In training it starts where its
    document does; a validation takes a longer document in windows that follow on each other. A begin-of-text token is
    its document's first input, a separator its last target. Targets after a window's text are IGNORED, and its inputs
    there repeat the last token. UserError where there is no window, or where it is not known what parts documents.
    """

    def __init__(self, corpus: Corpus, split: str, block_size: int, kind: str = "stream"):
        self.corpus, self.split, self.block_size, self.kind = corpus, split, block_size, kind
        self.tokens = corpus.tokens[split]
        if len(self.tokens) <= block_size and kind == "stream":
            path = f"{corpus.folder / split}.bin"
            raise UserError(f"{path} has {len(self.tokens)} tokens, fewer than one window of {block_size} + 1")
        bounds = corpus.document_bounds(split) if kind == "documents" else np.array([0, len(self.tokens)])
        self.starts, self.ends = bounds[:-1], bounds[1:]
        if not self.longest:
            raise UserError(f"{corpus.folder / split}.bin has no document of two tokens: take windows of the stream")

    def training(self, seed: int, step: int, batch_size: int, whole: bool = False) -> np.ndarray:
        """The offsets of a step's windows: uniform over the stream, or over the documents whatever their length, or
        where it is to be `whole`, over those that fill a window."""
        if self.kind == "documents":
            starts = np.intersect1d(self.starts, self.whole()) if whole else self.with_targets
            return starts[training_offsets(seed, step, len(starts), 0, batch_size)]
        return training_offsets(seed, step, len(self.tokens), self.block_size, batch_size)

    def check_training(self) -> str | None:
        """What a training sees of the documents, in a line. UserError where that is one window alone."""
        if self.kind == "stream":
            return None
        if len(self.with_targets) < 2:
            name = f"{self.corpus.folder / self.split}.bin"
            raise UserError(f"data.windows documents: {name} has no two, and all windows would be the same: use stream")
        share = self.targets(self.starts).sum() / (self.ends - self.starts - 1).sum()
        return f"windows of {len(self.with_targets):,} documents: their starts, {share:.1%} of the text"

    def validation(self, count: int | None = None, stride: int | None = None, early: int = 0) -> np.ndarray:
        """The offsets of an evaluation's windows, in order, so that each target is scored once; the last window of a
        text may be shorter. With a `count`, that many of them, spread evenly. `stride` as in `sliding_offsets`; `early`
        is 1 where a token is put in front of every window, see `begin_with`, which makes the first one a target."""
        lengths = self.ends - self.starts + early
        return spread(sliding_offsets(lengths, self.block_size, stride or self.block_size, self.starts), count)

    def whole(self, count: int | None = None) -> np.ndarray:
        """The offsets of `validation`'s windows that text fills, or `count` of them, spread evenly. UserError if there
        is none."""
        offsets = self.validation()
        offsets = offsets[offsets + self.block_size < self.end_of(offsets)]
        if not len(offsets):
            raise UserError(
                f"{self.corpus.folder / self.split}.bin has no document that fills a window of {self.block_size} "
                f"tokens: give --block-size {self.longest}, which the longest fills, or --windows stream"
            )
        return spread(offsets, count)

    @cached_property
    def with_targets(self) -> np.ndarray:
        """The starts of the documents of at least two tokens: one that is empty but for its separator has no target."""
        return self.starts[self.ends - self.starts > 1]

    def end_of(self, offsets: np.ndarray) -> np.ndarray:
        """Where the text of the windows at `offsets` ends."""
        return self.ends[np.searchsorted(self.starts, offsets, side="right") - 1]

    def targets(self, offsets: np.ndarray) -> np.ndarray:
        """How many targets the windows at `offsets` have."""
        return np.clip(self.end_of(offsets) - offsets - 1, 0, self.block_size)

    def shortened(self) -> "Windows":
        """The same, or where no text fills a window, windows as long as the longest text."""
        return Windows(self.corpus, self.split, min(self.block_size, self.longest), self.kind)

    @property
    def longest(self) -> int:
        """The most targets that a text has."""
        return int((self.ends - self.starts).max()) - 1

    @cached_property
    def bytes_per_target(self) -> float | None:
        """Bytes of text a target: for bits per byte. None where the text is not known."""
        bytes_per_token = self.corpus.bytes_per_token[self.split]
        if self.kind == "stream" or bytes_per_token is None:
            return bytes_per_token
        no_targets = self.tokens[self.starts]  # of each document the first token
        size = bytes_per_token * len(self.tokens) - self.corpus.tokenizer.token_bytes()[no_targets].sum()
        return float(size) / (len(self.tokens) - len(no_targets))

    def gather(self, offsets: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) int64 of the windows at `offsets`."""
        return gather(self.tokens, offsets, self.block_size, device, self.end_of(offsets)[:, None])


def training_offsets(seed: int, step: int, tokens: int, block_size: int, batch_size: int) -> np.ndarray:
    """Where the `batch_size` windows of a step start: (batch_size,) int64, uniform over the corpus of `tokens`.

    Philox keyed by (seed, step): the draws of one step are independent of those of any other (Salmon et al. 2011).
    With the step as the *counter* instead, neighbouring steps would share most of a block of its output.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return generator.integers(0, tokens - block_size, size=batch_size)


def spread(offsets: np.ndarray, count: int | None) -> np.ndarray:
    """`count` of the offsets, spread evenly; all of them where there are no more, or where it is None."""
    if count is None or count >= len(offsets):
        return offsets
    return offsets[np.linspace(0, len(offsets) - 1, count).astype(np.int64)]


def gather(
    tokens: np.ndarray | Tokens,
    offsets: np.ndarray,
    block_size: int,
    device: torch.device | str,
    end: int | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 of the windows that start at `offsets`; targets from `end` on, that of the tokens
    or of each window (B, 1), are IGNORED."""
    end = len(tokens) if end is None else end
    index = offsets[:, None] + np.arange(block_size + 1)
    windows = tokens[np.minimum(index, end - 1)].astype(np.int64)
    x, y = windows[:, :-1], windows[:, 1:]
    past = index[:, 1:] >= end
    if past.any():
        y = np.where(past, IGNORED, y)
    idx, targets = (torch.from_numpy(np.ascontiguousarray(z)) for z in (x, y))
    device = torch.device(device)
    if device.type == "cuda":  # from pinned memory the copy is queued, and the program goes on
        return idx.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return idx.to(device), targets.to(device)


def begin_with(token: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Windows x and their targets y (B, T) with a begin-of-text token in front: the text is one token shorter, and its
    first token becomes a target."""
    return torch.cat((torch.full_like(x[:, :1], token), x[:, :-1]), 1), torch.cat((x[:, :1], y[:, :-1]), 1)


def dropout_seed(seed: int, step: int, rank: int, micro_step: int) -> int:
    """The seed of a micro-step's dropout: hashed to the 32 bits that the CPU generator keeps of a seed."""
    return int(np.random.SeedSequence([seed, step, rank, micro_step]).generate_state(1)[0])


def prefetch(batches: Iterator) -> Iterator:
    """The same batches, the next one gathered on another thread while this one is used."""
    with ThreadPoolExecutor(1) as executor:
        ahead = executor.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = executor.submit(next, batches, None)
            yield batch
