"""Where are the outliers in a checkpoint's activations? Moments of every tensor on the way through the model, by
channel, token and sequence; and of the attention, by head: does it sink into the first token, does it attend at all?"""

import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

from harness.diagnostics import Diagnostic, Result, Subject, run
from harness.errors import run_cli
from harness.figures import RUN_STYLES, draw_heads, new_figure, scale_tails
from measure.activations import OUTLIER_RMS, SINK, Activations, SequenceStatistics, no_distribution
from measure.moments import COLUMNS
from measure.probe import TENSORS

SPIKE = 6.0
"""The first token spikes where its largest |x| exceeds that of all other tokens this many times."""
BONDARENKO = ("transformer.h", "attn.c_proj", "mlp.c_proj", "ln_1", "ln_2", "transformer.ln_f")
"""The tensors that Bondarenko et al. (2023) average over, as keys of TENSORS."""


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

    figures = ("sink_rate", "row_mass", "entropy")
    heads = [
        {"layer": layer, "head": head} | {name: finite(getattr(attention, name)[head].item()) for name in figures}
        for layer, attention in activations.attention.items()
        for head in range(subject.model.config.n_head)
    ]
    sequences = activations.attention[0].sequences
    notes = [f"{sequences} sequences of T = {T} tokens, from {subject.corpus.folder}, {subject.args.split}"]
    notes += no_distribution(subject.model)
    notes += (
        nonfinite(rows)
        + constant(rows)
        + first_token_spikes(activations)
        + outlier_channels(activations)
        + sink_heads(heads)
    )
    return Result(rows, summarize(rows, heads) | {"sequences": sequences, "T": T}, notes, {"heads": heads})


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarize(rows: list[dict], heads: list[dict]) -> dict[str, float | None]:
    """A value is None where one that goes into it does not exist: nothing is averaged away."""

    def over(how, values: list[float | None]) -> float | None:
        return None if None in values else float(how(values))

    theirs = [row for row in rows if "[" not in row["name"] and kind_of(row["name"]) in BONDARENKO]
    summary = {
        "avg kurtosis": over(np.mean, [row["per_sequence_kurtosis"] for row in theirs]),
        "max kurtosis": over(max, [row["per_sequence_kurtosis"] for row in theirs]),
        "max infinity norm": over(max, [row["per_sequence_max_abs"] for row in theirs]),
    }
    for name, suffix in (("attention kurtosis", "probabilities"), ("attention kurtosis (visible)", "[visible]")):
        summary[name] = over(np.mean, [row["excess_kurtosis"] for row in rows if row["name"].endswith(suffix)])
    return summary | {
        name: over(np.mean, [head[name] for head in heads]) for name in ("sink_rate", "row_mass", "entropy")
    }


def kind_of(name: str) -> str:
    """transformer.h.3.attn.q → attn.q, and transformer.h.3 → transformer.h: a key of TENSORS."""
    layer = re.match(r"transformer\.h\.\d+(\.)?", name)
    if layer is None:
        return name
    return name[layer.end() :] if layer[1] else "transformer.h" + name[layer.end() :]


# --- findings, in words -----------------------------------------------------------------------------------------------


def nonfinite(rows: list[dict]) -> list[str]:
    return [
        f"{row['name']}: {row['nonfinite']} of its {row['nonfinite'] + row['count']} numbers are NaN or infinite"
        for row in rows
        if row["nonfinite"] and "[" not in row["name"]
    ]


def constant(rows: list[dict]) -> list[str]:
    """Why a kurtosis does not exist, and with it what is averaged over it."""
    found, named = [], set()
    for row in rows:
        tensor = row["name"].partition(" [")[0]  # it comes before its parts, and speaks for them
        if row["nonfinite"] or not row["count"] or tensor in named:
            continue
        if row["std"] == 0:
            what = f"all equal to {row['mean']:g}, so it has no kurtosis"
        elif row["per_sequence_kurtosis"] is None:
            what = "all equal within a sequence, so it has no per_sequence_kurtosis"
        else:
            continue
        named.add(tensor)
        found.append(f"{row['name']}: {what}")
    return found


