"""Shakespeare by Andrej Karpathy's selection, in GPT-2's byte-pair encoding, split as nanoGPT splits it."""

import hashlib
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import argument_parser, write_corpus
from harness.errors import UserError, run_cli
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
    options = dict(threads=args.threads, shard_bytes=args.shard_size)
    write_corpus(args.out, split, tokenizer_of(text), source=URL, **options)


def read_or_download(url: str, sha256: str, local: str | None) -> str:
    """The text of the file `local`, or where that is None of the download, which must have this sha256."""
    if local is not None:
        try:
            return Path(local).read_bytes().decode()
        except OSError as error:
            raise UserError(f"cannot read {local}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{local} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    instead = "fetch it by other means and give it with --input FILE"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except OSError as error:  # URLError, timeouts and broken connections are all OSErrors
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}): {instead}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"what {url} gives is not the file expected (its sha256 differs): {instead}")
    return data.decode()


if __name__ == "__main__":
    sys.exit(run_cli(lambda: prepare(__file__, __doc__, lambda _text: GPT2())))
