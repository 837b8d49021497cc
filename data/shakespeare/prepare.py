"""Shakespeare by Andrej Karpathy's selection, in GPT-2's byte-pair encoding, split as nanoGPT splits it."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import argument_parser, read_or_download, write_corpus
from harness.errors import run_cli
from harness.tokenizer import GPT2, Tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(script: str, about: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    """The command line of a corpus of this text: its `script`, what it is about, and the tokenizer for the text."""
    parser = argument_parser(script, about)
    parser.add_argument("--input", metavar="FILE", help=f"the text, instead of downloading {URL}")
    args = parser.parse_args()
    text = read_or_download(URL, SHA256, args.input)
    cut = int(len(text) * 0.9)
    split = [("train", text[:cut]), ("val", text[cut:])]
    write_corpus(args.out, split, tokenizer_of(text), source=URL, threads=args.threads)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: prepare(__file__, __doc__, lambda _text: GPT2())))
