"""How much of the gradient through attention is lateral, per layer and head; and what the parameters' gradients lose
without it: the split of the softmax Jacobian into its diagonal and the rest, on real batches with the real gradient.

The loss L is each batch's own mean, and energies are summed over the batches: they go with 1 / --batch-size squared,
ratios and cosines do not. Sequences run one at a time. The backward pass is the full one, whatever the checkpoint was
trained with; then the same weights and batches run again with the diagonal one and with straight-through (ste).
"""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from torch import Tensor

from harness.diagnostics import Diagnostic, Result, Subject, run
from harness.errors import run_cli
from harness.figures import draw_heads, new_figure
from measure.activations import no_distribution
from measure.jacobian import (
    backpropagate,
    backward_mode,
    cosine_and_norm_ratio,
    dot_products,
    pool,
    take_gradients,
)
from measure.perplexity import nonfinite_weights
from measure.probe import rows_of_c_attn
from model import find_normalizer

SPLIT = {
    "mean_attention": "mean weight A_ij over j ≤ i",
    "entropy": "of a row of A, in nats, averaged; with softmax1 and sink the null slot counts as one of the row's; "
    "where the normalizer is no softmax, of the row over its own mass",
    "row_mass": "Σ_j A_ij, averaged over rows: 1 under softmax; the rest goes to the null slot",
    "e_full": "Σ s², s_ij = A_ij (g_ij − Σ_k A_ik g_ik) the gradient of the scores, g = dL/dA",
    "e_diag": "Σ d², d_ij = A_ij (1 − A_ij) g_ij: what the Jacobian's diagonal passes on",
    "e_lateral": "Σ o², o = s − d: what comes from the other entries of the row",
    "e_cross": "2 Σ d·o; e_full = e_diag + e_lateral + e_cross",
    "r_diag": "e_diag / e_full; above 1 where diagonal and lateral part cancel",
    "r_lateral": "e_lateral / e_full",
    "r_cross": "e_cross / e_full; the three add up to 1",
    "r_offdiag": "1 − r_diag",
    "cos_diag": "cosine of d and s over a sequence's (i, j ≤ i), averaged over sequences",
    "cos_ste": "cosine of g and s, likewise: what straight-through keeps of the direction",
    "jacobian_diag": "Σ_j A²(1 − A)², averaged over rows: of the Jacobian alone, the squared norm of its diagonal",
    "jacobian_offdiag": "(Σ_j A²)² − Σ_j A⁴, averaged over rows: that of the rest",
}
GRADIENTS = {
    "parameter": "of the model, by name; the head is the token embedding (tied)",
    "cos_diagonal": "cosine of its gradient under the diagonal backward with the full one's",
    "norm_ratio_diagonal": "norm of its gradient under the diagonal backward over the full one's",
    "cos_ste": "the same cosine, straight through",
    "norm_ratio_ste": "the same ratio, straight through",
}


PANELS = {
    "r_diag": "r_diag: diagonal over full energy",
    "r_lateral": "r_lateral: lateral over full energy",
    "cos_diag": "cos_diag: cosine of diagonal and full",
    "cos_ste": "cos_ste: cosine of ste and full",
}
MODES = ("diagonal", "ste")


def measure(subject: Subject) -> Result:
    model = subject.model
    splits, loss, sequences = [[] for _ in model.transformer.h], 0.0, 0
    with backward_mode(model, "full"):
        for x, y in subject.batches(what="full backward"):
            loss += backpropagate(model, x, y, splits) * len(x)
            sequences += len(x)
    full = take_gradients(model)
    products = {}  # mode → parameter → dot products with the full gradient
    normalizer = find_normalizer(model.config.normalizer)
    for mode in MODES if normalizer.diagonal else ("ste",):
        with backward_mode(model, mode):
            for x, y in subject.batches(what=f"{mode} backward"):
                backpropagate(model, x, y)
        products[mode] = products_of_parameters(take_gradients(model), full, model.config.n_head)

    layers = [pool(split) for split in splits]
    queries_keys = [name for name in products["ste"] if name not in full]
    summary = {
        "loss": loss / sequences if math.isfinite(loss) else None,
        **finite(pool([split for layer in splits for split in layer], over_heads=True)),
        **{f"gradient_{name}": value for name, value in compare(products, full).items()},
        **{f"query_key_gradient_{name}": value for name, value in compare(products, queries_keys).items()},
    }
    rows = [
        {"layer": layer, "head": head, **finite({name: column[head] for name, column in columns.items()})}
        for layer, columns in enumerate(layers)
        for head in range(model.config.n_head)
    ]
    gradients = [{"parameter": name, **compare(products, [name])} for name in full]
    pooled = [{"layer": layer, **finite(pool(split, over_heads=True))} for layer, split in enumerate(splits)]
    notes = [
        f"{sequences} windows of {model.config.block_size} tokens",
        *nonfinite_weights(model),
        *no_distribution(model),
        *not_computed(model.config.normalizer),
        *findings(layers, loss, products),
    ]
    return Result(rows, summary, notes, {"layers": pooled, "gradients": gradients})


