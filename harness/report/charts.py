"""Charts as Vega-Lite specifications, written once for the page and for the pictures; theme.py says how they look."""

import json
import math
from collections.abc import Callable, Sequence

from harness.experiments.results import Results, Run
from harness.report.document import Panel, Spec
from harness.report.numbers import Measure, Paired, Point, curve, probability, written
from harness.report.theme import SEQUENTIAL, style

DOTS = 7  # marks along a curve


def spec(content: Spec, rows: list[dict], height: int) -> Spec:
    return {"data": {"values": rows}, "height": height} | content


def _by_variant(variants: Sequence[str], *channels: str) -> dict:
    """Channels of an encoding that tell the variants apart."""
    styles = [style(i) for i in range(len(variants))]
    ranges = {
        "color": [s["color"] for s in styles],
        "strokeDash": [s["dashes"] for s in styles],
        "shape": [s["shape"] for s in styles],
    }
    return {
        channel: {
            "field": "variant",
            "type": "nominal",
            "scale": {"domain": list(variants), "range": ranges[channel]},
            "legend": None,
        }
        for channel in channels
    }


# ----------------------------------------------------------------------------------------------------------------------
# Along training


def lines(title: str, note: str, curves: dict[str, list[Point]], variants: Sequence[str], zero: bool = False) -> Panel:
    """A curve a variant, with the band of its 95 % intervals. The axis holds all means after the first tenth of the
    training; what lies beyond is cut off."""
    rows, domain = [], _domain([points for points in curves.values() if points], zero)
    for variant, points in curves.items():
        every = max(1, math.ceil((len(points) - 1) / DOTS))
        shift = variants.index(variant) * every // max(1, len(variants)) if every > len(variants) else 0
        for i, (step, e) in enumerate(points):
            row = {"variant": variant, "step": round(step, 1), "mean": _short(e.mean), "n": e.n}
            if e.low is not None and e.high is not None:
                row |= {"low": _short(e.low), "high": _short(e.high)}
            seen = (i - shift) % every == 0 and domain[0] <= e.mean <= domain[1]
            rows.append(row | ({"dot": 1} if seen else {}))
    y = {"type": "quantitative", "scale": {"domain": domain, "zero": False, "nice": False}}
    ticks = {"tickCount": 5, "format": _format(domain)}
    shown = y | {"field": "mean", "title": None, "axis": ticks}
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"grid": False, "tickCount": 5, "tickMinStep": 1, "format": ",d"},
    }
    numbers = [{"field": name, "type": "quantitative"} for name in ("step", "mean", "low", "high", "n")]
    tooltip = [{"field": "variant", "type": "nominal"}, *numbers]
    zero_line = {
        "mark": {"type": "rule", "color": "var(--rule)"},
        "encoding": {"y": {"datum": 0, "type": "quantitative"}},
    }
    band = {
        "mark": {"type": "area", "clip": True, "opacity": 0.18 if len(curves) < 4 else 0.11},
        "transform": [{"filter": "isValid(datum.low)"}],
    }
    line = {"mark": {"type": "line", "clip": True, "strokeWidth": 1.8, "interpolate": "linear"}}
    dot = {
        "mark": {"type": "point", "filled": True, "opacity": 1},
        "transform": [{"filter": "datum.dot"}],
    }
    hover = {"mark": {"type": "point", "clip": True, "opacity": 0, "size": 90}}
    ends = {"y": y | {"field": "low", "title": None, "axis": ticks}, "y2": {"field": "high"}}
    layers = [
        *([band | {"encoding": {"x": x} | ends | _by_variant(variants, "color")}] if _with_interval(rows) else []),
        line | {"encoding": {"x": x, "y": shown} | _by_variant(variants, "color", "strokeDash")},
        dot | {"encoding": {"x": x, "y": shown, "size": {"value": 34}} | _by_variant(variants, "color", "shape")},
        hover | {"encoding": {"x": x, "y": shown, "tooltip": tooltip}},
    ]
    if domain[0] <= 0 <= domain[1]:
        layers.insert(len(layers) - 3, zero_line)
    last = [f"{v} {written(points[-1].estimate.mean)}" for v, points in curves.items() if points]
    return Panel(title, note, spec({"layer": layers}, rows, 210), f"{title} by step; at the end: {', '.join(last)}.")


def _with_interval(rows: Sequence[dict]) -> bool:
    """Whether any has one: without, Vega warns of an axis that it cannot scale."""
    return any("low" in row for row in rows)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _format(values: Sequence[float]) -> str:
    """Of an axis' labels: digits rather than powers of ten where they are short enough to read. With no number of
    digits Vega takes as few as tell the ticks apart, and 20 becomes 2e+1."""
    return ",d" if 1e4 <= max(abs(value) for value in values) < 1e9 else ".4~g"


