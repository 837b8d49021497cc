"""The page of an experiment: report.html, one file that needs no network, the same as report.md with its pictures, and
table.csv.

findings.py says what is on the page, as the blocks of document.py; charts.py draws it, in the look of theme.py; html.py
and markdown.py write it.
"""

import json
import os
from pathlib import Path

import vl_convert

from harness.errors import UserError
from harness.experiments.claims import judge, load_claims
from harness.experiments.grid import ROOT, load_experiment
from harness.experiments.results import read_results
from harness.files import make_folder, write_text, written_whole
from harness.report import html, markdown
from harness.report.document import Download, Figure
from harness.report.findings import page
from harness.report.theme import drawn
from harness.text_files import read_json

FACTS = "experiment.json"


def write_report(folder: Path) -> Path:
    """Write report.html, report.md with figures/, and table.csv into an experiment's folder; the path of the first. To
    be called in the repository's root. UserError where the folder holds no experiment."""
    facts = _facts(folder)
    file = ROOT / facts["file"]
    if not os.path.isfile(file):
        raise UserError(f"{folder / FACTS}: file: there is no {facts['file']}, the experiment that was run")
    folder = _as_given_to_runs(folder.resolve())
    experiment = load_experiment(_as_given_to_runs(file), out=folder.parent)
    if experiment.folder != folder:
        raise UserError(f"{folder}: it is of the experiment {experiment.name}, whose folder has that name: rename it")
    results = read_results(experiment)
    content = page(results, judge(results, load_claims(experiment)), facts)
    make_folder(folder / markdown.PICTURES)
    for block in (block for section in content.sections for block in section.blocks):
        if isinstance(block, Figure) and block.picture:
            picture = vl_convert.vegalite_to_png(json.dumps(drawn(block)), scale=1.6)
            with written_whole(folder / markdown.PICTURES / f"{block.name}.png") as temporary:
                temporary.write_bytes(picture)
        elif isinstance(block, Download):
            write_text(folder / "table.csv", block.csv)
    write_text(folder / "report.md", markdown.write(content))
    write_text(folder / "report.html", html.write(content))
    return folder / "report.html"


def _as_given_to_runs(path: Path) -> Path:
    """Relative to the repository's root, where it lies in there: so the page's commands run on any machine."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _facts(folder: Path) -> dict:
    path = folder / FACTS
    give = "give a folder that scripts/run_experiment.py has made, out/NAME"
    try:
        facts = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no {FACTS} in it; {give}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {give}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("file"), str):
        raise UserError(f"{path}: it does not say which file the experiment is in; {give}")
    return facts
