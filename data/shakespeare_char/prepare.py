"""Shakespeare by Andrej Karpathy's selection, character by character, split as nanoGPT splits it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.shakespeare.prepare import prepare
from harness.errors import run_cli
from harness.tokenizer import Chars

if __name__ == "__main__":
    sys.exit(run_cli(lambda: prepare(__file__, __doc__, lambda text: Chars("".join(sorted(set(text)))))))
