"""The picture of several checkpoints side by side: a panel for each value, a line in it for each variant."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness.diagnostics import Diagnostic, Subject
from harness.errors import UserError
from harness.figures import RUN_STYLES, new_figure

PANELS_A_ROW = 4
SCRIPTS = Path(__file__).parents[1] / "scripts"
DIAGNOSTICS = ("weight_kurtosis", "activation_kurtosis", "perplexity", "jacobian_energy", "quantization")
"""Those that need no more than a checkpoint and its corpus."""


def find_diagnostic(name: str, option: str = "") -> Diagnostic:
    """The diagnostic of the script NAME.py. UserError, which begins with the `option` that named it, where there is
    none."""
    if not (SCRIPTS / f"{name}.py").is_file():
        raise UserError(f"{option}{name}: there is no scripts/{name}.py; choose from {', '.join(DIAGNOSTICS)}")
    module = f"harness.diagnostics.{name}"
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{option}{name}: it takes more than checkpoints; choose from {', '.join(DIAGNOSTICS)}")
    return importlib.import_module(module).DIAGNOSTIC


def headlines(values: Sequence[str], diagnostics: Sequence[Diagnostic]) -> dict[str, str]:
    """Those of the `values`, named diagnostic/value, that the picture shows → what their axis says: a diagnostic's own
    headlines, or its first four values where it has none."""
    own = {diagnostic.name: diagnostic.headlines for diagnostic in diagnostics}
    by_diagnostic: dict[str, list[str]] = {}
    for diagnostic, slash, value in (name.partition("/") for name in values):
        if slash:  # the one value without a slash is the step
            by_diagnostic.setdefault(diagnostic, []).append(value)
    return {
        f"{diagnostic}/{value}": (own.get(diagnostic) or {}).get(value, "")
        for diagnostic, found in by_diagnostic.items()
        for value in found
        if value in (own.get(diagnostic) or found[:PANELS_A_ROW])
    }


def without_losses_of_few_windows(values: Sequence[str]) -> list[str]:
    """The `values` without the losses that other diagnostics found on their way, where perplexity's are there, which
    are of the whole split."""
    few = {v for v in values if v.endswith(("/loss", "/perplexity")) and not v.startswith("perplexity/")}
    return [v for v in values if "perplexity/loss" not in values or v not in few]


def config_of(subject: Subject) -> dict | None:
    """What a checkpoint has in common with other seeds' of its variant: the run's config, and which file at which step;
    None where the config is not known."""
    config, name = subject.info.get("config"), Path(subject.path).name
    if not isinstance(config, dict) or "run" not in config:
        return None
    return config | {"file": name, "step": subject.step if name == "ckpt.pt" else None}


def draw(rows: list[dict], values: Mapping[str, str], variants: Mapping[str, list[str]]) -> Figure:
    """A panel for each value, unless it is the same for all checkpoints, on an axis that holds 0. In it a line for each
    variant, label → its checkpoints, with a marker at their mean, a band from the least to the largest, and figures.
    `values` are names diagnostic/value → what their axis says."""
    shown = [v for v in values if len({row.get(v) for row in rows}) > 1] or list(values)
    columns = min(PANELS_A_ROW, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = new_figure(lines, columns)
    figure.set_size_inches(4.3 * columns, lines * max(1.9, 1 + 0.2 * len(variants)) + 0.6)
    for number, (panel, value) in enumerate(zip(panels, shown, strict=False)):
        found: dict[str, float | None] = {row["checkpoint"]: row.get(value) for row in rows}
        for y, names in enumerate(variants.values()):
            style = RUN_STYLES[y % len(RUN_STYLES)]
            marker = {"color": style["color"], "marker": style["marker"], "linestyle": "none", "clip_on": False}
            xs = [x for name in names if (x := found[name]) is not None]
            mean = sum(xs) / len(xs) if xs else math.nan
            panel.plot([mean], [y], **marker, markersize=7, zorder=3)
            text = f"{mean:#.4g}" if xs else "–"
            if len(xs) > 1:
                panel.barh(y, max(xs) - min(xs), left=min(xs), height=0.6, color=style["color"], alpha=0.3)
                text += f" ({min(xs):#.4g} to {max(xs):#.4g})"
            text = text.replace("-", "−")
            panel.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        known = [0.0, *(x for x in found.values() if x is not None)]
        room = 0.06 * ((max(known) - min(known)) or 1)
        panel.set_xlim(min(known) - room * (min(known) < 0), max(known) + room)
        panel.set_ylim(len(variants) - 0.5, -0.5)
        panel.set_yticks(range(len(variants)), variants if number % columns == 0 else [""] * len(variants))
        panel.vlines(0, *panel.get_ylim(), color="#777777", linewidth=0.8)
        panel.locator_params(axis="x", nbins=4)
        name, _, statistic = value.partition("/")
        panel.set_title(statistic or name)
        panel.set_xlabel("\n".join(filter(None, (values[value], name))), fontsize=8)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    if len(variants) < len(rows):
        label = "seeds of one variant: a marker at their mean, a band from the least to the largest"
        figure.legend(handles=[Patch(color="#777777", alpha=0.3, label=label)], loc="outside upper left")
    return figure
