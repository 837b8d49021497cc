"""The report as people read it: each section's tables, in the terminal and in Markdown."""

import sys

from harness.figures import print_table
from harness.gpu_report import Table
from harness.gpu_report.plan import SECTIONS


def tables_of(entry: dict) -> list[Table]:
    return SECTIONS[entry["section"]].present(entry["rows"]) if entry["rows"] else []


def print_section(entry: dict) -> None:
    print(f"\n{SECTIONS[entry['section']].title}, {entry['seconds']:.0f} s")
    for table in tables_of(entry):
        if table.caption:
            print(table.caption)
        print_table(table.rows, columns_of(table))
    if entry["error"]:
        print(f"NOT FINISHED: {entry['error']}")
    sys.stdout.flush()


def wrong_rows(report: dict) -> list[dict]:
    """The results that were judged, and not found right."""
    return [row for entry in report["sections"] for row in entry["rows"] if row.get("verdict", "ok") != "ok"]


def markdown(report: dict) -> str:
    lines = [
        f"# {report['card']}, {report['date']}",
        "",
        f"By `{report['command']}` at commit {report['commit']}; seed {report['seed']}; {report['seconds']:.0f} s. The "
        "numbers behind the tables are in the JSON beside this file. ± is the standard error of a median.",
    ]
    if wrong := wrong_rows(report):
        lines += ["", f"**{len(wrong)} results are not as they should be**, see below."]
    for entry in report["sections"]:
        lines += ["", f"## {SECTIONS[entry['section']].title}", ""]
        if entry["error"]:
            lines += [f"**Not finished**, after {entry['seconds']:.0f} s:", "", "```", entry["error"], "```", ""]
        for table in tables_of(entry):
            lines += [f"{table.caption}:", ""] if table.caption else []
            columns = columns_of(table)
            lines += [_row(columns), _row(["---"] * len(columns))]
            lines += [_row([_cell(row.get(column)) for column in columns]) for row in table.rows] + [""]
    return "\n".join(lines).rstrip() + "\n"


def columns_of(table: Table) -> list[str]:
    return list(dict.fromkeys(column for row in table.rows for column in row))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value) -> str:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
