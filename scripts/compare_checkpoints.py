"""Several checkpoints side by side: runs diagnostics over each of them, and puts their summaries in one table and one
picture. `python scripts/NAME.py --help` explains each diagnostic's values and options, which may be given here too.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from harness.comparison import DIAGNOSTICS, config_of, draw, find_diagnostic, headlines, without_losses_of_few_windows
from harness.curves import variants
from harness.diagnostics import (
    Diagnostic,
    Subject,
    argument_parser,
    arguments_for,
    check_files,
    entry,
    labels,
    name_in_run,
    write_json,
)
from harness.errors import UserError, run_cli
from harness.figures import print_table, save_figure
from harness.tracking import log_diagnostic

NAME = "compare_checkpoints"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(NAME, __doc__, None, None, otherwise="each diagnostic's own")
    parser.add_argument(
        "--diagnostics",
        nargs="+",
        default=DIAGNOSTICS,
        metavar="NAME",
        help=f"scripts that take a checkpoint; default: {' '.join(DIAGNOSTICS)}",
    )
    parser.epilog = textwrap.fill(
        "The table has a line a value and a column a checkpoint; – where a value does not exist. The JSON has, under "
        "rows, a row a checkpoint, and under checkpoints what each script would have written. The picture has a few "
        "headline values of each diagnostic, without those that are the same for all checkpoints; in it, runs of one "
        "config but for the seed are one line. Beside perplexity, the losses that other diagnostics found on their few "
        "windows are in the JSON alone.",
        100,
    )
    args, further = parser.parse_known_args(argv)
    if len(args.checkpoints) < 2:
        raise UserError(f"{args.checkpoints[0]} alone: name at least two checkpoints to compare")
    names = labels(args.checkpoints)
    diagnostics = [find_diagnostic(name, "--diagnostics ") for name in args.diagnostics]
    arguments, unknown = zip(*(arguments_of(diagnostic, args, further) for diagnostic in diagnostics), strict=True)
    if nobodys := set.intersection(*unknown):
        raise UserError(f"{', '.join(sorted(nobodys))}: no option of {', '.join(args.diagnostics)}")
    folder = check_files(NAME, args)

    rows: list[dict[str, Any]] = [{"checkpoint": name} for name in names]
    entries, configs = [], {}
    pairs = [(c, d) for c in range(len(rows)) for d in range(len(diagnostics))]
    for c, d in tqdm(pairs, desc="comparing", leave=False, disable=None):
        subject = Subject(args.checkpoints[c], arguments[d])
        found = entry(diagnostics[d].name, subject, diagnostics[d].result(subject))
        rows[c]["step"] = subject.step
        configs[names[c]] = config_of(subject)
        rows[c] |= {f"{diagnostics[d].name}/{name}": value for name, value in found["summary"].items()}
        entries.append(found)

    values = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "checkpoint"]
    shown = without_losses_of_few_windows(values)
    print_table([{"value": v} | {row["checkpoint"]: row.get(v) for row in rows} for v in shown], ["value", *names])
    if notes := sum(len(found["notes"]) for found in entries):
        print(f"\n{notes} notes are in the JSON")
    written = [
        write_json(folder / f"{NAME}.json", [{"script": NAME, "rows": rows, "checkpoints": entries}]),
        save_figure(draw(rows, headlines(shown, diagnostics), variants(configs)), folder / f"{NAME}.png"),
    ]
    for path, row in zip(args.checkpoints, rows, strict=True) if args.wandb else ():
        log_diagnostic(Path(path).parent, name_in_run(NAME, path), {v: row.get(v) for v in values}, written[-1])
    print("\nwritten: " + ", ".join(map(str, written)))


def arguments_of(
    diagnostic: Diagnostic, args: argparse.Namespace, further: list[str]
) -> tuple[argparse.Namespace, set[str]]:
    """The diagnostic's own defaults, and over them what was given here; and which of the further options it lacks."""
    parser = argument_parser(diagnostic.name, diagnostic.about, diagnostic.batches, diagnostic.batch_size)
    diagnostic.add_arguments(parser)
    own, unknown = parser.parse_known_args([*args.checkpoints, *further])
    vars(own).update({name: value for name, value in vars(args).items() if value is not None and name in own})
    return arguments_for(diagnostic, own), {word.partition("=")[0] for word in unknown if word.startswith("-")}


if __name__ == "__main__":
    sys.exit(run_cli(main))