def _domain(curves: list[list[Point]], zero: bool) -> list[float]:
    """All means after the first tenth of the training, and of the intervals what does not make the axis more than twice
    as long."""
    end = max((points[-1].step for points in curves), default=0)
    late = [p for points in curves for p in points if p.step >= end / 10] or [p for points in curves for p in points]
    means = [p.estimate.mean for p in late] + ([0.0] if zero else [])
    low, high = min(means, default=0.0), max(means, default=1.0)
    room = (high - low) / 2 or abs(high) / 20 or 0.5
    lows = [p.estimate.low for p in late if p.estimate.low is not None]
    highs = [p.estimate.high for p in late if p.estimate.high is not None]
    bottom, top = max(low - room, min([low, *lows])), min(high + room, max([high, *highs]))
    if zero and low >= 0:
        bottom = 0.0
    margin = 0.04 * (top - bottom)
    return [bottom - margin * (bottom != 0), top + margin]


def training_curves(results: Results) -> list[Panel]:
    """The losses along training, and the validation's difference to the baseline, by seed."""
    variants, baseline = results.experiment.variants, results.experiment.baseline
    names = {"val/loss": "Validation loss", "train/loss": "Training loss"}
    panels = []
    for name, title in names.items():
        curves = {variant: curve(results, name, variant) for variant in variants}
        if any(len(points) > 1 for points in curves.values()):
            panels.append(lines(title, "nats a token", curves, variants))
    differences = {v: curve(results, "val/loss", v, baseline) for v in variants[1:]}
    if any(len(points) > 1 for points in differences.values()):
        title = f"Validation loss minus {baseline}’s"
        panels.insert(1, lines(title, "nats a token, paired by seed", differences, variants, zero=True))
    return panels


def along_training(results: Results, shown: Sequence[Measure]) -> list[Panel]:
    variants = results.experiment.variants
    return [
        lines(m.label, m.note, {v: curve(results, m.base, v) for v in variants}, variants, zero=True) for m in shown
    ]


# ----------------------------------------------------------------------------------------------------------------------
# At the end of training


def differences(measure: Measure, found: Sequence[Paired], variants: Sequence[str]) -> Panel:
    """A mark a variant at its mean difference to the baseline, filled where that is significant, with its interval,
    and below it a tick a seed: two groups of seeds would not be seen in a mean."""
    rows, notes = [], {}
    for variant, d, p, _ in found:
        row = {"variant": variant, "difference": _short(d.mean), "n": d.n, "p": probability(p)}
        if d.low is not None and d.high is not None:
            row |= {"low": _short(d.low), "high": _short(d.high)}
        rows.append(row | {"found": p is not None and p < 0.05})
        notes[variant] = "1 seed" if p is None else f"p {'' if p < 1e-4 else '= '}{probability(p)}"
    order = [variant for variant in variants if variant in notes]
    y = {"field": "variant", "type": "nominal", "sort": order, "title": None}
    left = y | {"axis": {"ticks": False, "labelColor": "var(--ink)", "labelFontSize": 12, "labelLimit": 140}}
    right = y | {
        "axis": {"orient": "right", "ticks": False, "labelExpr": f"{json.dumps(notes)}[datum.value]", "grid": True}
    }
    seeds = [
        {"variant": variant, "seed": seed, "difference": _short(value)}
        for variant, _, _, by_seed in found
        for seed, value in by_seed.items()
    ]
    values = [0.0, *(value for *_, by_seed in found for value in by_seed.values())]
    values += [value for _, d, _, _ in found for value in (d.mean, d.low, d.high) if value is not None]
    room = 0.05 * (max(values) - min(values)) or 1.0
    domain = [_short(min(values) - room), _short(max(values) + room)]
    axis = {"tickCount": 4, "format": _format(domain), "grid": False}
    x = {"type": "quantitative", "axis": axis, "scale": {"domain": domain, "nice": False}}
    tooltip = [{"field": name} for name in ("variant", "difference", "low", "high", "p", "n")]
    color = _by_variant(variants, "color")
    layers = [
        {
            "mark": {"type": "rule", "color": "var(--ink)", "strokeWidth": 1},
            "encoding": {"x": {"datum": 0, "type": "quantitative"}},
        },
        {  # only for its axis, on the right
            "mark": {"type": "point", "opacity": 0},
            "encoding": {"x": x | {"field": "difference", "title": None}, "y": right},
        },
        {
            "data": {"values": seeds},
            "mark": {"type": "tick", "size": 6, "thickness": 1.5, "opacity": 0.6, "yOffset": 9},
            "encoding": {
                "x": x | {"field": "difference", "title": None},
                "y": y | {"axis": None},
                "tooltip": [{"field": name} for name in ("variant", "seed", "difference")],
            }
            | color,
        },
        {
            "mark": {"type": "point", "strokeWidth": 1.6, "opacity": 1, "size": 70},
            "encoding": {
                "x": x | {"field": "difference", "title": None},
                "y": left,
                "tooltip": tooltip,
                "fill": {
                    "condition": {"test": "!datum.found", "value": "var(--paper)"},
                    **color["color"],
                },
            }
            | _by_variant(variants, "color", "shape"),
        },
    ]
    if _with_interval(rows):
        ends = {"x": x | {"field": "low", "title": None}, "x2": {"field": "high"}, "y": y | {"axis": None}} | color
        mark = {"type": "rule", "strokeWidth": 2}
        layers.insert(2, {"mark": mark, "transform": [{"filter": "isValid(datum.low)"}], "encoding": ends})
    content = {"layer": layers, "resolve": {"axis": {"y": "independent"}, "scale": {"y": "independent"}}}
    said = "; ".join(f"{v} {written(d.mean)} ({notes[v]})" for v, d, _, _ in found)
    return Panel(
        measure.label, measure.note, spec(content, rows, 26 * len(order)), f"{measure.label}, differences: {said}."
    )


