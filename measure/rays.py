"""The attention rows of a model along a step, summarised by head: medians, extremes, and medians against τ.

A row moves along a ray, α(τ) ∝ α⁰ e^{τa} (see `divergence.kl_along_ray`); a row that does not move has spread 0.
"""

import numpy as np
import torch
from torch import Tensor

from measure.divergence import Ray, kl_along_ray

BLOCK = 2**20  # slots of attention rows worked on at a time
CURVE_POINTS = 41  # steps on the curves

FIELDS = {  # column → field of a Ray
    "variance": "variance",
    "spread": "spread",
    "radius": "radius",
    "kl_forward": "forward",
    "kl_reverse": "reverse",
    "quadratic": "quadratic",
    "remainder_forward": "remainder_forward",
    "remainder_reverse": "remainder_reverse",
    "bound_forward": "bound_forward",
    "bound_reverse": "bound_reverse",
}
CONSTANT = ("variance", "spread", "radius")  # the columns that do not depend on τ
TIGHTNESS = ("tightness_forward", "tightness_reverse")
ENDS = (*CONSTANT, "kl_forward", "kl_reverse")  # the columns of which `ends` gives the least and the largest


def rays_of_heads(alpha0: Tensor, slopes: Tensor, tau: float) -> Tensor:
    """The fields of the Ray of every row, (fields, H, T) on the CPU, from α⁰ and a (H, T, n), block by block."""
    rows = max(1, BLOCK // alpha0.size(-1))
    blocks = zip(alpha0.flatten(0, 1).split(rows), slopes.flatten(0, 1).split(rows), strict=True)
    found = [torch.stack(kl_along_ray(a, s, tau)).cpu() for a, s in blocks]
    return torch.cat(found, dim=1).view(-1, *alpha0.shape[:2])


def medians(ray: Ray, tau: float) -> dict[str, float | None]:
    """One head in figures, from the Ray of its moving rows, (n,) on the CPU: the median of each column of FIELDS (of a
    remainder's absolute value), the largest of each of TIGHTNESS, the share of rows for which τ is beyond the radius,
    and n under `rows`. Where no row moves they are None, and n is 0."""
    n = len(ray.spread)
    if n == 0:
        return {column: None for column in (*FIELDS, *TIGHTNESS, "beyond_radius")} | {"rows": 0}
    of_fields = {column: median(getattr(ray, field).abs()) for column, field in FIELDS.items()}
    tightness = {column: getattr(ray, column).max().item() for column in TIGHTNESS}
    return {**of_fields, **tightness, "beyond_radius": (ray.radius < tau).double().mean().item(), "rows": n}


def median(x: Tensor) -> float:
    """The median of x (n,) on the CPU. By NumPy, since torch.quantile takes no more than 2²⁴ numbers."""
    return float(np.median(x.numpy()))


def ends(ray: Ray) -> dict[str, float | None]:
    """Least and largest of ENDS over the moving rows (n,) of one head, as COLUMN_min and COLUMN_max; None where no row
    moves."""
    if len(ray.spread) == 0:
        return {f"{column}_{end}": None for column in ENDS for end in ("min", "max")}
    return {
        f"{column}_{end}": getattr(getattr(ray, FIELDS[column]), end)().item()
        for column in ENDS
        for end in ("min", "max")
    }


def median_curve(alpha0: Tensor, slopes: Tensor, tau: float, rows: list[dict]) -> list[dict]:
    """Medians against τ, from far below the step to beyond the heads' radii, over rows with α⁰ and slopes (n, slots);
    `rows` are the `medians` of every head. Empty where nothing moves."""
    moving = slopes.amax(-1) > slopes.amin(-1)
    radii = [row["radius"] for row in rows if row["radius"]]
    if not moving.any() or not radii:
        return []
    alpha0, slopes = alpha0[moving], slopes[moving]
    last = 3 * max(tau, float(np.median(radii)))
    curve = []
    for t in np.geomspace(tau / 100, last, CURVE_POINTS):
        ray = kl_along_ray(alpha0, slopes, float(t))
        values = {c: median(getattr(ray, f).abs()) for c, f in FIELDS.items() if c not in CONSTANT}
        curve.append({"tau": float(t), **values})
    return curve
