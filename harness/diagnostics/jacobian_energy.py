"""How much of the gradient through attention is lateral, per layer and head; and what the parameters' gradients lose
without it: the split of the softmax Jacobian into its diagonal and the rest, on real batches with the real gradient.

The loss L is each batch's own mean, so that a sequence's gradient is in proportion to 1 / --batch-size, and the
energies, which are sums of squares over all sequences, to 1 / --batch-size squared. Ratios and cosines do not depend on
it. Sequences run one at a time. The backward pass is the full one, whatever the checkpoint was trained with; then the
same weights and batches run again with the diagonal one, with the rows' sums held constant (detached), and with
straight-through (ste).

Of a checkpoint that was trained by another training.feedback than backprop, the gradients of all of this are those that
its feedback gives. The table backprop_rows has what backpropagation gives in their place, and feedback compares both.
"""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.checkpoint import feedback_of
from harness.device import add_dtype
from harness.diagnostics import Diagnostic, Result, Subject
from harness.errors import UserError
from harness.figures import draw_heads, new_figure
from measure.activations import no_distribution
from measure.feedback import Comparison, compare_with_backprop, trained_by
from measure.gradients import compare, findings, finite, not_computed, run_backwards
from measure.jacobian import cosine_and_norm_ratio, pool
from measure.perplexity import nonfinite_weights

SPLIT = {
    "mean_attention": "mean weight A_ij over j ≤ i",
    "entropy": "of a row of A, in nats, averaged; a null slot counts as one of the row's; "
    "where the normalizer is no softmax, of the row over its own mass",
    "row_mass": "Σ_j A_ij, averaged over rows: 1 under softmax; the rest goes to the null slot",
    "e_full": "Σ s², s_ij = A_ij (g_ij − Σ_k A_ik g_ik) the gradient of the scores, g = dL/dA; a null slot that has a "
    "value (kvbias) is one of the k",
    "e_diag": "Σ d², d_ij = A_ij (1 − A_ij) g_ij: what the Jacobian's diagonal passes on",
    "e_lateral": "Σ o², o = s − d: what comes from the other entries of the row",
    "e_cross": "2 Σ d·o; e_full = e_diag + e_lateral + e_cross",
    "r_diag": "e_diag / e_full; above 1 where diagonal and lateral part cancel",
    "r_lateral": "e_lateral / e_full",
    "r_cross": "e_cross / e_full; the three add up to 1",
    "r_offdiag": "1 − r_diag",
    "cos_diag": "cosine of d and s over a sequence's (i, j ≤ i), averaged over sequences",
    "cos_detached": "cosine of A g and s, likewise: what is kept where the row's sum is held constant (detached)",
    "cos_ste": "cosine of g and s, likewise: what straight-through keeps of the direction",
    "jacobian_diag": "Σ_j A²(1 − A)², averaged over rows: of the Jacobian alone, the squared norm of its diagonal",
    "jacobian_offdiag": "(Σ_j A²)² − Σ_j A⁴, averaged over rows: that of the rest",
}
GRADIENTS = {
    "parameter": "of the model, by name; a head that is tied to the token embedding is part of it",
    "cos_diagonal": "cosine of its gradient under the diagonal backward with the full one's",
    "norm_ratio_diagonal": "norm of its gradient under the diagonal backward over the full one's",
    "cos_detached": "the same cosine, the rows' sums held constant",
    "norm_ratio_detached": "the same ratio, the rows' sums held constant",
    "cos_ste": "the same cosine, straight through",
    "norm_ratio_ste": "the same ratio, straight through",
}
FEEDBACK = {
    "parameter": "of the model, by name",
    "cosine": "of its gradient under the feedback with backpropagation's",
    "norm_ratio": "norm of its gradient under the feedback over backpropagation's",
    "h_norm": "‖h‖ of a token, h the output of the layer that the parameter is of: root mean square over tokens",
    "g_norm": "‖g‖ likewise, g the gradient that arrives at h under the feedback",
    "backprop_g_norm": "‖g‖ under backpropagation; where a final norm has made it tiny, the cosine is noise",
}

