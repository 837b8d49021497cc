"""Which windows of a corpus a step sees: a function of (seed, step) alone, so there is nothing to save or restore."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from kernels.loss import IGNORED


def training_offsets(seed: int, step: int, tokens: int, block_size: int, batch_size: int) -> np.ndarray:
    """Where the `batch_size` windows of a step start: (batch_size,) int64, uniform over the corpus of `tokens`.

    Philox keyed by (seed, step): the draws of one step are independent of those of any other (Salmon et al. 2011).
    With the step as the *counter* instead, neighbouring steps would share most of a block of its output.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return generator.integers(0, tokens - block_size, size=batch_size)


def validation_offsets(tokens: int, block_size: int, count: int | None = None) -> np.ndarray:
    """Where the windows of an evaluation start: non-overlapping, so that each target is scored once; the last window
    may be shorter. With a `count`, that many of them, spread evenly."""
    offsets = np.arange(0, tokens - 1, block_size)
    if count is None or count >= len(offsets):
        return offsets
    return offsets[np.linspace(0, len(offsets) - 1, count).astype(np.int64)]


def gather(
    tokens: np.ndarray, offsets: np.ndarray, block_size: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 of the windows that start at `offsets`; targets past the end are IGNORED."""
    index = offsets[:, None] + np.arange(block_size + 1)
    windows = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int64)
    x, y = windows[:, :-1], windows[:, 1:]
    if index.max() >= len(tokens):
        y = np.where(index[:, 1:] < len(tokens), y, IGNORED)
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