def first_token_spikes(activations: Activations) -> list[str]:
    found = []
    for name, tensor in activations.tensors.items():
        first, others = tensor.first.moments.max_abs, tensor.others.moments.max_abs
        if None in (first, others) or tensor.first.moments.nonfinite or first <= SPIKE * others:
            continue
        times = f"{first / others:.1f} × that of all other tokens" if others else "0 in all other tokens"
        channel = tensor.first.channel_rms.argmax()
        found.append(f"first-token spike in {name}, channel {channel}: max |x| {first:.4g}, {times}")
    return found


def outlier_channels(activations: Activations) -> list[str]:
    """A line for each kind of tensor: channel 5 of the residual stream is the same channel in all layers."""
    found = []
    for kind, meaning in TENSORS.items():
        tensors = {name: tensor for name, tensor in activations.tensors.items() if kind_of(name) == kind}
        for which in ("first", "others"):
            where: dict[int, list[tuple[float, str]]] = {}
            for name, tensor in tensors.items():
                for channel, ratio in (getattr(tensor, which).outlier_channels or {}).items():
                    where.setdefault(channel, []).append((ratio, name))
            worst = sorted(where.items(), key=lambda item: max(item[1]), reverse=True)
            named = [
                f"{channel} (RMS {max(seen)[0]:.1f} × the median in {max(seen)[1]}, {len(seen)} of {len(tensors)})"
                for channel, seen in worst[:3]
            ]
            if named:
                tokens = {"first": "first token", "others": "other tokens"}[which]
                more = f", and {len(worst) - 3} more" if len(worst) > 3 else ""
                found.append(f"outlier channels of {meaning}, {tokens}: {', '.join(named)}{more}")
    return found


def sink_heads(heads: list[dict]) -> list[str]:
    sinks = [h for h in heads if (h["sink_rate"] or 0) > 0.5]
    named = ", ".join(f"{h['layer']}.{h['head']} ({h['sink_rate']:.0%})" for h in sinks)
    return [f"sink heads, layer.head (share of sequences): {named}"] if sinks else []


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(result: Result, title: str) -> Figure:
    figure, panels = new_figure(2, 3)

    def lines(panel, column: str, parts: dict[str, str]) -> None:
        for (kind, label), style in zip(parts.items(), RUN_STYLES, strict=False):
            values = [row[column] for row in result.rows if kind_of(row["name"]) == kind]
            panel.plot(range(len(values)), [np.nan if v is None else v for v in values], label=label, **style)

    parts = {
        "transformer.h": "block",
        "attn.output": "attention",
        "attn.c_proj": "its projection",
        "mlp.gelu": "MLP, hidden",
        "mlp.c_proj": "MLP, output",
    }
    lines(panels[0], "excess_kurtosis", parts | {"attn.probabilities": "probabilities"})
    panels[0].set(title="All elements pooled", ylabel="excess kurtosis")
    lines(panels[1], "channel_rms_kurtosis", parts)
    panels[1].set(title="Outlier channels", ylabel="kurtosis of channels' RMS")
    lines(
        panels[2], "max_abs", {"transformer.h [first token]": "first token", "transformer.h [other tokens]": "others"}
    )
    panels[2].set(title="Residual stream after the block", ylabel="largest |x|")
    panels[2].legend()
    for panel in panels[:3]:
        scale_tails(panel)
        panel.set_xlabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
    heads = result.tables["heads"]
    draw_heads(panels[3], heads, "sink_rate", f"share of sequences > {SINK}", 0, 1)
    panels[3].set(title="Sink rate")
    draw_heads(panels[4], heads, "row_mass", "attention given to keys", 0, 1)
    panels[4].set(title="Row mass")
    draw_heads(panels[5], heads, "entropy", "nats", 0)
    panels[5].set(title="Entropy")
    lines_of = panels[0].get_legend_handles_labels()
    figure.legend(*lines_of, loc="outside lower center", ncols=6, title="left and middle, above")
    figure.suptitle(f"{title}: activations")
    return figure


DIAGNOSTIC = Diagnostic(
    name="activation_kurtosis",
    about=__doc__,
    columns={
        "name": "the tensor, by the module it comes out of. "
        + "; ".join(f"{part}: {meaning}" for part, meaning in TENSORS.items())
        + "; attn.probabilities: the attention weights, causal zeros included (what quietGPT logs), [visible]: "
        "without them. [first token], [other tokens]: the same, apart (in the JSON)",
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
    "norms, as in Bondarenko et al.; attention kurtosis is the mean over layers, as quietGPT logs it.",
)


def main() -> None:
    run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
