"""Where are the outliers in a checkpoint's activations? Moments of every tensor on the way through the model, by
channel, token and sequence; and of the attention, by head: does it sink into the first token, does it attend at all?"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from harness.device import add_dtype
from harness.diagnostics import Diagnostic, Result, Subject
from harness.figures import RUN_STYLES, draw_heads, integer_ticks, new_figure, scale_tails
from measure.activations import DORMANT, EARLY, OUTLIER_RMS, SINK, Activations, SequenceStatistics, no_distribution
from measure.massive import LARGE, TIMES, Magnitudes, looking
from measure.moments import COLUMNS
from measure.outliers import (
    by_layer,
    constant,
    first_token_spikes,
    massive,
    massive_row,
    nonfinite,
    outlier_channels,
    sink_heads,
    summarize,
    where_largest,
)
from measure.probe import TENSORS, kind_of


def measure(subject: Subject) -> Result:
    activations = Activations(subject.model, triggers=subject.corpus.meta.get("triggers", ()))
    magnitudes: dict[str, Magnitudes] = {}
    T = 0
    with looking(subject.model, magnitudes, Magnitudes.count):
        for x, _ in subject.batches(what="activations"):
            activations.update(x)
            T = x.size(1)
    with looking(subject.model, magnitudes, Magnitudes.collect), torch.no_grad():
        for x, _ in subject.batches(what="medians"):
            subject.model.features(x)
    columns, rows = list(DIAGNOSTIC.columns), []

    def add(name: str, statistics: SequenceStatistics) -> None:
        rows.append(dict.fromkeys(columns) | {"name": name} | statistics.row())

    for name, tensor in activations.tensors.items():
        add(name, tensor.all)
        found = magnitudes[name].found() if name in magnitudes else None
        rows[-1] |= massive_row(found) | {"first_norm_ratio": tensor.first_norm_ratio}
        add(f"{name} [first token]", tensor.first)
        add(f"{name} [other tokens]", tensor.others)
        if name.endswith("attn.v"):
            attention = activations.attention[int(name.split(".")[2])]
            where = name.removesuffix("v") + "probabilities"
            add(where, attention.all)
            add(f"{where} [visible]", attention.visible)
            add(f"{where} [late]", attention.late)

    of_heads = {layer: attention.figures for layer, attention in activations.attention.items()}
    heads = [
        {"layer": layer, "head": head}
        | {name: finite(figures[name][head].item()) for name in DIAGNOSTIC.tables["heads"] if name in figures}
        for layer, figures in of_heads.items()
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
        + massive(rows)
        + first_token_spikes(activations)
        + outlier_channels(activations)
        + sink_heads(heads)
    )
    tables = {"layers": by_layer(rows, heads), "heads": heads}
    return Result(rows, summarize(rows, heads) | {"sequences": sequences, "T": T}, notes, tables)


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


SINKS = {
    "sink_rate": "the share of sequences in which the first key's attention, averaged over all queries, "
    f"exceeds {SINK} (Gu et al. 2024); it depends on T, which is in the summary",
    "first_mass": "what a query gives to the first key, averaged over all queries; the first one sees no other",
    "first_mass_without_query0": "the same without the first query",
    "dormant": f"the share of queries, without the first, that give the first key more than {DORMANT} (Guo et al. "
    "2024)",
}
HEADS = {
    **SINKS,
    **{f"{name}_over_row_mass": f"{name} of each query's weights over their sum" for name in SINKS},
    "max_score": "the largest visible score q·k/√D, before the normalizer",
    "value_drain": "‖v₀‖ of the first token over ‖v_j‖ of the others, each averaged over sequences (Guo et al. 2024); "
    "where queries are grouped, of the values that they share",
    "row_mass": "what a query gives to keys, averaged over queries: 1 under softmax, less with a null slot",
    "null_mass": "what the null slot gets, averaged over queries; – of weights that are no softmax",
    "entropy": "of a query's attention in nats, averaged over queries; a null slot is part of the "
    "distribution; where the normalizer is no softmax, of the row over its own mass",
    "first_token_trigger": "on a corpus with triggers, whose meta.json names them (data/backcopy): what their queries "
    f"give to the first key, averaged over those of all sequences from position {EARLY} on",
    "first_token_ordinary": "the same of all other queries: where there is nothing to copy, a head sinks",
    "first_token_trigger_over_row_mass": "first_token_trigger of each query's weights over their sum",
    "first_token_ordinary_over_row_mass": "and of all other queries",
    "row_mass_trigger": "what these trigger queries give to keys",
    "row_mass_ordinary": "and what the others give",
}
LAYERS = {
    "layer": "from 0",
    **{name: "mean over the layer's heads, see heads" for name in HEADS},
    "max_score": "the largest of its heads",
    "residual_peak": "first_norm_ratio of its block's output: ‖h₀‖ over ‖h_j‖",
    "max_abs": "the largest |h| of its block's output",
    "token": "where that is: its position in the window, from 0",
    "channel": "and its channel",
    "max_over_median": "max_abs over the median |h|",
    "massive": f"whether that output has massive activations: |h| > {LARGE:g} and > {TIMES:g} × the median",
}

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
        "mean_norm": "the Euclidean norm ‖x‖ of a token, averaged over tokens",
        "per_token_kurtosis": "excess kurtosis over the channels of a token, averaged over tokens (Kaul et al. 2025)",
        "channel_rms_kurtosis": "E[s⁴]/E[s²]² over the channels' root mean squares s: 1 where all channels are alike, "
        "the number of channels where one has everything (He et al. 2024)",
        "outlier_channels": f"the channels whose root mean square exceeds {OUTLIER_RMS:g} × the median channel's; "
        "of an even number the lower one's, as of all medians here",
        "per_sequence_kurtosis": "kurtosis of a sequence's elements, averaged over sequences: not excess, a Gaussian "
        "gives 3 (Bondarenko et al. 2023, without their 1e-6 in the denominator)",
        "per_sequence_max_abs": "largest |x| of a sequence, averaged over sequences: their infinity norm",
        "median_abs": "median |x| of all elements; this and the following columns are "
        "of the whole tensor alone, and but for first_norm_ratio not of the logits",
        "max_over_median": "max_abs / median_abs",
        "max_at": "where the largest |x| is: sequence, token (its position in the window) and channel, from 0",
        "massive_at": f"token and channel of the massive activations: |x| > {LARGE:g} and > {TIMES:g} × the median "
        "(Sun et al. 2024), in whichever sequences; empty where there is none",
        "first_norm_ratio": "‖x₀‖ of the first token over ‖x_j‖ of the others, each averaged over sequences: of a "
        "block's output the residual peak, of attn.v the value drain of all heads together (Guo et al. 2024)",
    },
    measure=measure,
    draw=draw,
    add_arguments=add_dtype,
    headlines={
        "avg kurtosis": "a Gaussian's is 3; lower: fewer outliers",
        "max infinity norm": "|x|; lower: fewer outliers",
        "sink_rate": "share of sequences; lower: fewer sinks",
        "row_mass": "attention given to keys",
    },
    shown=lambda row: not row["name"].endswith(" token]") and not row["name"].endswith(" tokens]"),
    tables={"layers": LAYERS, "heads": {"layer": "from 0", "head": "from 0"} | HEADS},
    reading="How to read it: the pooled kurtosis is large where few elements lie far out, but it is the same whether "
    "they lie in one channel, in one token or anywhere. If channel_rms_kurtosis is far above 1, some channels are "
    "large in all tokens; if per_token_kurtosis is far above 0, tokens have channels far out; if the first token's "
    "max_abs is far above the others', it is a spike of that token, mostly where heads sink into it. The summary's avg "
    "kurtosis, max kurtosis and max infinity norm are over block outputs, attention projections, MLP outputs and layer "
    "norms, as in Bondarenko et al.; the kurtosis of attention probabilities is the mean over layers, as quietGPT logs "
    "it. It is mostly that of the first queries, which see few keys: compare normalizers by [late], without the first "
    f"{EARLY}.",
)
