"""What a page is made of: sections of blocks, which html.py and markdown.py write each in their way. Texts are plain,
and theirs to escape; an address in one becomes a link."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Spec = dict
"""a Vega-Lite specification"""


@dataclass(frozen=True)
class Text:
    text: str
    aside: bool = False
    """whether it stands back: how to read something, and what it rests on"""


@dataclass(frozen=True)
class Listing:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Text to be copied, folded away under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Download:
    """Everything measured, in the long form."""

    csv: str
    name: str


@dataclass(frozen=True)
class Cell:
    text: str
    """of a mean with an interval, "1.23 ± 0.04" """
    note: str = ""
    """in small print below it"""
    key: float | None = None
    """what it is sorted by; None: by its text or, in a column of numbers, last"""
    strong: bool = False
    """whether it stands out: a difference that is significant"""


@dataclass(frozen=True)
class Column:
    name: str
    note: str = ""
    """its unit, in small print below the name"""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    """a cell a column; the first one is the row's head"""
    variants: bool = False
    """whether the rows' heads are variants, which have their mark"""
    folded: str = ""
    """the title under which it is folded away; empty: it is shown"""


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    """the unit of what is drawn, in small print below the title"""
    spec: Spec
    """without its title and width"""
    description: str
    """what is to be seen, in words and figures, for who does not see it"""


@dataclass(frozen=True)
class Figure:
    name: str
    """also of the picture's file"""
    caption: str
    panels: Sequence[Panel]
    legend: bool = True
    """whether marks stand for variants"""
    scale: tuple[str, str, str] | None = None
    """of heat maps: what the colours show, and their ends"""
    picture: bool = False
    """whether the Markdown shows it, and not only the table behind it"""
    table: Table | None = None
    """the figures behind it"""


@dataclass(frozen=True)
class Finding:
    """A claim and what came of it."""

    outcome: str
    name: str
    sentence: str
    """the claim"""
    verdict: str
    facts: Sequence[tuple[str, str]]
    table: Table | None
    problems: Sequence[str]


Block = Text | Listing | Code | Facts | Download | Table | Figure | Finding


@dataclass
class Section:
    name: str
    """its anchor, and its name in the contents"""
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Page:
    title: str
    """the question"""
    kicker: str
    """what the page is, in a few words above the title"""
    byline: str
    lead: str
    """what came out, in a sentence"""
    variants: Sequence[str]
    """in the order of their marks"""
    sections: list[Section]
