"""A page as one HTML file that needs no network: its style, its script, Vega and the charts' data are in it."""

import base64
import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

import vl_convert

from harness.experiments.claims import FAILED, HELD, OPEN
from harness.report.document import (
    Block,
    Cell,
    Code,
    Download,
    Facts,
    Figure,
    Finding,
    Listing,
    Page,
    Section,
    Table,
    Text,
)
from harness.report.theme import SEQUENTIAL, colors, frame, style

HERE = Path(__file__).parent
SHORT = 48  # characters of a text that is not broken in a table
BADGES = {HELD: ("held", "✓"), FAILED: ("failed", "✕"), OPEN: ("open", "?")}
# Nothing may be loaded from anywhere; Vega compiles its expressions.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
_LINK = re.compile(r"https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]]|(?<![\w/])arXiv:\d{4}\.\d{4,5}", re.IGNORECASE)


def write(page: Page) -> str:
    specs: list[dict] = []
    writer = _Writer(page.variants, specs)
    sections = "\n".join(writer.section(section) for section in page.sections)
    charts = json.dumps({"frame": frame(), "panels": specs}, ensure_ascii=False, allow_nan=False)
    names = [section.name for section in page.sections]
    contents = "".join(f'<li><a href="#{name}">{name.replace("-", " ")}</a></li>' for name in names)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{_palette()}
{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<p class="kicker">{escape(page.kicker)}</p>
<h1>{escape(page.title)}</h1>
<p class="byline">{escape(page.byline)}</p>
<p class="lead">{escape(page.lead)}</p>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<noscript><p class="aside">The charts need JavaScript. Below each of them a table has its figures.</p></noscript>
</header>
<main id="main" tabindex="-1">
{sections}
</main>
<script type="application/json" id="specs">{_script(charts)}</script>
<script>{_script(_bundle())}</script>
<script>
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and what puts their charts into a page, as one script."""
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # which it does not need, whatever its types say


def _script(text: str) -> str:
    """Text that stands in a <script>, without what would end it. In JavaScript's and JSON's strings <\\/ is </."""
    return re.sub(r"<(?=/script|!--)", r"\\u003c", text, flags=re.IGNORECASE)


def _palette() -> str:
    """The colours that charts name, for light, dark and print."""
    light, dark = ("".join(f"--{name}: {color}; " for name, color in colors(dark).items()) for dark in (False, True))
    gradient = f"--gradient: linear-gradient(to right, {', '.join(SEQUENTIAL)}); "
    return f":root {{ {light}{gradient}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


def linked(text: str) -> str:
    """The text escaped, with its addresses, and what arXiv numbers, as links."""
    parts, end = [], 0
    for match in _LINK.finditer(text):
        shown = match.group()
        address = shown if shown.lower().startswith("http") else f"https://arxiv.org/abs/{shown[6:]}"
        link = f'<a href="{escape(address)}" rel="noreferrer">{escape(shown)}</a>'
        parts += [escape(text[end : match.start()]), link]
        end = match.end()
    return "".join([*parts, escape(text[end:])])


class _Writer:
    """Writes blocks; `specs` takes the charts, which a chart's element names by their number."""

    def __init__(self, variants: Sequence[str], specs: list[dict]):
        self.variants, self.specs = variants, specs

    def section(self, section: Section) -> str:
        blocks = "\n".join(self.block(block) for block in section.blocks)
        name = section.name
        return (
            f'<section id="{name}" aria-labelledby="{name}-title">\n'
            f'<h2 id="{name}-title">{escape(section.title)}</h2>\n{blocks}\n</section>'
        )

    def block(self, block: Block) -> str:
        match block:
            case Text(text, aside):
                return f"<p{' class=aside' if aside else ''}>{linked(text)}</p>"
            case Listing(items):
                return f"<ul>{''.join(f'<li>{linked(item)}</li>' for item in items)}</ul>"
            case Code("", text):
                return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
            case Code(title, text):
                return self.folded(title, f'<pre tabindex="0"><code>{escape(text)}</code></pre>')
            case Facts(rows):
                entries = "".join(f"<dt>{escape(name)}</dt><dd>{linked(value)}</dd>" for name, value in rows)
                return f'<dl class="facts">{entries}</dl>'
            case Download(text, name):
                data = base64.b64encode(text.encode()).decode()
                link = f'<a download="{escape(name)}" href="data:text/csv;charset=utf-8;base64,{data}">'
                beside = '<a href="table.csv">table.csv</a> beside this file'
                return f'<p class="aside">{link}All values as CSV</a>, the same as {beside}.</p>'
            case Table():
                return self.table(block)
            case Figure():
                return self.figure(block)
            case Finding():
                return self.finding(block)

    def folded(self, title: str, content: str) -> str:
        return f"<details><summary>{escape(title)}</summary>{content}</details>"

    def mark(self, variant: str) -> str:
        """The variant's line and mark, as charts have them."""
        if variant not in self.variants:
            return ""
        own = style(self.variants.index(variant))
        dashes = "" if own["dashes"] == [1, 0] else f' stroke-dasharray="{" ".join(f"{d:g}" for d in own["dashes"])}"'
        color = own["color"]
        return (
            '<svg class="mark" width="26" height="10" viewBox="-13 -5 26 10" aria-hidden="true">'
            f'<path d="M-13,0H13" fill="none" stroke="{color}" stroke-width="1.8"{dashes}/>'
            f'<path d="{own["shape"]}" transform="scale(3.6)" fill="{color}"/></svg>'
        )

    def table(self, table: Table) -> str:
        heads = []
        for number, column in enumerate(table.columns):
            side = ' class="number"' if column.numeric else ""
            heads.append(
                f'<th scope="col"{side} aria-sort="none"><button type="button" data-column="{number}">'
                f"{escape(column.name)}</button>{_small(column.note)}</th>"
            )
        rows = []
        for row in table.rows:
            first = self.mark(row[0].text) if table.variants else ""
            cells = [f'<th scope="row"{_key(row[0])}>{first}{_text(row[0])}</th>']
            for cell, column in zip(row[1:], table.columns[1:], strict=True):
                side = ' class="number"' if column.numeric else ' class="short"' if len(cell.text) < SHORT else ""
                cells.append(f"<td{side}{_key(cell)}>{_text(cell)}</td>")
            rows.append(f"\n<tr>{''.join(cells)}</tr>")
        content = (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
            f"<caption><span>{escape(table.caption)}</span></caption><thead><tr>{''.join(heads)}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        return self.folded(table.folded, content) if table.folded else content

    def figure(self, figure: Figure) -> str:
        legend = ""
        if figure.legend and len(self.variants) > 1:
            entries = "".join(f"<li>{self.mark(v)}{escape(v)}</li>" for v in self.variants)
            legend = f'<ul class="legend" aria-label="Variants">{entries}</ul>'
        if figure.scale:
            what, low, high = figure.scale
            legend = f'<p class="scale"><span>{escape(what)}</span><span>{low}<i></i>{high}</span></p>'
        panels = []
        for panel in figure.panels:
            panels.append(
                f'<div class="panel"><h3>{escape(panel.title)}{_small(panel.note)}</h3><div class="chart" role="img" '
                f'aria-label="{escape(panel.description)}" data-spec="{len(self.specs)}" '
                f'style="min-height: {panel.spec["height"]}px"></div></div>'
            )
            self.specs.append(panel.spec)
        table = self.table(figure.table) if figure.table else ""
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
        kind = "maps" if figure.scale else "one" if len(panels) == 1 else "several"
        return (
            f'<figure id="figure-{figure.name}">{legend}<div class="panels {kind}">{"".join(panels)}</div>'
            f"{caption}{table}</figure>"
        )

    def finding(self, finding: Finding) -> str:
        kind, sign = BADGES[finding.outcome]
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{linked(value)}</dd>" for name, value in finding.facts)
        lines = "".join(f"<li>{escape(problem)}</li>" for problem in finding.problems)
        problems = f'<ul class="problems">{lines}</ul>' if lines else ""
        table = self.table(finding.table) if finding.table else ""
        return (
            f'<article class="finding {kind}" id="claim-{escape(finding.name)}">'
            f'<p class="badge"><span aria-hidden="true">{sign}</span> {escape(finding.outcome)}</p>'
            f"<h3>{escape(finding.sentence)}</h3><p>{escape(finding.verdict)}</p>{problems}"
            f'<dl class="facts">{facts}</dl>{table}</article>'
        )


def _small(note: str) -> str:
    """Small print, which may be broken after a diagnostic's name."""
    return f"<small>{escape(note).replace('/', '/<wbr>')}</small>" if note else ""


def _key(cell: Cell) -> str:
    return "" if cell.key is None else f' data-key="{cell.key!r}"'


def _text(cell: Cell) -> str:
    """The cell's text; the two sides of ± apart, so that they stand in line."""
    note = _small(cell.note)
    mean, sign, half = cell.text.partition(" ± ")
    if sign:
        return f"<span>{escape(mean)}</span><span class=half>&nbsp;± {escape(half)}</span>{note}"
    return (f"<strong>{escape(mean)}</strong>" if cell.strong else escape(mean)) + note
