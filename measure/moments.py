"""Central moments of any number of tensors in one pass, exact in float64: mean, variance, skewness, excess kurtosis.

The pairwise update of Chan, Golub & LeVeque (1983), carried to the fourth order by Pébay (2008): the result does not
depend on how the elements were batched, and equals `scipy.stats.kurtosis` of everything at once. `Moments` takes all
elements together; `RowMoments` keeps those of every row of a tensor, and pools them when asked.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# How many elements are read at once, about ten times each. On a CPU they should stay in the cache, and be enough to be
# worth waking the other threads for, which costs much where the cores are busy. On an accelerator they should be enough
# for the time of the launches not to count.
CHUNK_CPU = 2**18
CHUNK_ACCELERATOR = 2**24

COLUMNS = {
    "count": "how many finite numbers it has; the other columns are theirs",
    "nonfinite": "how many NaN and ±Inf it has",
    "mean": "their mean",
    "std": "their standard deviation σ (of a population: over n, not n − 1)",
    "skewness": "third central moment / σ³: 0 where both tails are alike",
    "excess_kurtosis": "fourth central moment / σ⁴ − 3: 0 for a Gaussian, −1.2 for a uniform distribution; large where "
    "a few numbers lie far out",
    "max_abs": "the largest |x|",
    "max_abs_over_std": "the largest |x| in units of σ: a Gaussian has about 5 among a million numbers",
}


def float64(x: Tensor) -> Tensor:
    """x in float64 on its own device, or on the CPU where that is MPS, which has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def whole(x: Tensor) -> Tensor:
    """x, gathered if it is sharded over ranks: every rank has to call this, in the same order."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class Moments:
    """Population moments of every element given to `update` or `merge`; NaN and ±Inf are counted, then left out.

    A statistic that does not exist is None: all of them where `count` is 0; skewness, excess_kurtosis and
    max_abs_over_std where the variance is 0, or so small or large (σ beyond 1e-77 … 1e77, which only float64 input
    reaches) that its powers leave the range of float64; beyond 1e154, variance and std as well.
    """

    def __init__(self):
        self.count = 0  # finite elements
        self.nonfinite = 0  # NaN and ±Inf
        self._low, self._high = math.inf, -math.inf
        # The mean is _origin + _offset, and _origin is one of the elements: neighbouring floats subtract without
        # rounding, so constant data has a variance of exactly 0, and 1e8 + noise keeps all digits of the noise.
        self._origin = self._offset = 0.0
        self._m2 = self._m3 = self._m4 = 0.0  # Σ (x − mean)^k

    @torch.no_grad()
    def update(self, tensor: torch.Tensor | ArrayLike) -> "Moments":
        """Add all elements of a real tensor of any shape, dtype and device (copied to float64 chunk by chunk), or of
        what NumPy takes for an array. TypeError for complex numbers."""
        if not torch.is_tensor(tensor):
            tensor = torch.from_numpy(np.array(tensor, order="C"))
        if tensor.is_complex():
            raise TypeError(f"{tensor.dtype} has no moments here: give real and imaginary parts apart")
        chunk_size = CHUNK_CPU if tensor.device.type == "cpu" else CHUNK_ACCELERATOR
        for chunk in tensor.detach().reshape(-1).split(chunk_size):
            self.merge(_moments_of_chunk(chunk))
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add what `other` has seen; `other` stays as it is. Pébay's pairwise formulas with a = n_A/n and b = n_B/n."""
        self.nonfinite += other.nonfinite
        if other.count == 0:
            return self
        if self.count == 0:
            self._origin, self._offset = other._origin, other._offset
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        delta = (other._origin - self._origin) + (other._offset - self._offset)
        delta2 = delta * delta  # not `**`, which raises where `*` gives inf
        self._m4 += (
            other._m4
            + delta2 * delta2 * count * a * b * (a * a - a * b + b * b)
            + 6 * delta2 * (a * a * other._m2 + b * b * self._m2)
            + 4 * delta * (a * other._m3 - b * self._m3)
        )
        self._m3 += other._m3 + delta2 * delta * count * a * b * (a - b) + 3 * delta * (a * other._m2 - b * self._m2)
        self._m2 += other._m2 + delta2 * count * a * b
        self._offset += delta * b
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)
        self.count = count
        return self

    @property
    def mean(self) -> float | None:
        return self._origin + self._offset if self.count else None

    @property
    def variance(self) -> float | None:
        return self._variance if self.count and math.isfinite(self._m2) else None

    @property
    def std(self) -> float | None:
        return self._std if self.count and math.isfinite(self._m2) else None

    @property
    def skewness(self) -> float | None:
        return self._m3 / self.count / (self._variance * self._std) if self._has_shape else None

    @property
    def excess_kurtosis(self) -> float | None:
        """Fisher's: a Gaussian gives 0, two equal spikes −2, the least there is."""
        return self._m4 / self.count / (self._variance * self._variance) - 3 if self._has_shape else None

    @property
    def max_abs(self) -> float | None:
        return self._max_abs if self.count else None

    @property
    def max_abs_over_std(self) -> float | None:
        return self._max_abs / self._std if self._has_shape else None

    def row(self) -> dict[str, int | float | None]:
        """Everything above, named as `COLUMNS`."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def _has_shape(self) -> bool:
        return self.count > 0 and self._variance * self._variance > sys.float_info.min and math.isfinite(self._m4)

    # The next three are defined only where `count` is not 0.

    @property
    def _variance(self) -> float:
        return self._m2 / self.count

    @property
    def _std(self) -> float:
        return math.sqrt(self._variance)

    @property
    def _max_abs(self) -> float:
        return max(-self._low, self._high)


def excess_kurtosis(tensor: torch.Tensor | ArrayLike) -> float | None:
    """Excess kurtosis of all finite elements of a tensor or an array; None where they are none or all equal."""
    return Moments().update(tensor).excess_kurtosis


def _moments_of_chunk(chunk: torch.Tensor) -> Moments:
    """The moments of one flat tensor (n,): the mean first, then the powers of the distances from it."""
    moments = Moments()
    if chunk.numel() == 0:
        return moments
    x = float64(chunk)
    d = x - x[0]
    offset = d.mean()
    d -= offset
    d2 = d * d
    m2 = d2.sum()
    m3 = d.mul_(d2).sum()
    m4 = d2.square_().sum()
    # one transfer for all of them: on an accelerator each would wait for the device
    low, high, origin, offset, m2, m3, m4 = torch.stack([*x.aminmax(), x[0], offset, m2, m3, m4]).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax gives NaN where there is one
        moments = _moments_of_chunk(x[x.isfinite()])
        moments.nonfinite = chunk.numel() - moments.count
        return moments
    moments.count = chunk.numel()
    moments._low, moments._high = low, high
    moments._origin, moments._offset = origin, offset
    moments._m2, moments._m3, moments._m4 = m2, m3, m4
    return moments


class RowMoments(NamedTuple):
    """The moments of many rows of numbers at once, each (...,) float64: one entry a row."""

    count: torch.Tensor  # type: ignore[assignment]  # finite elements; the name hides tuple.count, which nobody calls
    nonfinite: torch.Tensor  # NaN and ±Inf, counted and left out
    mean: torch.Tensor
    m2: torch.Tensor  # Σ (x − mean)^k
    m3: torch.Tensor
    m4: torch.Tensor
    max_abs: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, visible: torch.Tensor | None = None) -> "RowMoments":
        """Of the rows, the last dimension, of x (..., n), in float64; with `visible`, a mask that broadcasts to x, of
        those elements alone."""
        low, high = x.amin(-1), x.amax(-1)
        nonfinite = torch.zeros(low.shape, dtype=torch.float64, device=x.device)
        if not (low.isfinite() & high.isfinite()).all():  # amin and amax give NaN where there is one
            finite, seen = x.isfinite(), True if visible is None else visible
            nonfinite += (~finite & seen).sum(-1)
            visible = finite & seen
        x = x.double()
        if visible is None:
            count = torch.full_like(nonfinite, x.size(-1))
            mean = x.mean(-1)
        else:
            hidden, count = ~visible, visible.expand_as(x).sum(-1).double()
            low, high = x.masked_fill(hidden, math.inf).amin(-1), x.masked_fill(hidden, -math.inf).amax(-1)
            low, high = (torch.where(count > 0, extreme, 0) for extreme in (low, high))
            mean = x.masked_fill(hidden, 0).sum(-1) / count.clamp(min=1)
        mean = torch.where(low == high, low.double(), mean)  # equal numbers have a variance of exactly 0
        d = x - mean.unsqueeze(-1)
        if visible is not None:
            d.masked_fill_(hidden, 0)
        d2 = d * d
        m2 = d2.sum(-1)
        m3 = d.mul_(d2).sum(-1)
        m4 = torch.linalg.vector_norm(d2, dim=-1).square()
        return cls(count, nonfinite, mean, m2, m3, m4, torch.maximum(-low, high).double())

    def pooled(self) -> "RowMoments":
        """The rows along the last dimension taken together: Pébay's formulas for many groups at once."""
        count = self.count.sum(-1)
        origin = self.mean[..., :1]
        delta = self.mean - origin
        offset = (self.count * delta).sum(-1, keepdim=True) / count.clamp(min=1).unsqueeze(-1)
        delta = delta - offset
        delta2 = delta * delta
        return RowMoments(
            count,
            self.nonfinite.sum(-1),
            (origin + offset).squeeze(-1),
            (self.m2 + self.count * delta2).sum(-1),
            (self.m3 + delta * (3 * self.m2 + self.count * delta2)).sum(-1),
            (self.m4 + delta * (4 * self.m3 + delta * (6 * self.m2 + self.count * delta2))).sum(-1),
            self.max_abs.amax(-1),
        )

    def with_zeros(self, count: int) -> "RowMoments":
        """Each row with `count` zeros more."""
        zero = torch.zeros_like(self.count)
        zeros = RowMoments(zero + count, *(zero for _ in self[1:]))
        return RowMoments(*(torch.stack(pair, dim=-1) for pair in zip(self, zeros, strict=True))).pooled()

    @property
    def excess_kurtosis(self) -> torch.Tensor:
        """NaN where it does not exist, as in `Moments`."""
        variance2 = (self.m2 / self.count).square()
        exists = (variance2 > sys.float_info.min) & self.m4.isfinite()
        return torch.where(exists, self.m4 / self.count / variance2 - 3, math.nan)

    def moments(self) -> Moments:
        """All rows taken together."""
        together = RowMoments(*(field.reshape(-1) for field in self)).pooled()
        count, nonfinite, mean, m2, m3, m4, max_abs = torch.stack(together).tolist()
        moments = Moments()
        moments.nonfinite = int(nonfinite)
        if count:
            moments.count, moments._origin = int(count), mean
            moments._m2, moments._m3, moments._m4 = m2, m3, m4
            moments._low, moments._high = -max_abs, max_abs
        return moments
