"""How far a step moves the attention: `python scripts/attention_kl_bound.py CHECKPOINT …`, or `--demo`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.diagnostics import run
from harness.diagnostics.attention_kl_bound import DIAGNOSTIC
from harness.diagnostics.attention_kl_bound_demo import demo
from harness.errors import run_cli


def main() -> None:
    if "--demo" in sys.argv[1:]:
        demo(sys.argv[1:])
    else:
        run(DIAGNOSTIC)


if __name__ == "__main__":
    sys.exit(run_cli(main))
