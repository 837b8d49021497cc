"""Massive activations: the few elements of a tensor that are a thousand times as large as its others (Sun et al. 2024).

The median of |x| over a whole text is exact, and no tensor is kept for it: a first pass counts how many elements have
which leading bits, a second one keeps those that share the median's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from measure.moments import float64
from measure.probe import watch
from model import GPT

LARGE, TIMES = 100.0, 1000.0
"""An element is massive where |x| > LARGE and |x| > TIMES × the median |x| of its tensor."""
_LEADING = 15  # of a float32's bits without its sign: the exponent and 7 more, so that a bin is 1/128 wide
_CHUNK = 2**20  # elements that are counted at a time


class Massive(NamedTuple):
    """The largest element of a tensor (B, T, C), of all batches together, beside the median."""

    max_at: tuple[int, int, int]
    """sequence, token and channel of the largest |x|, the first of several"""
    value: float
    """that element, with its sign"""
    median_abs: float
    """the median |x|, of an even number the lower one"""
    massive_at: list[tuple[int, int]]
    """(token, channel) of the massive elements, in order; each once, in however many sequences it is massive"""

    @property
    def max_over_median(self) -> float | None:
        return abs(self.value) / self.median_abs if self.median_abs else None


class Magnitudes:
    """|x| of one tensor: give all batches to `count`, then the same again to `collect`."""

    def __init__(self):
        self._counts = torch.zeros(2**_LEADING, dtype=torch.int64)
        self._sequences, self._at, self._value = 0, (0, 0, 0), 0.0
        self._finite = True
        self._bin, self._below = -1, 0  # the median's bin, and how many elements lie in those before it
        self._near: list[tuple[Tensor, Tensor]] = []  # values in that bin, and how often each is there
        self._large: list[Tensor] = []  # rows of token, channel, |x|

    def count(self, x: Tensor) -> None:
        """x (B, T, C)"""
        low, high = (extreme.item() for extreme in x.aminmax())
        self._finite &= abs(low) + abs(high) < float("inf")  # aminmax gives NaN where there is one
        if not self._finite:
            return
        if (value := high if high >= -low else low) and abs(value) > abs(self._value):
            sequence, token, channel = (x == value).nonzero()[0].tolist()
            self._at, self._value = (self._sequences + sequence, token, channel), value
        for chunk in x.reshape(-1).split(_CHUNK):
            self._counts += torch.bincount(_bins(chunk), minlength=2**_LEADING).cpu()
        self._sequences += len(x)

    def collect(self, x: Tensor) -> None:
        """x (B, T, C)"""
        if not self._finite:
            return
        if self._bin < 0:
            until = self._counts.cumsum(0)
            self._bin = int((until <= self._rank).sum())
            self._below = int(until[self._bin] - self._counts[self._bin])
        for chunk in x.reshape(-1).split(_CHUNK):
            near = float64(chunk[_bins(chunk) == self._bin]).abs().cpu()
            self._near.append(torch.unique(near, return_counts=True))
        # The least that the median can be: a float64 may have been rounded up to the bin's lower edge.
        least = torch.tensor(self._bin << 31 - _LEADING, dtype=torch.int32).view(torch.float32).item() * (1 - 1e-6)
        threshold = max(LARGE, TIMES * least)
        if abs(self._value) > threshold:
            where = (x.abs() > threshold).nonzero()
            values = float64(x[tuple(where.T)]).abs().cpu()
            self._large.append(torch.cat((where[:, 1:].cpu().double(), values[:, None]), dim=1))

    @property
    def _rank(self) -> int:
        return (int(self._counts.sum()) - 1) // 2

    def found(self) -> Massive | None:
        """None where a number is NaN or infinite, and without numbers."""
        if not self._finite or not self._near:
            return None
        values, counts = (torch.cat(parts) for parts in zip(*self._near, strict=True))
        values, order = values.sort()
        median = values[int((counts[order].cumsum(0) <= self._rank - self._below).sum())].item()
        large = torch.cat(self._large) if self._large else torch.zeros(0, 3)
        places = large[large[:, 2] > max(LARGE, TIMES * median), :2].unique(dim=0)
        at = [(int(token), int(channel)) for token, channel in places.tolist()]
        return Massive(self._at, self._value, median, at)


def _bins(x: Tensor) -> Tensor:
    """The leading bits of |x| as a float32, an integer that grows with it."""
    return x.abs().float().view(torch.int32) >> 31 - _LEADING


@contextlib.contextmanager
def looking(
    model: GPT, tensors: dict[str, Magnitudes], look: Callable[[Magnitudes, Tensor], None]
) -> Iterator[dict[str, Magnitudes]]:
    """While the model runs, `look` (Magnitudes.count, then Magnitudes.collect) at each of its tensors but the logits,
    which are no activations, by the names of `probe.watch`."""

    def on_tensor(name: str, x: Tensor) -> None:
        if name != "lm_head":
            look(tensors.setdefault(name, Magnitudes()), x.detach())

    with watch(model, on_tensor, lambda *_: None):
        yield tensors
