"""The Python source of every package installed, and of the standard library, in GPT-2's byte-pair encoding.

A corpus of up to hundreds of MB for GPT-2-sized runs that needs no download but the tokenizer's file. The files come in
the order of a hash, those for validation first: --max-tokens cuts the training split, at random files.
"""

import platform
import site
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import (
    argument_parser,
    find_files,
    fraction,
    positive,
    split_files,
    write_corpus,
)
from harness.documents import is_text
from harness.errors import UserError, run_cli
from harness.tokenizer import GPT2

# Installed packages may lie inside the standard library's folder: they come in by their own.
WITHOUT = ("site-packages", "dist-packages", "__pycache__")


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("--val-fraction", type=fraction, default=0.01, metavar="F", help="default: 0.01")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of both splits together; default: all")
    args = parser.parse_args()
    files: dict[Path, str] = {}
    for root in (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages()):
        files = find_files(Path(root), ["*.py"], WITHOUT) | files
    if binary := [path for path in files if not is_text(path)]:
        print(f"left out, no UTF-8 text: {len(binary)} file(s), the first {binary[0]}")
        files = {path: key for path, key in files.items() if path not in binary}
    if len(files) < 2:
        raise UserError("no Python source found in the folders of installed packages: use data/text")
    write_corpus(
        args.out,
        split_files(files, args.val_fraction),
        GPT2(),
        source=f"packages installed for Python {platform.python_version()}",
        threads=args.threads,
        shard_bytes=args.shard_size,
        total_bytes=sum(path.stat().st_size for path in files),
        max_tokens=args.max_tokens,
        extra={"python_version": platform.python_version()},
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