PANELS = {
    "r_diag": "r_diag: diagonal over full energy",
    "r_lateral": "r_lateral: lateral over full energy",
    "cos_diag": "cos_diag: cosine of diagonal and full",
    "cos_ste": "cos_ste: cosine of ste and full",
}


def measure(subject: Subject) -> Result:
    model = subject.model
    (how, matrices), beside = feedback_of(subject.info, subject.path), None

    def batches(what: str):
        return subject.batches(what=what)

    try:
        with trained_by(model, how, matrices):
            loss, sequences, splits, parameters, products = run_backwards(model, batches)
        if how != "backprop":
            beside = compare_with_backprop(model, how, matrices, batches)
    except ValueError as e:
        raise UserError(f"{subject.path}: {e}") from e
    layers = [pool(split) for split in splits]
    queries_keys = [name for name in products["ste"] if name not in parameters]
    summary = {
        "loss": loss if math.isfinite(loss) else None,
        **finite(pool([split for layer in splits for split in layer], over_heads=True)),
        **{f"gradient_{name}": value for name, value in compare(products, parameters).items()},
        **{f"query_key_gradient_{name}": value for name, value in compare(products, queries_keys).items()},
    }
    gradients = [{"parameter": name, **compare(products, [name])} for name in parameters]
    pooled = [{"layer": layer, **finite(pool(split, over_heads=True))} for layer, split in enumerate(splits)]
    notes = [
        f"{sequences} windows of {model.config.block_size} tokens",
        *nonfinite_weights(model),
        *no_distribution(model),
        *not_computed(model.config.normalizer),
        *findings(layers, loss, products),
    ]
    tables: dict[str, list[dict]] = {"layers": pooled, "gradients": gradients}
    if beside:
        notes.append(f"the gradients are those of its training's feedback, {how}; see backprop_rows for the true ones")
        summary |= beside_backprop(beside, tables)
    return Result(rows_of(layers), summary, notes, tables)


def rows_of(layers: list[dict[str, Tensor]]) -> list[dict]:
    """A row a head, of each layer's columns (H,)."""
    return [
        {"layer": layer, "head": head, **finite({name: column[head] for name, column in columns.items()})}
        for layer, columns in enumerate(layers)
        for head in range(len(columns["r_diag"]))
    ]


def beside_backprop(found: Comparison, tables: dict[str, list[dict]]) -> dict[str, float | None]:
    """Add the tables of a comparison to the others, and return what it adds to the summary."""
    tables["backprop_rows"] = rows_of([pool(split) for split in found.splits])
    tables["feedback"] = []
    for name, products in found.products.items():
        values = dict(zip(("cosine", "norm_ratio"), cosine_and_norm_ratio(products), strict=True))
        norms = dict.fromkeys(("h_norm", "g_norm", "backprop_g_norm")) | found.norms.get(name.rpartition(".")[0], {})
        tables["feedback"].append({"parameter": name, **finite(values | norms)})
    whole = pool([split for layer in found.splits for split in layer], over_heads=True)
    cosine, ratio = cosine_and_norm_ratio(sum(found.products.values(), start=torch.zeros(3, dtype=torch.float64)))
    summary = {f"backprop_{name}": whole[name] for name in ("r_diag", "cos_diag", "cos_ste")}
    return finite(summary | {"feedback_cosine": cosine, "feedback_norm_ratio": ratio})


def draw(result: Result, title: str) -> Figure:
    figure, axes = new_figure(2, 2)
    figure.suptitle(title)
    for ax, (column, label) in zip(axes, PANELS.items(), strict=True):
        values = [row[column] for row in result.rows if row[column] is not None]
        # The colours cover 0 to 1 at least, and end at 3: a head whose parts nearly cancel would take up all of them.
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
    add_arguments=add_dtype,
    headlines={
        "r_diag": "diagonal over full energy",
        "cos_diag": "of the scores' gradient; 1: as the full one",
        "gradient_cos_diagonal": "of all parameters'; 1: as the full one",
        "gradient_cos_ste": "of all parameters'; 1: as the full one",
    },
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
        "backprop_rows": {"layer": "from 0", "head": "from 0", **dict.fromkeys(SPLIT, "as above")},
        "feedback": FEEDBACK,
    },
    batches=2,
    batch_size=4,
)
