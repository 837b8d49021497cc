"""Two models' predictions of the next token, position by position: how far apart they lie, and where a hinge fires.

*forward* is KL(reference‖other), *reverse* KL(other‖reference). All in float64.
"""

import numpy as np
import torch
from torch import Tensor

from measure.divergence import (
    AGGREGATES,
    aggregate,
    hellinger,
    jensen_shannon,
    kl_divergence,
    renyi,
    total_variation,
)

BLOCK = 2**21  # log-probabilities of a model that are held in float64 at a time
DIVERGENCES = {
    "kl_forward": "KL(reference‖other), nats",
    "kl_reverse": "KL(other‖reference), nats",
    "jensen_shannon": "½KL(p‖m) + ½KL(q‖m), m = ½(p + q): nats, at most ln 2",
    "total_variation": "½Σ|p − q|, at most 1",
    "hellinger": "√(½Σ(√p − √q)²), with the ½: at most 1",
    "renyi": "of the reference from the other, log(Σ p^α q^(1−α))/(α − 1), α = --order, nats",
}


@torch.no_grad()
def divergences(reference: Tensor, other: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """From two models' logits (N, V): the values of all DIVERGENCES, (divergences, N) in float64 on the CPU; and each
    model's likeliest token with its probability, (2 models, 2, N). Block by block, since log-probabilities in float64
    take more memory than the logits."""
    rows, values, likeliest = max(1, BLOCK // reference.size(-1)), [], []
    for blocks in zip(reference.split(rows), other.split(rows), strict=True):
        p, q = (torch.log_softmax((x.cpu() if x.device.type == "mps" else x).double(), -1) for x in blocks)
        found = (kl_divergence(p, q), kl_divergence(q, p), jensen_shannon(p, q), total_variation(p, q))
        values.append(torch.stack((*found, hellinger(p, q), renyi(p, q, order))).cpu())
        tops = [x.max(-1) for x in (p, q)]
        likeliest.append(torch.stack([torch.stack((top.indices.double(), top.values.exp())) for top in tops]).cpu())
    return torch.cat(values, dim=1), torch.cat(likeliest, dim=2)


def aggregates(values: Tensor) -> list[dict]:
    """A row for each divergence from its values (divergences, N)."""
    table = {how: aggregate(values, how).tolist() for how in AGGREGATES}
    return [{"divergence": name, **{how: table[how][i] for how in AGGREGATES}} for i, name in enumerate(DIVERGENCES)]


def hinge(rows: list[dict], tau: float) -> list[dict]:
    """Whether relu(aggregate − τ) is above 0, for each divergence and aggregate; `rows` as of `aggregates`."""
    return [{"divergence": row["divergence"], **{how: row[how] > tau for how in AGGREGATES}} for row in rows]


def hinge_sentence(rows: list[dict], tau: float) -> str:
    """Which aggregates of KL(other‖reference) a hinge at τ takes notice of, in words; `rows` as of `aggregates`."""
    reverse = next(row for row in rows if row["divergence"] == "kl_reverse")
    quiet, firing = ([how for how in AGGREGATES if (reverse[how] > tau) is fires] for fires in (False, True))
    if not quiet or not firing:
        said = "all four aggregates fire" if firing else "no aggregate fires"
    else:
        said = f"{listed(quiet)} {'does' if len(quiet) == 1 else 'do'} not fire, while {listed(firing)} "
        said += "does" if len(firing) == 1 else "do"
    return f"at τ = {tau:g}, on KL(other‖reference), {said}"


def listed(names: list[str]) -> str:
    return "the " + " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def histogram(values: Tensor) -> list[dict]:
    """Positions by the size of their KL, four bins a decade; the first takes all below, the last all above."""
    edges = np.logspace(-6, 2, 33)
    counts = {}
    for name in ("kl_forward", "kl_reverse"):
        of_name = values[list(DIVERGENCES).index(name)].numpy()
        counts[name] = np.histogram(np.clip(of_name, edges[0], edges[-1]), edges)[0].tolist()
    return [
        {"from": edges[i], "to": edges[i + 1], **{name: count[i] for name, count in counts.items()}}
        for i in range(len(edges) - 1)
    ]
