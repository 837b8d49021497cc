"""How results look: one figure style for all scripts, tables in plain text."""

import math
from collections.abc import Sequence
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
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.typing import RcKeyType

from harness.errors import UserError
from harness.files import check_file, make_folder, written_whole

# Okabe & Ito (2008) without their yellow, which vanishes on white. Colour, dash and marker each tell the runs apart, so
# that a grey print or a colour-blind eye loses nothing. Neither a colour and its dash nor a colour and its marker come
# again within 28 runs.
_COLORS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RUN_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": _COLORS[i % 7], "linestyle": _DASHES[i % 4], "marker": _MARKERS[(i + i // 7) % 7]} for i in range(28)
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
    "figure.max_open_warning": 0,  # those of checkpoints that are compared are open together
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
    exceed 30 and tenfold the least, linear up to 10 and logarithmic beyond."""
    sizes = np.concatenate([np.abs(np.asarray(line.get_ydata(), dtype=float)) for line in panel.lines] or [[0.0]])
    if np.nanmax(sizes, initial=0) > max(30, 10 * np.nanmin(sizes, initial=np.inf)):
        _bend(panel)
    panel.axhline(0, color="#777777", linewidth=0.8)


def _bend(panel: Axes) -> None:
    """A y axis that is linear up to 10 and logarithmic beyond, with ticks all along its limits."""
    panel.set_yscale("symlog", linthresh=10)
    decades = range(1, 1 + math.ceil(np.log10(max(100, *np.abs(panel.get_ylim())))))
    beyond = [digit * 10.0**n for n in decades for digit in ((1, 2, 5) if len(decades) <= 3 else (1,))]
    panel.yaxis.set_major_locator(FixedLocator([*(-tick for tick in beyond), -5, 0, 5, *beyond]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def share_scales(figures: Sequence[Figure]) -> None:
    """Give the panels at one place of several figures, of checkpoints that are to be compared, one scale: of their
    colours where they are heat maps, of their axes elsewhere."""
    if len(figures) == 1:
        return
    for panels in zip(*([p for p in f.axes if p.get_label() != "<colorbar>"] for f in figures), strict=False):
        images = [image for panel in panels for image in panel.images]
        ends = [image.get_clim() for image in images if np.isfinite(np.asarray(image.get_array())).any()]
        for image in images if ends else ():
            image.set_clim(np.min(ends), np.max(ends))
            _color_figures(image)
        if images or not all(panel.axison for panel in panels):
            continue
        bent = any(panel.get_yscale() == "symlog" for panel in panels)
        for name in ("x", "y"):
            if (bent and name == "y") or len({getattr(panel, f"get_{name}scale")() for panel in panels}) == 1:
                low, high = zip(*(getattr(panel, f"get_{name}lim")() for panel in panels), strict=True)
                limits = (min(low), max(high)) if low[0] < high[0] else (max(low), min(high))
                for panel in panels:
                    getattr(panel, f"set_{name}lim")(limits)
        for panel in panels if bent else ():
            _bend(panel)


def integer_ticks(axis: Axis) -> None:
    """Ticks as Matplotlib sets them, but at integers only, and a single one where there is a single integer: between
    two layers, heads or steps there is nothing."""
    steps = [1, 2, 2.5, 5, 10]  # as AutoLocator has them
    axis.set_major_locator(MaxNLocator("auto", steps=steps, integer=True, min_n_ticks=1))


def heat_map(panel: Axes, grid: np.ndarray, low: float | None, high: float | None, figures: str = "") -> AxesImage:
    """A grid (rows, columns) in colours from `low` to `high`, the first row on top. NaN is an empty cell. With
    `figures`, a format such as "{:.2f}", each cell also shows its value."""
    image = panel.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(grid) if figures else ():
        if np.isfinite(value):
            figure = figures.format(value).replace("-", "−")
            panel.text(column, row, figure, ha="center", va="center", fontsize=7)
    _color_figures(image)
    panel.grid(False)
    return image


def _color_figures(image: AxesImage) -> None:
    """The figures in the cells of a heat map in white on dark colours and in black on light ones."""
    (low, high), grid = image.get_clim(), np.asarray(image.get_array())
    for text in image.axes.texts:
        column, row = map(int, text.get_position())
        text.set_color("white" if grid[row, column] < (low + high) / 2 else "black")


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
    return number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def duration(seconds: float) -> str:
    """In three digits, and in the unit in which it is read most easily."""
    units = (("days", 86400, 2), ("h", 3600, 2), ("min", 60, 2), ("s", 1, 1), ("ms", 1e-3, 1))
    unit, size = next(((unit, size) for unit, size, least in units if seconds >= least * size), ("µs", 1e-6))
    value = seconds / size
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def number(value: float) -> str:
    """In four digits, but never with an exponent where the integer itself is short enough to read."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