def not_computed(name: str) -> list[str]:
    """What is null for a normalizer that is no softmax, whose closed forms are not its own."""
    normalizer = find_normalizer(name)
    notes = [] if normalizer.is_softmax else [f"jacobian_offdiag has a closed form of a softmax alone, not of {name}"]
    if normalizer.diagonal is None:
        notes.append(f"{name} does not say its Jacobian's diagonal: whatever compares with that is null")
    return notes


def products_of_parameters(gradients: dict[str, Tensor], full: dict[str, Tensor], n_head: int) -> dict[str, Tensor]:
    """`dot_products` with the full gradient, by parameter; of c_attn also those of its q and k, without v."""
    products = {}
    for name, gradient in gradients.items():
        products[name] = dot_products(gradient, full[name])
        if ".c_attn." in name:
            own, whole = rows_of_c_attn(gradient, n_head), rows_of_c_attn(full[name], n_head)
            products[f"{name} q, k"] = sum(dot_products(own[part], whole[part]) for part in "qk")
    return products


def compare(products: dict[str, dict[str, Tensor]], names: Iterable[str]) -> dict[str, float | None]:
    """Cosine and norm ratio, for each mode, of these parameters' gradients taken as one vector."""
    values, names = {}, list(names)
    for mode in MODES:
        measured = mode in products
        cosine, ratio = cosine_and_norm_ratio(sum(products[mode][name] for name in names)) if measured else (None, None)
        values |= {f"cos_{mode}": cosine, f"norm_ratio_{mode}": ratio}
    return finite(values)


def finite(values: dict[str, Tensor | float | None]) -> dict[str, float | None]:
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
    return notes + [f"{what}: {', '.join(names)}" for what, names in found.items() if names]


def draw(result: Result, title: str) -> Figure:
    figure, axes = new_figure(2, 2)
    figure.suptitle(title)
    for ax, (column, label) in zip(axes, PANELS.items(), strict=True):
        values = [row[column] for row in result.rows if row[column] is not None]
        # from 0 to 1 at least; a head whose parts nearly cancel would take the whole scale
        low, high = min([0, *values]), min(max([1, *values]), 3)
        draw_heads(ax, result.rows, column, "", low, high)
        ax.set(title=label)
    return figure


DIAGNOSTIC = Diagnostic(
    name="jacobian_energy",
    about=__doc__,
    columns={"layer": "from 0", "head": "from 0", **SPLIT},
    measure=measure,
    draw=draw,
    reading=(
        "How to read it: cos_diag near 1 says that the diagonal of the softmax Jacobian alone points where the full "
        "gradient does, so the lateral sum is not needed there; far below 1 says that it is critical. r_diag, "
        "r_lateral and r_cross add up to 1, but the split is not orthogonal: r_diag above 1 with r_cross far below 0 "
        "says that diagonal and lateral part cancel. The gradient of the scores is not yet that of the parameters: the "
        "table gradients, and the summary's gradient_…, say how much of a training step's direction (cos) and length "
        "(norm_ratio) is left; query_key_gradient_… says it of the rows of c_attn that make q and k, which learn "
        "through the scores alone. What comes after the last layer's scores does not depend on the backward: cos 1."
    ),
    tables={
        "layers": {
            "layer": "its heads pooled: energies summed, ratios those of the sums, the rest averaged",
            **dict.fromkeys(SPLIT, "as above"),
        },
        "gradients": GRADIENTS,
    },
    batches=2,
    batch_size=4,
)


def main() -> None:
    run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
