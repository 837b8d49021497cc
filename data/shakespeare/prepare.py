"""Shakespeare by Andrej Karpathy's selection, in GPT-2's byte-pair encoding, split as nanoGPT splits it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import argument_parser, read_or_download, write_corpus
from harness.errors import run_cli
from harness.tokenizer import GPT2

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("--input", metavar="FILE", help=f"the text, instead of downloading {URL}")
    args = parser.parse_args()
    text = read_or_download(URL, SHA256, args.input)
    cut = int(len(text) * 0.9)
    write_corpus(
        args.out,
        [("train", text[:cut]), ("val", text[cut:])],
        GPT2(),
        source=URL,
        threads=args.threads,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
