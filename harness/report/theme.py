"""How the charts of a page look, whatever they show: colours, dashes, shapes, fonts, and a figure as one picture.

Colours are names, `var(--ink)`, which the page's style sheet sets for light, dark and print, and `drawn` for a picture.
Colour, dash and shape each tell the variants apart (see harness.figures.RUN_STYLES).
"""

import json

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from harness.figures import RUN_STYLES
from harness.report.document import Figure, Spec

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
PALETTE = tuple(dict.fromkeys(style["color"] for style in RUN_STYLES))
SEQUENTIAL = [to_hex(color) for color in matplotlib.colormaps["cividis"](np.linspace(0, 1, 17))]
# Matplotlib's markers as paths from −1 to 1, which SVG and Vega draw alike.
SHAPES = {
    "o": "M-0.9,0A0.9,0.9 0 1 1 0.9,0A0.9,0.9 0 1 1 -0.9,0Z",
    "s": "M-0.8,-0.8H0.8V0.8H-0.8Z",
    "^": "M0,-1L1,0.8H-1Z",
    "D": "M0,-1.1L0.95,0L0,1.1L-0.95,0Z",
    "v": "M0,1L1,-0.8H-1Z",
    "P": "M-0.35,-1H0.35V-0.35H1V0.35H0.35V1H-0.35V0.35H-1V-0.35H-0.35Z",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
}
LIGHT = {"ink": "#1c1b19", "muted": "#6b6862", "rule": "#8d8a83", "grid": "#e8e5de", "paper": "#fdfcf9"}
DARK = {"ink": "#e6e2d9", "muted": "#a29d92", "rule": "#7d796f", "grid": "#33312d", "paper": "#161513"}
# Black cannot be seen on a dark page, and the two blues and the vermilion are lifted a little.
DARK_PALETTE = {
    "#000000": "#f0ece2",
    "#0072B2": "#4aa8e0",
    "#D55E00": "#f0803c",
    "#009E73": "#2fc298",
    "#56B4E9": "#9ad7ff",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def style(index: int) -> dict:
    """The colour, dashes and shape of the variant at this place."""
    own = RUN_STYLES[index % len(RUN_STYLES)]
    dashes = [1, 0] if own["linestyle"] == "-" else [1.6 * length for length in own["linestyle"][1]]
    return {"color": f"var(--c{PALETTE.index(own['color'])})", "dashes": dashes, "shape": SHAPES[own["marker"]]}


def colors(dark: bool) -> dict[str, str]:
    """Name → colour, of all that charts name."""
    lines = {f"c{i}": DARK_PALETTE.get(color, color) if dark else color for i, color in enumerate(PALETTE)}
    return (DARK if dark else LIGHT) | lines


def drawn(figure: Figure, dark: bool = False) -> Spec:
    """The figure as one picture: its panels side by side, with a legend and colours of its own."""
    columns = 1 if len(figure.panels) == 1 else 2 if len(figure.panels) in (2, 4) else 3
    panels = [
        panel.spec | {"title": {"text": panel.title, "subtitle": panel.note}, "width": 270} for panel in figure.panels
    ]
    legend = {"orient": "bottom", "title": None, "symbolOpacity": 1, "symbolStrokeWidth": 0} if figure.legend else None
    shared = {"scale": {name: "shared" for name in ("color", "strokeDash", "shape")}}
    spec = {"concat": panels, "columns": columns, "resolve": shared, "spacing": 28} | frame()
    text = json.dumps(_with_legend(spec, legend))
    for name, color in colors(dark).items():
        text = text.replace(f"var(--{name})", color)
    return json.loads(text) | {"padding": 14, "background": colors(dark)["paper"]}


def _with_legend(spec, legend):
    if isinstance(spec, list):
        return [_with_legend(entry, legend) for entry in spec]
    if not isinstance(spec, dict):
        return spec
    of_dashes = "strokeDash" in spec  # whose legend would draw them around the marks
    return {
        k: legend if k == "legend" and v is None else v if of_dashes and k == "strokeDash" else _with_legend(v, legend)
        for k, v in spec.items()
    }


def frame() -> Spec:
    """What all charts have in common."""
    axis = {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "gridColor": "var(--grid)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "tickSize": 4,
        "labelPadding": 4,
        "titlePadding": 8,
        "domain": False,
    }
    text = {"labelColor": "var(--ink)", "labelFontSize": 12, "symbolSize": 70, "labelLimit": 300}
    title = {"color": "var(--ink)", "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 8}
    title |= {"subtitleColor": "var(--muted)", "subtitleFontSize": 11, "subtitlePadding": 4}
    config = {
        "font": FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "axis": axis,
        "legend": text,
        "title": title,
        "numberFormat": "~g",
    }
    return {"$schema": SCHEMA, "config": config}
