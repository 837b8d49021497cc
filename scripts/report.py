"""Write the page of an experiment: what it asked and found, with its intervals, curves and commands.

    python scripts/report.py out/backcopy

In each folder: report.html, one file that needs no network; report.md, the same for GitHub, with its pictures in
figures/; and table.csv, every value. An experiment that is still going can be shown at any moment; the page says what
is missing.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import run_cli
from harness.experiments.grid import ROOT
from harness.report import write_report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="+", help="out/NAME of an experiment that was run"
    )
    args = parser.parse_args(argv)
    here = Path.cwd()
    os.chdir(ROOT)  # the paths in configs are relative to it
    for given in args.folders:
        size = write_report(here / given).stat().st_size
        print(f"{given / 'report.html'} ({size / 2**20:.1f} MiB), report.md, table.csv")


if __name__ == "__main__":
    sys.exit(run_cli(main))
