"""How much of the gradient through attention is lateral? `python scripts/jacobian_energy.py CHECKPOINT …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.diagnostics import run
from harness.diagnostics.jacobian_energy import DIAGNOSTIC
from harness.errors import run_cli


def main() -> None:
    run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
