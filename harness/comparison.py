"""The picture of several checkpoints side by side: a panel for each value, a marker for each checkpoint."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from harness.diagnostics import Diagnostic
from harness.figures import RUN_STYLES, new_figure

PANELS_A_ROW = 4


def headlines(values: Sequence[str], diagnostics: Sequence[Diagnostic]) -> list[str]:
    """Those of the `values`, named diagnostic/value, that the picture shows: a diagnostic's own headlines, or its first
    four values where it has none."""
    own = {diagnostic.name: diagnostic.headlines for diagnostic in diagnostics}
    by_diagnostic: dict[str, list[str]] = {}
    for diagnostic, slash, value in (name.partition("/") for name in values):
        if slash:  # the one value without a slash is the step
            by_diagnostic.setdefault(diagnostic, []).append(value)
    return [
        f"{diagnostic}/{value}"
        for diagnostic, found in by_diagnostic.items()
        for value in found
        if value in (own.get(diagnostic) or found[:PANELS_A_ROW])
    ]


def draw(rows: list[dict], values: Sequence[str]) -> Figure:
    """A panel for each value, unless it is the same for all checkpoints, with a marker for each checkpoint."""
    values = [v for v in values if len({row.get(v) for row in rows}) > 1] or values
    columns = min(PANELS_A_ROW, len(values))
    figure, panels = new_figure(-(-len(values) // columns), columns)
    for panel, value in zip(panels, values, strict=False):
        for y, (row, style) in enumerate(zip(rows, RUN_STYLES * (len(rows) // len(RUN_STYLES) + 1), strict=False)):
            x = np.nan if row.get(value) is None else row[value]
            marker = {"color": style["color"], "marker": style["marker"], "linestyle": "none", "markersize": 8}
            panel.plot([x], [-y], label=row["checkpoint"], **marker)
        name, _, statistic = value.partition("/")
        panel.set_title(statistic or name)
        panel.set(xlabel=name if statistic else None, yticks=[], ylim=(0.5 - len(rows), 0.5))
        panel.margins(x=0.2)
        panel.locator_params(axis="x", nbins=4)
    for panel in panels[len(values) :]:
        panel.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    return figure
