"""Any local text: files, and folders of them.

A file is a document. Several are split by a hash of each path, a single one by position: its end is for validation.

    python data/text/prepare.py book.txt --tokenizer chars
    python data/text/prepare.py ~/notes ~/papers --glob '*.md' --out data/notes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import TextFile, argument_parser, find_files, fraction, pieces, split_files, write_corpus
from harness.errors import UserError, run_cli
from harness.tokenizer import Chars, Tokenizer, from_name


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder to search")
    parser.add_argument("--glob", default="*.txt", metavar="PATTERN", help="which files of a folder (default: *.txt)")
    parser.add_argument("--val-fraction", type=fraction, default=0.05, metavar="F", help="default: 0.05")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes", "chars"), default="gpt2", help="default: gpt2")
    args = parser.parse_args()

    files: dict[str, Path] = {}
    for path in args.paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
        path = path.resolve()
        found = find_files(path, args.glob) if path.is_dir() else {"": path}
        files |= {(Path(path.name) / key).as_posix(): file for key, file in found.items()}
    if not files:
        raise UserError(f"no file matches {args.glob!r} in {', '.join(map(str, args.paths))}: choose with --glob")
    if len(files) > 1:
        documents = split_files(files, args.val_fraction)
    else:
        documents = halves(next(iter(files.values())), args.val_fraction)

    if args.tokenizer == "chars":
        texts = (piece.decode(errors="replace") for _, document in documents for piece in pieces(document))
        tokenizer: Tokenizer = Chars("".join(sorted(set().union(*texts))))
    else:
        tokenizer = from_name(args.tokenizer)
    write_corpus(
        args.out,
        documents,
        tokenizer,
        source=", ".join(path.resolve().name for path in args.paths),
        threads=args.threads,
        total_bytes=sum(path.stat().st_size for path in files.values()),
    )


def halves(path: Path, val_fraction: float) -> list[tuple[str, TextFile]]:
    """One file cut in two, between characters."""
    cut = int(path.stat().st_size * (1 - val_fraction))
    with open(path, "rb") as file:
        file.seek(cut)
        while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # a byte 0b10… continues a UTF-8 character
            cut += 1
    return [("train", TextFile(path, 0, cut)), ("val", TextFile(path, cut))]


if __name__ == "__main__":
    sys.exit(run_cli(main))
