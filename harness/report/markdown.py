"""A page as Markdown in GitHub's dialect, with the figures as pictures beside it or as the tables behind them."""

import re
from html import escape

from harness.report.document import Block, Cell, Code, Download, Facts, Figure, Finding, Listing, Page, Table, Text

PICTURES = "figures"
_ADDRESS = re.compile(r"https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]]")


def write(page: Page) -> str:
    parts = [f"# {plain(page.title)}", f"{plain(page.kicker)} · {plain(page.byline)}", f"**{plain(page.lead)}**"]
    for section in page.sections:
        parts += [f"## {plain(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """The text so that Markdown shows it as it is, in one line; addresses as links."""
    text, parts, end = " ".join(text.split()), [], 0
    for match in _ADDRESS.finditer(text):
        parts += [_escaped(text[end : match.start()]), f"<{match.group()}>"]
        end = match.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(text, quote=False))
    text = re.sub(r"(?<!\S)([#>+-]|\d+[.)])(?=\s)", r"\\\1", text) if re.match(r"([#>+-]|\d+[.)])\s", text) else text
    return text.replace("@", "@\u2060")  # a word joiner: no mention of a person


def _block(block: Block) -> str:
    match block:
        case Text(text, _):
            return plain(text)
        case Listing(items):
            return "\n".join(f"- {plain(item)}" for item in items)
        case Code(title, text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            content = f"{fence}sh\n{text}\n{fence}"
            return _folded(title, content) if title else content
        case Facts(rows):
            return "\n".join(["| | |", "|---|---|", *(f"| {plain(name)} | {plain(value)} |" for name, value in rows)])
        case Download():
            return "[All values as CSV](table.csv)"
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Finding():
            return _finding(block)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n\n{content}\n\n</details>"


def _table(table: Table, folded: bool = True) -> str:
    heads = [plain(column.name) + _small(column.note) for column in table.columns]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if table.folded and folded:
        return _folded(table.folded, text)
    return f"{plain(table.caption)}:\n\n{text}"


def _cell(cell: Cell) -> str:
    text = f"**{plain(cell.text)}**" if cell.strong else plain(cell.text)
    return text + _small(cell.note)


def _small(note: str) -> str:
    return f"<br><sub>{plain(note)}</sub>" if note else ""


def _figure(figure: Figure) -> str:
    parts = []
    if figure.picture:
        said = " ".join(panel.description for panel in figure.panels)
        parts.append(f"![{plain(said)}]({PICTURES}/{figure.name}.png)")
        parts.append(plain(figure.caption))
    if figure.table:
        parts.append(_table(figure.table, folded=figure.picture or len(figure.table.rows) > 20))
    return "\n\n".join(parts)


def _finding(finding: Finding) -> str:
    parts = [f"### {plain(finding.sentence)}", plain(finding.verdict).replace(":", ":**", 1).join(["**", ""])]
    parts += ["\n".join(f"- {plain(problem)}" for problem in finding.problems)] if finding.problems else []
    parts.append("\n".join(f"- {plain(name)}: {plain(value)}" for name, value in finding.facts))
    parts += [_table(finding.table)] if finding.table else []
    return "\n\n".join(parts)