def scatter(results: Results, x: Measure, y: Measure) -> Panel | None:
    """A point a run."""
    variants = results.experiment.variants
    found: list[tuple[str, int, float, float]] = []
    for variant in variants:
        xs, ys = results.values(x.name, variant), results.values(y.name, variant)
        found += [(variant, seed, _short(xs[seed]), _short(ys[seed])) for seed in xs if seed in ys]
    if not found:
        return None
    rows = [dict(zip(("variant", "seed", "x", "y"), row, strict=True)) for row in found]
    values, losses = [row[2] for row in found], [row[3] for row in found]
    log = min(values) > 0 and max(values) > 30 * min(values)

    def channel(field: str, measure: Measure, shown: Sequence[float], **scale) -> dict:
        title = ", ".join(filter(None, (measure.label, measure.note.partition(";")[0])))
        axis = {"tickCount": 5, "format": _format(shown)}
        return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": {"zero": False} | scale}

    encoding = {
        "x": channel("x", x, values, **({"type": "log"} if log else {})),
        "y": channel("y", y, losses),
        "tooltip": [
            {"field": "variant"},
            {"field": "seed"},
            {"field": "x", "title": x.label},
            {"field": "y", "title": y.label},
        ],
    } | _by_variant(variants, "color", "shape")
    mark = {"type": "point", "filled": True, "size": 75, "opacity": 0.9}
    text = f"{len(rows)} runs, {y.label} against {x.label}: one from {min(losses):.4g} to "
    text += f"{max(losses):.4g}, the other from {min(values):.4g} to {max(values):.4g}."
    return Panel(f"{y.label} against {x.label}", "", spec({"mark": mark, "encoding": encoding}, rows, 300), text)


def head_maps(results: Results, column: str, mean: Callable[[Sequence[Run], str], dict]) -> tuple[list[Panel], list]:
    """A map a variant, layer × head, and the ends of their common colours. `mean(runs, column)`: (layer, head) → the
    mean over the runs."""
    maps = {v: mean(results.of(v), column) for v in results.experiment.variants}
    values = [value for found in maps.values() for value in found.values()]
    if not values or max(len(found) for found in maps.values()) < 2:
        return [], []
    low, high = min(values), max(values)
    if low >= 0 and high <= 1 + 1e-6:  # shares: from 0, to the next tenth
        low, high = 0.0, min(1.0, math.ceil(10 * high) / 10)
    high = high if high > low else low + 1
    panels = []
    for variant, found in maps.items():
        if not found:
            continue
        rows = [{"layer": i, "head": j, "value": _short(value)} for (i, j), value in sorted(found.items())]
        fits = len(rows) <= 36
        for row in rows:
            row["text"] = f"{row['value']:.2f}" if fits else ""
        layers = len({row["layer"] for row in rows})
        axis = {"ticks": False, "labelAngle": 0, "grid": False, "labelOverlap": True}
        place = {
            "x": {"field": "head", "type": "ordinal", "axis": axis, "scale": {"padding": 0.03}},
            "y": {"field": "layer", "type": "ordinal", "axis": axis, "scale": {"padding": 0.03}},
        }
        scale = {"domain": [low, high], "range": SEQUENTIAL, "clamp": True}
        color = {"field": "value", "type": "quantitative", "scale": scale, "legend": None}
        tooltip = [{"field": name} for name in ("layer", "head", "value")]
        bright = {"condition": {"test": f"datum.value > {(low + high) / 2}", "value": "#000000"}, "value": "#ffffff"}
        content = {
            "layer": [
                {"mark": "rect", "encoding": place | {"color": color, "tooltip": tooltip}},
                {
                    "mark": {"type": "text", "fontSize": 10},
                    "encoding": place | {"text": {"field": "text"}, "color": bright},
                },
            ]
        }
        height = max(48, min(300, (30 if fits else 16) * layers))
        largest = max(rows, key=lambda row: row["value"])
        said = f"{variant}, {column}: from {min(r['value'] for r in rows):.3g} to {largest['value']:.3g}, "
        said += f"which is of layer {largest['layer']}, head {largest['head']}."
        panels.append(Panel(variant, "", spec(content, rows, height), said))
    return panels, [low, high]
