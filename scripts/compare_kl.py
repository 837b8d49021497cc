"""Two models, position by position: `python scripts/compare_kl.py REFERENCE CHECKPOINT …`, or `--demo`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.diagnostics import run
from harness.diagnostics.compare_kl import DIAGNOSTIC
from harness.diagnostics.compare_kl_demo import demo
from harness.errors import run_cli


def main() -> None:
    if "--demo" in sys.argv[1:]:
        demo(sys.argv[1:])
    else:
        run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
