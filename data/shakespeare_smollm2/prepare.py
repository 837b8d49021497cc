"""Shakespeare by Andrej Karpathy's selection, in the tokens of SmolLM2, split as nanoGPT splits it.

The tokenizer is that of out/smollm2, which `python scripts/fetch_smollm2.py` makes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.shakespeare.prepare import prepare
from harness.errors import UserError, run_cli
from harness.tokenizer import from_name

MODEL = Path(__file__).resolve().parents[2] / "out" / "smollm2"


def main() -> None:
    if not MODEL.exists():
        raise UserError(f"no {MODEL}, whose tokenizer this corpus takes: run python scripts/fetch_smollm2.py first")
    prepare(__file__, __doc__, lambda _text: from_name(f"hf:{MODEL}"))


if __name__ == "__main__":
    sys.exit(run_cli(main))
