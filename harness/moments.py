"""Central moments of any number of tensors in one pass, exact in float64: mean, variance, skewness, excess kurtosis.

The pairwise update of Chan, Golub & LeVeque (1983), carried to the fourth order by Pébay (2008): the result does not
depend on how the elements were batched, and equals `scipy.stats.kurtosis` of everything at once.
"""

import math
import sys

import torch

# A chunk is read about ten times. On a CPU it should stay in the cache, and PyTorch runs up to 2^15 elements in the
# calling thread: waking others for so little costs seconds when the cores are busy. Elsewhere it should amortise the
# launches.
CHUNK_CPU = 2**15
CHUNK_ACCELERATOR = 2**24


class Moments:
    """Population moments of every element given to `update` or `merge`; NaN and ±Inf are counted, then left out.

    A statistic that does not exist is None: all of them where `count` is 0; skewness, excess_kurtosis and
    max_abs_over_std where the variance is 0, or so small or large (σ beyond 1e-77 … 1e77, which only float64 input
    reaches) that its powers leave the range of float64.
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
    def update(self, tensor: torch.Tensor) -> "Moments":
        """Add all elements of a real tensor of any shape, dtype and device (copied to float64 chunk by chunk)."""
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
        return self._m2 / self.count if self.count else None

    @property
    def std(self) -> float | None:
        return math.sqrt(self.variance) if self.count else None

    @property
    def skewness(self) -> float | None:
        return self._m3 / self.count / (self.variance * self.std) if self._has_shape else None

    @property
    def excess_kurtosis(self) -> float | None:
        """Fisher's: a Gaussian gives 0, two equal spikes −2, the least there is."""
        return self._m4 / self.count / (self.variance * self.variance) - 3 if self._has_shape else None

    @property
    def max_abs(self) -> float | None:
        return max(-self._low, self._high) if self.count else None

    @property
    def max_abs_over_std(self) -> float | None:
        return self.max_abs / self.std if self._has_shape else None

    @property
    def _has_shape(self) -> bool:
        return self.count > 0 and self.variance * self.variance > sys.float_info.min and math.isfinite(self._m4)


def excess_kurtosis(tensor: torch.Tensor) -> float | None:
    """Excess kurtosis of all finite elements of `tensor`; None where they are none or all equal."""
    return Moments().update(tensor).excess_kurtosis


def _moments_of_chunk(chunk: torch.Tensor) -> Moments:
    """The moments of one flat tensor (n,): the mean first, then the powers of the distances from it."""
    moments = Moments()
    if chunk.numel() == 0:
        return moments
    # MPS has no float64
    x = (chunk.cpu() if chunk.device.type == "mps" else chunk).double()
    d = x - x[0]
    offset = d.mean()
    d -= offset
    d2 = d * d
    m2 = d2.sum()
    m3 = d.mul_(d2).sum()
    m4 = d2.square_().sum()
    # one transfer for all of them: on an accelerator each would wait for the device
    low, high, origin, offset, m2, m3, m4 = torch.stack([*x.aminmax(), x[0], offset, m2, m3, m4]).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax hands on a NaN
        moments = _moments_of_chunk(x[x.isfinite()])
        moments.nonfinite = chunk.numel() - moments.count
        return moments
    moments.count = chunk.numel()
    moments._low, moments._high = low, high
    moments._origin, moments._offset = origin, offset
    moments._m2, moments._m3, moments._m4 = m2, m3, m4
    return moments
