"""How heavy are the tails of a checkpoint's weights? Moments of every parameter; of q, k and v apart, and by head."""

from matplotlib.figure import Figure
from tqdm import tqdm

from harness.diagnostics import Diagnostic, Result, Subject
from harness.figures import RUN_STYLES, integer_ticks, new_figure, scale_tails
from measure.moments import COLUMNS
from measure.weights import findings, pooled_by_kind, weight_moments

DRAWN = (
    "c_attn.weight[q]",
    "c_attn.weight[k]",
    "c_attn.weight[v]",
    "attn.c_gate.weight",
    "attn.c_proj.weight",
    "mlp.c_gate.weight",
    "c_fc.weight",
    "mlp.c_proj.weight",
)


def measure(subject: Subject) -> Result:
    parameters = list(subject.model.named_parameters())  # a head that is tied to wte stands here once
    watched = tqdm(parameters, desc="weights", leave=False, disable=None)
    moments = weight_moments(watched, subject.model.config)
    rows = [{"name": part} | found.row() for parts in moments.values() for part, found in parts.items()]
    notes = [note for name, parts in moments.items() for note in findings(name, parts)]
    kinds = pooled_by_kind(moments)
    summary = {}
    for statistic in ("excess_kurtosis", "max_abs_over_std"):
        for kind, pooled in kinds.items():
            # Where some weights are NaN or infinite, the figure of the others is not one to compare.
            summary[f"{statistic}/{kind}"] = None if pooled.nonfinite else getattr(pooled, statistic)
    tables = {"kinds": [{"name": kind} | pooled.row() for kind, pooled in kinds.items()]}
    return Result(rows, summary, notes, tables)


def draw(result: Result, title: str) -> Figure:
    rows = {row["name"]: row for row in result.rows}
    figure, panels = new_figure(1, 2)
    labels = {
        "excess_kurtosis": {"title": "Tails of the weights", "ylabel": "excess kurtosis"},
        "max_abs_over_std": {"title": "The largest weight", "ylabel": "|w| in units of σ"},
    }
    for panel, (statistic, label) in zip(panels, labels.items(), strict=True):
        for part, style in zip(DRAWN, RUN_STYLES, strict=False):
            values = [row[statistic] for name, row in rows.items() if name.endswith(part)]
            if values:  # not every model has a c_gate
                panel.plot(range(len(values)), [float("nan") if v is None else v for v in values], label=part, **style)
        panel.set(xlabel="layer", **label)
        integer_ticks(panel.xaxis)
        scale_tails(panel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{title}: weights")
    return figure


DIAGNOSTIC = Diagnostic(
    name="weight_kurtosis",
    about=__doc__,
    columns={
        "name": "the parameter. [q], [k], [v]: that part of the fused c_attn; [q, head 0]: one head of it (in the "
        "JSON), as many of k and v as the model has. A head (lm_head) that is tied to wte is counted once",
        **COLUMNS,
    },
    measure=measure,
    draw=draw,
    headlines={
        "excess_kurtosis/attention qkv": "a Gaussian's is 0; lower: lighter tails",
        "excess_kurtosis/MLP": "a Gaussian's is 0; lower: lighter tails",
        "max_abs_over_std/MLP": "|w| in σ; lower: lighter tails",
    },
    shown=lambda row: ", head " not in row["name"],
    tables={"kinds": {"name": "all parameters of a kind pooled, biases too; and `all` of the model", **COLUMNS}},
    reading="How to read it: an excess kurtosis near 0 and a largest |w| of 4 to 6 σ are what a Gaussian of this size "
    "has. Far above, a few weights lie far out, and a quantizer whose range must hold them has few steps left for the "
    "rest. Biases and layer norms are few numbers: one odd one makes their kurtosis. `all` pools what differs in "
    "scale, so that the layer norms' gains near 1 alone make it large: compare it between models, and read the kinds.",
)
