"""What the statistics of a model's activations come to: a summary in a few figures, and findings in words.

`rows` are those of diagnostics/activation_kurtosis: a dict for each tensor (SequenceStatistics.row, massive_row), under
its `name`; `heads` have `layer`, `head` and the figures of AttentionStatistics. A figure that does not exist is None.
"""

import numpy as np
from torch import Tensor

from measure.activations import Activations
from measure.massive import Massive
from measure.probe import TENSORS, kind_of
from model import GPT

SPIKE = 6.0
"""The first token spikes where its largest |x| exceeds that of all other tokens this many times."""
BONDARENKO = ("transformer.h", "attn.c_proj", "mlp.c_proj", "ln_1", "ln_2", "transformer.ln_f")
"""The tensors that Bondarenko et al. (2023) average over, as keys of TENSORS."""


def summarize(rows: list[dict], heads: list[dict]) -> dict[str, float | None]:
    """A value is None where one that goes into it does not exist."""
    theirs = of_their_tensors(rows)
    summary = {
        "avg kurtosis": over(np.mean, [row["per_sequence_kurtosis"] for row in theirs]),
        "max kurtosis": over(max, [row["per_sequence_kurtosis"] for row in theirs]),
        "max infinity norm": over(max, [row["per_sequence_max_abs"] for row in theirs]),
    }
    for which in ("", " [visible]", " [late]"):
        kurtosis = [row["excess_kurtosis"] for row in rows if row["name"].endswith(f"attn.probabilities{which}")]
        summary[f"kurtosis of attention probabilities{which}"] = over(np.mean, kurtosis)
    residual = [row for row in rows if kind_of(row["name"]) == "transformer.h"]
    means = [name for name in heads[0] if name not in ("layer", "head", "max_score", "value_drain")]
    drains = [layer["value_drain"] for layer in by_layer(rows, heads)]
    return (
        summary
        | {name: over(np.mean, [head[name] for head in heads]) for name in means}
        | {
            "max_score": over(max, [head["max_score"] for head in heads]),
            "value_drain": over(min, drains),
            "residual_peak": over(max, [row["first_norm_ratio"] for row in residual]),
            "residual_max_abs": over(max, [row["max_abs"] for row in residual]),
            "residual_max_over_median": over(max, [row["max_over_median"] for row in residual]),
            "massive_layers": over(
                sum, [None if row["massive_at"] is None else bool(row["massive_at"]) for row in residual]
            ),
        }
    )


def by_layer(rows: list[dict], heads: list[dict]) -> list[dict]:
    """A row for each layer: means over its heads, their largest score, and the residual peak and the largest element of
    its block's output."""
    named, layers = {row["name"]: row for row in rows}, []
    for layer in dict.fromkeys(head["layer"] for head in heads):
        of_layer = [head for head in heads if head["layer"] == layer]
        block = named[f"transformer.h.{layer}"]
        means = [name for name in of_layer[0] if name not in ("layer", "head", "max_score")]
        at = block["max_at"] or (None, None, None)
        layers.append(
            {"layer": layer}
            | {name: over(np.mean, [head[name] for head in of_layer]) for name in means}
            | {
                "max_score": over(max, [head["max_score"] for head in of_layer]),
                "residual_peak": block["first_norm_ratio"],
                "max_abs": block["max_abs"],
                "token": at[1],
                "channel": at[2],
                "max_over_median": block["max_over_median"],
                "massive": None if block["massive_at"] is None else bool(block["massive_at"]),
            }
        )
    return layers


def of_their_tensors(rows: list[dict]) -> list[dict]:
    """The rows that Bondarenko et al.'s figures are over."""
    return [row for row in rows if "[" not in row["name"] and kind_of(row["name"]) in BONDARENKO]


def activation_metrics(model: GPT, idx: Tensor) -> dict[str, float | None]:
    """What training logs of the activations on idx (B, T), int64: means over layers, and over heads of what a head has;
    of the largest |x|, that of all layers. None where a layer has no value."""
    activations = Activations(model, kinds=("transformer.h",)).update(idx)
    attention, residual = activations.attention.values(), [x.all.moments for x in activations.tensors.values()]
    figures: dict[str, list[float | None]] = {
        "activation_kurtosis/attention_probabilities": [layer.all.moments.excess_kurtosis for layer in attention],
        "activation_kurtosis/attention_probabilities_late": [layer.late.moments.excess_kurtosis for layer in attention],
        "activation_kurtosis/residual_stream": [moments.excess_kurtosis for moments in residual],
        "sink_rate": [layer.sink_rate.mean().item() for layer in attention],
        "row_mass": [layer.row_mass.mean().item() for layer in attention],
    }
    return {name: over(np.mean, values) for name, values in figures.items()} | {
        "activation_max_abs/residual_stream": over(max, [moments.max_abs for moments in residual])
    }


