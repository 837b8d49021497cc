"""How heavy are the tails of a checkpoint's weights? Moments of every parameter; of q, k and v apart, and by head."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from harness.diagnostics import Diagnostic, Result, Subject, run
from harness.errors import run_cli
from harness.figures import RUN_STYLES, new_figure, scale_tails
from measure.moments import COLUMNS, Moments
from measure.probe import rows_of_c_attn

KINDS = {
    "embedding": ("wte", "wpe"),
    "attention qkv": ("c_attn",),
    "attention projection": ("attn.c_proj",),
    "MLP": ("mlp.c_fc", "mlp.c_proj"),
    "layer norm": ("ln_1", "ln_2", "ln_f"),
    "sink": ("sink",),
}
DRAWN = (
    "c_attn.weight[q]",
    "c_attn.weight[k]",
    "c_attn.weight[v]",
    "attn.c_proj.weight",
    "c_fc.weight",
    "mlp.c_proj.weight",
)


def measure(subject: Subject) -> Result:
    rows, notes = [], []
    kinds = {kind: Moments() for kind in KINDS}
    n_head = subject.model.config.n_head
    parameters = list(subject.model.named_parameters())  # the head is tied to wte, which stands here once
    for name, parameter in tqdm(parameters, desc="weights", leave=False, disable=None):
        moments = parts_of_qkv(name, parameter, n_head) if ".c_attn." in name else {name: Moments().update(parameter)}
        rows += [{"name": part} | found.row() for part, found in moments.items()]
        whole = moments[name]
        kinds.setdefault(kind_of(name), Moments()).merge(whole)
        if whole.nonfinite:
            notes.append(f"{name}: {whole.nonfinite} of its {parameter.numel()} numbers are NaN or infinite")
        constant = []
        for part, found in moments.items():  # the larger parts come first, and speak for the smaller
            said = any(part.startswith(larger.removesuffix("]")) for larger in constant)
            if found.count > 1 and found.variance == 0 and not found.nonfinite and not said:
                constant.append(part)
                notes.append(f"{part}: all equal to {found.mean:g}, so they have no kurtosis")
    kinds = {kind: moments for kind, moments in kinds.items() if moments.count + moments.nonfinite}
    kinds["all"] = Moments()
    for kind in list(kinds)[:-1]:
        kinds["all"].merge(kinds[kind])
    summary = {}
    for statistic in ("excess_kurtosis", "max_abs_over_std"):
        for kind, moments in kinds.items():  # what is left of broken weights is not a figure to compare
            summary[f"{statistic}/{kind}"] = None if moments.nonfinite else getattr(moments, statistic)
    tables = {"kinds": [{"name": kind} | moments.row() for kind, moments in kinds.items()]}
    return Result(rows, summary, notes, tables)


def parts_of_qkv(name: str, parameter: Tensor, n_head: int) -> dict[str, Moments]:
    """The moments of the fused c_attn: of the whole, of q, k and v, and of each of their heads, in that order."""
    whole, thirds, single = Moments(), {}, {}
    for part, heads in rows_of_c_attn(parameter, n_head).items():
        thirds[f"{name}[{part}]"] = third = Moments()
        for head, rows in enumerate(heads):
            single[f"{name}[{part}, head {head}]"] = moments = Moments().update(rows)
            third.merge(moments)
        whole.merge(third)
    return {name: whole, **thirds, **single}


def kind_of(name: str) -> str:
    """One of KINDS; of any other parameter, such as a normalizer may bring, its own name."""
    kinds = (kind for kind, parts in KINDS.items() if any(f".{part}." in f".{name}." for part in parts))
    return next(kinds, name.rpartition(".")[2])


def draw(result: Result, title: str) -> Figure:
    rows = {row["name"]: row for row in result.rows}
    figure, panels = new_figure(1, 2)
    labels = {"excess_kurtosis": "Excess kurtosis", "max_abs_over_std": "Largest |w| in units of σ"}
    for panel, (statistic, label) in zip(panels, labels.items(), strict=True):
        for part, style in zip(DRAWN, RUN_STYLES, strict=False):
            values = [row[statistic] for name, row in rows.items() if name.endswith(part)]
            panel.plot(range(len(values)), [float("nan") if v is None else v for v in values], label=part, **style)
        panel.set(xlabel="layer", title=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    scale_tails(panels[0])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{title}: weights")
    return figure


DIAGNOSTIC = Diagnostic(
    name="weight_kurtosis",
    about=__doc__,
    columns={
        "name": "the parameter. [q], [k], [v]: that part of the fused c_attn; [q, head 0]: one head of it (in the "
        "JSON). The model's head is tied to wte and counted once",
        **COLUMNS,
    },
    measure=measure,
    draw=draw,
    shown=lambda row: ", head " not in row["name"],
    tables={"kinds": {"name": "all parameters of a kind pooled, biases too; and `all` of the model", **COLUMNS}},
    reading="How to read it: an excess kurtosis near 0 and a largest |w| of 4 to 6 σ are what a Gaussian of this size "
    "has. Far above, a few weights lie far out, and a quantizer whose range must hold them has few steps left for the "
    "rest. Biases and layer norms are few numbers: one odd one makes their kurtosis. `all` pools what differs in "
    "scale, so that the layer norms' gains near 1 alone make it large: compare it between models, and read the kinds.",
)


def main() -> None:
    run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
