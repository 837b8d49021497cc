"""Verify the theory that the other diagnostics rest on, and draw it: `python scripts/kl_theory.py [--out DIR]`.

17 sections, from coding to DPO. Each check is a line: PASS or FAIL, section, statement, the figure found and the figure
due, with the tolerance where they are to be equal. Of a statement about many cases the one furthest off is shown. Then
ten pictures, and kl_theory.json with a row a check: section, name, found, relation (=, ≤ or ≥), due, tolerance, passed.
An exception is a FAIL that ends its section (`error` in the JSON); the others go on. Needs no checkpoint and no data.
Exit status 1 if a check fails.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from harness.diagnostics import Result, entry, write_json
from harness.errors import run_cli
from harness.figures import save_figure
from harness.files import check_folder
from harness.theory_pictures import PANELS
from measure import theory
from measure.theory.checks import line, outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/kl_theory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/kl_theory"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    check_folder(args.out)
    rows = []
    for section, check_section in enumerate(theory.SECTIONS, 1):
        print(f"\n§{section} {check_section.__doc__}")
        for row in outcomes(section, check_section):
            print(line(row))
            rows.append(row)
    failed = sum(not row["passed"] for row in rows)
    summary = {"checks": len(rows), "passed": len(rows) - failed, "failed": failed}
    print(f"\n{len(rows)} checks in {len(theory.SECTIONS)} sections: {failed} failed")
    written = [write_json(args.out / "kl_theory.json", [entry("kl_theory", None, Result(rows, summary))])]
    for name, draw in tqdm(PANELS.items(), desc="pictures", leave=False, disable=None):
        written.append(save_figure(draw(), args.out / f"{name}.png"))
    print(f"written to {args.out}: " + ", ".join(path.name for path in written))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
