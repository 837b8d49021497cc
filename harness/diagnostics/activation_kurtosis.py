"""Where are the outliers in a checkpoint's activations? Moments of every tensor on the way through the model, by
channel, token and sequence; and of the attention, by head: does it sink into the first token, does it attend at all?"""

import math

import numpy as np
from matplotlib.figure import Figure

from harness.diagnostics import Diagnostic, Result, Subject
from harness.figures import RUN_STYLES, draw_heads, integer_ticks, new_figure, scale_tails
from measure.activations import EARLY, OUTLIER_RMS, SINK, Activations, SequenceStatistics, no_distribution
from measure.moments import COLUMNS
from measure.outliers import (
    constant,
    first_token_spikes,
    nonfinite,
    outlier_channels,
    sink_heads,
    summarize,
    where_largest,
)
from measure.probe import TENSORS, kind_of


def measure(subject: Subject) -> Result:
    activations = Activations(subject.model)
    T = 0
    for x, _ in subject.batches(what="activations"):
        activations.update(x)
        T = x.size(1)
    columns, rows = list(DIAGNOSTIC.columns), []

    def add(name: str, statistics: SequenceStatistics) -> None:
        rows.append(dict.fromkeys(columns) | {"name": name} | statistics.row())

    for name, tensor in activations.tensors.items():
        add(name, tensor.all)
        add(f"{name} [first token]", tensor.first)
        add(f"{name} [other tokens]", tensor.others)
        if name.endswith("attn.v"):
            attention = activations.attention[int(name.split(".")[2])]
            where = name.removesuffix("v") + "probabilities"
            add(where, attention.all)
            add(f"{where} [visible]", attention.visible)
            add(f"{where} [late]", attention.late)

    figures = ("sink_rate", "row_mass", "entropy")
    heads = [
        {"layer": layer, "head": head} | {name: finite(getattr(attention, name)[head].item()) for name in figures}
        for layer, attention in activations.attention.items()
        for head in range(subject.model.config.n_head)
    ]
    sequences = activations.attention[0].sequences
    notes = [f"{sequences} sequences of T = {T} tokens, from {subject.corpus.folder}, {subject.args.split}"]
    notes += no_distribution(subject.model)
    notes += [] if T > EARLY else [f"[late] has no value: no query comes after the first {EARLY}"]
    notes += (
        where_largest(rows)
        + nonfinite(rows)
        + constant(rows)
        + first_token_spikes(activations)
        + outlier_channels(activations)
        + sink_heads(heads)
    )
    return Result(rows, summarize(rows, heads) | {"sequences": sequences, "T": T}, notes, {"heads": heads})


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(result: Result, title: str) -> Figure:
    figure, panels = new_figure(2, 3)

    def lines(panel, column: str, parts: dict[str, str]) -> None:
        for (kind, label), style in zip(parts.items(), RUN_STYLES, strict=False):
            values = [row[column] for row in result.rows if kind_of(row["name"]) == kind]
            panel.plot(range(len(values)), [np.nan if v is None else v for v in values], label=label, **style)

    parts = {
        "transformer.h": "block's output",
        "attn.output": "heads' output",
        "attn.c_proj": "its projection",
        "mlp.hidden": "MLP, hidden",
        "mlp.c_proj": "MLP, output",
    }
    lines(panels[0], "excess_kurtosis", parts | {"attn.probabilities": "attention weights"})
    panels[0].set(title="All elements pooled", ylabel="excess kurtosis")
    lines(panels[1], "channel_rms_kurtosis", parts)
    panels[1].set(title="Outlier channels", ylabel="kurtosis of channels' RMS")
    lines(
        panels[2], "max_abs", {"transformer.h [first token]": "first token", "transformer.h [other tokens]": "others"}
    )
    panels[2].set(title="Residual stream after the block", ylabel="largest |x| of an element")
    panels[2].legend()
    for panel in panels[:3]:
        scale_tails(panel)
        panel.set_xlabel("layer")
        integer_ticks(panel.xaxis)
    heads = result.tables["heads"]
    draw_heads(panels[3], heads, "sink_rate", f"share of sequences > {SINK}", 0, 1)
    panels[3].set(title="Sink rate")
    draw_heads(panels[4], heads, "row_mass", "attention given to keys", 0, 1)
    panels[4].set(title="Row mass")
    draw_heads(panels[5], heads, "entropy", "nats", 0)
    panels[5].set(title="Entropy")
    lines_of = panels[0].get_legend_handles_labels()
    figure.legend(*lines_of, loc="outside lower center", ncols=6, title="above, left and middle:")
    figure.suptitle(f"{title}: activations")
    return figure


DIAGNOSTIC = Diagnostic(
    name="activation_kurtosis",
    about=__doc__,
    columns={
        "name": "the tensor, by the module it comes out of. "
        + "; ".join(f"{part}: {meaning}" for part, meaning in TENSORS.items())
        + "; attn.probabilities: the attention weights, causal zeros included (what quietGPT logs), [visible]: "
        f"without them, [late]: without the first {EARLY} queries, whose weights are large by definition unless a null "
        "slot takes them. [first token], [other tokens]: the same, apart (in the JSON)",
        **COLUMNS,
        "per_token_kurtosis": "excess kurtosis over the channels of a token, averaged over tokens (Kaul et al. 2025)",
        "channel_rms_kurtosis": "E[s⁴]/E[s²]² over the channels' root mean squares s: 1 where all channels are alike, "
        "the number of channels where one has everything (He et al. 2024)",
        "outlier_channels": f"the channels whose root mean square exceeds {OUTLIER_RMS:g} × the median channel's",
        "per_sequence_kurtosis": "kurtosis of a sequence's elements, averaged over sequences: not excess, a Gaussian "
        "gives 3 (Bondarenko et al. 2023, without their 1e-6 in the denominator)",
        "per_sequence_max_abs": "largest |x| of a sequence, averaged over sequences: their infinity norm",
    },
    measure=measure,
    draw=draw,
    headlines={
        "avg kurtosis": "a Gaussian's is 3; lower: fewer outliers",
        "max infinity norm": "|x|; lower: fewer outliers",
        "sink_rate": "share of sequences; lower: fewer sinks",
        "row_mass": "attention given to keys",
    },
    shown=lambda row: not row["name"].endswith(" token]") and not row["name"].endswith(" tokens]"),
    tables={
        "heads": {
            "layer": "from 0",
            "head": "from 0",
            "sink_rate": "the share of sequences in which the first key's attention, averaged over all queries, "
            f"exceeds {SINK} (Gu et al. 2024); it depends on T, which is in the summary",
            "row_mass": "what a query gives to keys, averaged over queries: 1 under softmax, less with a null slot",
            "entropy": "of a query's attention in nats, averaged over queries; a null slot is part of the "
            "distribution; where the normalizer is no softmax, of the row over its own mass",
        },
    },
    reading="How to read it: the pooled kurtosis is large where few elements lie far out, but it is the same whether "
    "they lie in one channel, in one token or anywhere. If channel_rms_kurtosis is far above 1, some channels are "
    "large in all tokens; if per_token_kurtosis is far above 0, tokens have channels far out; if the first token's "
    "max_abs is far above the others', it is a spike of that token, mostly where heads sink into it. The summary's avg "
    "kurtosis, max kurtosis and max infinity norm are over block outputs, attention projections, MLP outputs and layer "
    "norms, as in Bondarenko et al.; the kurtosis of attention probabilities is the mean over layers, as quietGPT logs "
    "it. It is mostly that of the first queries, which see few keys: compare normalizers by [late], without the first "
    f"{EARLY}.",
)
