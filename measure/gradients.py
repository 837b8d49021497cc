"""What a gradient loses without the lateral part of the softmax Jacobian: the attention's, and the parameters'."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from measure.jacobian import (
    backpropagate,
    backward_mode,
    cosine_and_norm_ratio,
    dot_products,
    take_gradients,
)
from measure.probe import rows_of_c_attn
from model import GPT, GPTConfig, find_normalizer

MODES = ("diagonal", "detached", "ste")
"""The backward passes that are compared with the full one."""


class Backwards(NamedTuple):
    """What `run_backwards` finds when it runs the same batches backward in full and in each of MODES."""

    loss: float
    """mean over the sequences"""
    sequences: int
    splits: list[list[dict[str, Tensor]]]
    """for each layer, the `split_of_sequence` of every sequence"""
    parameters: list[str]
    """their names"""
    products: dict[str, dict[str, Tensor]]
    """mode → parameter → `dot_products` with the full gradient. The rows of c_attn that make q and k also have an entry
    of their own, "NAME q, k". Where the normalizer has no such backward, there is no "diagonal" or "detached"."""


def run_backwards(model: GPT, batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]]) -> Backwards:
    """Run `batches(what)`, the same (x, y) each time, (B, T) int64, backward through the model; `what` says which pass
    it is, for a progress bar. The model's own backward is what it was again afterwards."""
    splits: list[list[dict[str, Tensor]]] = [[] for _ in model.transformer.h]
    loss, sequences = 0.0, 0
    with backward_mode(model, "full"):
        for x, y in batches("full backward"):
            loss += backpropagate(model, x, y, splits) * len(x)
            sequences += len(x)
    full, products = take_gradients(model), {}
    entry = find_normalizer(model.config.normalizer)
    for mode in (mode for mode in MODES if getattr(entry, mode, True)):
        with backward_mode(model, mode):
            for x, y in batches(f"{mode} backward"):
                backpropagate(model, x, y)
        products[mode] = products_of_parameters(take_gradients(model), full, model.config)
    return Backwards(loss / sequences, sequences, splits, list(full), products)


def products_of_parameters(
    gradients: dict[str, Tensor], full: dict[str, Tensor], config: GPTConfig
) -> dict[str, Tensor]:
    """`dot_products` with the full gradient, by parameter; of c_attn also those of its q and k, without v."""
    products = {}
    for name, gradient in gradients.items():
        products[name] = dot_products(gradient, full[name])
        if ".c_attn." in name:
            own, whole = rows_of_c_attn(gradient, config), rows_of_c_attn(full[name], config)
            products[f"{name} q, k"] = dot_products(own["q"], whole["q"]) + dot_products(own["k"], whole["k"])
    return products


def compare(products: dict[str, dict[str, Tensor]], names: Iterable[str]) -> dict[str, float | None]:
    """Cosine and norm ratio, for each mode, of these parameters' gradients taken as one vector."""
    values: dict[str, float | None] = {}
    names = list(names)
    for mode in MODES:
        cosine, ratio = None, None
        if mode in products:
            together = sum((products[mode][name] for name in names), start=torch.zeros(3, dtype=torch.float64))
            cosine, ratio = cosine_and_norm_ratio(together)
        values |= {f"cos_{mode}": cosine, f"norm_ratio_{mode}": ratio}
    return finite(values)


def finite(values: Mapping[str, Tensor | float | None]) -> dict[str, float | None]:
    """As plain numbers; None where there is none. `findings` says why."""
    return {k: float(v) if v is not None and math.isfinite(v) else None for k, v in values.items()}


def findings(layers: list[dict[str, Tensor]], loss: float, products: dict[str, dict[str, Tensor]]) -> list[str]:
    """Why values are null, by the name of the layer and head or of the parameter."""

    def heads(column: str, condition: Callable[[Tensor], Tensor]) -> list[str]:
        found = ((layer, condition(columns[column]).nonzero().flatten()) for layer, columns in enumerate(layers))
        return [f"{layer}.{head}" for layer, which in found for head in which]

    squared_norms = {"full": {name: product[2] for name, product in products["ste"].items()}}
    squared_norms |= {
        mode: {name: product[1] for name, product in by_name.items()} for mode, by_name in products.items()
    }
    found = {
        "attention weights that are NaN or Inf, in layer.head": heads("mean_attention", lambda x: ~x.isfinite()),
        "score gradients that are NaN or Inf, in layer.head": heads("e_full", lambda x: ~x.isfinite()),
        "no gradient reaches the scores, so no ratio and no cosine, in layer.head": heads("e_full", lambda x: x == 0),
    }
    for mode, by_name in squared_norms.items():
        found[f"{mode} gradients that are NaN or Inf"] = [name for name, x in by_name.items() if not x.isfinite()]
    for mode, by_name in squared_norms.items():
        found[f"{mode} gradients that are zero"] = [name for name, x in by_name.items() if x == 0]
    notes = [] if math.isfinite(loss) else [f"the loss is {loss}"]
    for what, names in found.items():
        if names:  # of a deep model there may be hundreds
            more = f", and {len(names) - 10} more" if len(names) > 10 else ""
            notes.append(f"{what}: {', '.join(names[:10])}{more}")
    return notes


def not_computed(name: str) -> list[str]:
    """Notes on what is null for a normalizer that is no softmax, since the closed forms hold for softmax alone."""
    normalizer = find_normalizer(name)
    notes = [] if normalizer.is_softmax else [f"jacobian_offdiag has a closed form of a softmax alone, not of {name}"]
    if normalizer.diagonal is None:
        notes.append(f"{name} does not say its Jacobian's diagonal: whatever compares with that is null")
    if normalizer.detached is None:
        notes.append(f"{name} has no backward detached: whatever compares with that is null")
    return notes
