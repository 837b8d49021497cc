"""How results look: one figure style for all scripts, tables in plain text."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is opened
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from harness.errors import UserError
from harness.files import check_file, make_folder, written_whole

# Okabe & Ito (2008) without their yellow, which vanishes on white. Colour, dash and marker each tell the runs apart, so
# that a grey print or a colour-blind eye loses nothing; 7, 4 and 7 repeat together only after 28 runs.
_COLORS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RUN_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": _COLORS[i % 7], "linestyle": _DASHES[i % 4], "marker": _MARKERS[i % 7]} for i in range(28)
)

_STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def new_figure(rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in the house style with a grid of panels, each 3.9 × 2.7 inches; the panels row by row in one list."""
    plt.rcParams.update(_STYLE)
    size = (3.9 * columns, 2.7 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=size)
    return figure, list(grid.flat)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format that the suffix names, whole or not at all, and close it. Returns the path.

    Raises UserError where the suffix is no picture format or the folder cannot be made.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: cannot draw a picture of type {path.suffix or '(none)'!r}; name it like curves.png")
    check_file(path)
    make_folder(path.parent)
    try:
        with written_whole(path) as temporary:
            figure.savefig(temporary, format=kind)
    finally:
        plt.close(figure)
    return path


def scale_tails(panel: Axes) -> None:
    """Scale the y axis, once the panel is drawn, for values that may be small or huge: with a line at 0 and, where some
    exceed 30, linear up to 10 and logarithmic beyond."""
    if panel.dataLim.y1 > 30:
        panel.set_yscale("symlog", linthresh=10)
    panel.axhline(0, color="#777777", linewidth=0.8)


def integer_ticks(axis: Axis) -> None:
    """Ticks as Matplotlib sets them, but at integers only: between two layers or two heads there is nothing."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))  # the rest is AutoLocator's


def heat_map(panel: Axes, grid: np.ndarray, low: float | None, high: float | None, figures: str = "") -> AxesImage:
    """A grid (rows, columns) in colours from `low` to `high`, the first row on top. NaN is an empty cell. With
    `figures`, a format such as "{:.2f}", each cell also shows its value."""
    image = panel.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    low, high = image.get_clim()
    for (row, column), value in np.ndenumerate(grid) if figures else ():
        if np.isfinite(value):
            color = "white" if value < (low + high) / 2 else "black"
            panel.text(column, row, figures.format(value), ha="center", va="center", color=color, fontsize=7)
    panel.grid(False)
    return image


def draw_heads(
    panel: Axes, heads: list[dict], column: str, label: str, low: float | None = None, high: float | None = None
) -> None:
    """A heat map of one column of rows with `layer` and `head`, the first layer on top; × where there is no value, and
    figures in the cells where they fit."""
    grid = np.full((max(h["layer"] for h in heads) + 1, max(h["head"] for h in heads) + 1), np.nan)
    for h in heads:
        if h[column] is None or np.isnan(h[column]):
            panel.text(h["head"], h["layer"], "×", ha="center", va="center")
        else:
            grid[h["layer"], h["head"]] = h[column]
    image = heat_map(panel, grid, low, high, "{:.2f}" if grid.size <= 36 else "")
    low, high = image.get_clim()
    beyond = np.nanmax(grid, initial=high) > high + 1e-5 * (high - low)  # float32 rounds a row mass of 1
    panel.figure.colorbar(image, ax=panel, label=label, extend="max" if beyond else None)
    panel.set(xlabel="head", ylabel="layer")
    for axis in (panel.xaxis, panel.yaxis):
        integer_ticks(axis)


def print_table(rows: list[dict], columns: list[str]) -> None:
    """Print one line a row: text to the left, numbers to the right with four digits, `–` for None and missing keys; of
    a list no more than four entries."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    is_text = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    for line in (columns, *cells):
        padded = (
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        )
        print("  ".join(padded).rstrip())


def _cell(value: str | int | float | list | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value[:4])) + (f" … ({len(value)})" if len(value) > 4 else "")
    if isinstance(value, float) and math.isfinite(value):
        # four digits, but never an exponent where the integer itself is short enough to read
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