def over(how, values: list[float | None]) -> float | None:
    """None where one of the values does not exist: nothing is averaged away."""
    return None if None in values else float(how(values))


# --- findings, in words -----------------------------------------------------------------------------------------------


def nonfinite(rows: list[dict]) -> list[str]:
    """Tensors with numbers that are NaN or infinite."""
    return [
        f"{row['name']}: {row['nonfinite']} of its {row['nonfinite'] + row['count']} numbers are NaN or infinite"
        for row in rows
        if row["nonfinite"] and "[" not in row["name"]
    ]


def where_largest(rows: list[dict]) -> list[str]:
    """The tensors that the summary's maxima are of."""
    found = []
    for name, column in (("max kurtosis", "per_sequence_kurtosis"), ("max infinity norm", "per_sequence_max_abs")):
        theirs = of_their_tensors(rows)
        if theirs and None not in [row[column] for row in theirs]:
            row = max(theirs, key=lambda row: row[column])
            found.append(f"{name}: {row[column]:.4g}, of {row['name']}")
    return found


def constant(rows: list[dict]) -> list[str]:
    """Notes on the tensors without a kurtosis: what is averaged over them has no value either."""
    found, named = [], set()
    for row in rows:
        tensor = row["name"].partition(" [")[0]  # the whole tensor comes first; its parts get no note of their own
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
    """Tensors whose largest |x| lies in the first token, by far."""
    found = []
    for name, tensor in activations.tensors.items():
        first, others = tensor.first.moments.max_abs, tensor.others.moments.max_abs
        rms = tensor.first.channel_rms  # None where a number is NaN or infinite
        if first is None or others is None or rms is None or first <= SPIKE * others:
            continue
        times = f"{first / others:.1f} × that of all other tokens" if others else "0 in all other tokens"
        found.append(f"first-token spike in {name}, channel {rms.argmax()}: max |x| {first:.4g}, {times}")
    return found


def massive_row(found: Massive | None) -> dict:
    """The columns of a tensor that say where its largest element is and which are massive."""
    if found is None:
        return dict.fromkeys(("max_at", "median_abs", "max_over_median", "massive_at"))
    return {
        "max_at": list(found.max_at),
        "median_abs": found.median_abs,
        "max_over_median": found.max_over_median,
        "massive_at": [list(at) for at in found.massive_at],
    }


def massive(rows: list[dict]) -> list[str]:
    """A line for each kind of tensor that has massive activations: where, in how many layers, and the largest."""
    found = []
    for kind, meaning in TENSORS.items():
        tensors = [row for row in rows if kind_of(row["name"]) == kind]
        hit = [row for row in tensors if row["massive_at"]]
        if not hit:
            continue
        counts: dict[tuple[int, int], int] = {}
        for row in hit:
            for token, channel in row["massive_at"]:
                counts[token, channel] = counts.get((token, channel), 0) + 1
        worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"token {t} channel {c} ({n} of {len(tensors)})" for (t, c), n in worst[:3])
        more = f", and {len(worst) - 3} places more" if len(worst) > 3 else ""
        row = max(hit, key=lambda row: row["max_abs"])
        ratio = f", {row['max_over_median']:.0f} × the median" if row["max_over_median"] else ""
        largest = f"largest |x| {row['max_abs']:.5g} in {row['name']}{ratio}"
        found.append(f"massive activations of {meaning}: {named}{more}; {largest}")
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
    """Heads that sink into the first key in more than half of the sequences, the worst first."""
    sinks = sorted((h for h in heads if (h["sink_rate"] or 0) > 0.5), key=lambda h: -h["sink_rate"])
    named = ", ".join(f"{h['layer']}.{h['head']} ({h['sink_rate']:.0%})" for h in sinks[:10])
    more = f", and {len(sinks) - 10} more of {len(heads)}" if len(sinks) > 10 else ""
    return [f"sink heads, layer.head (share of sequences): {named}{more}"] if sinks else []
