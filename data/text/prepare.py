"""Any local text: files, folders of them, and pipes.

A file is a document. A hash of each path splits them into those for training and for validation. Where whole files
cannot give the share that --val-fraction asks for, as one or a few cannot, the end of each file is for validation.

    python data/text/prepare.py book.txt --tokenizer chars
    python data/text/prepare.py ~/notes ~/papers --glob '*.md' --glob '*.tex' --out data/notes
    python data/text/prepare.py <(zcat book.txt.gz)
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import (
    TextFile,
    argument_parser,
    characters_of,
    find_files,
    fraction,
    split_files,
    write_corpus,
)
from harness.errors import UserError, run_cli
from harness.shard_writing import former_files
from harness.tokenizer import Chars, Tokenizer, from_name


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file, a folder to search, or a pipe")
    parser.add_argument(
        "--glob", action="append", metavar="PATTERN", help="which files of a folder; may be repeated (default: *.txt)"
    )
    parser.add_argument("--val-fraction", type=fraction, default=0.05, metavar="F", help="default: 0.05")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, bytes, chars, or hf:NAME_OR_FOLDER for that of a Hugging Face model (default: gpt2)",
    )
    args = parser.parse_args()
    patterns = args.glob or ["*.txt"]
    for pattern in patterns:
        if not Path(pattern).name:  # '', '.', '/'
            raise UserError(f"--glob {pattern!r} matches no file: give a pattern, '*' for every file")

    with tempfile.TemporaryDirectory() as copies:
        files: dict[Path, str] = {}
        names = []
        for number, path in enumerate(args.paths):
            if not path.exists():
                raise UserError(f"no such file or folder: {path}")
            if not (path.is_file() or path.is_dir()):
                path = copy_of_pipe(path, Path(copies, f"pipe {number}"))
            path = path.resolve()
            names.append(path.name)
            found = find_files(path, patterns) if path.is_dir() else {path: ""}
            for file, key in found.items():
                files.setdefault(file, (Path(path.name) / key).as_posix())
        for path in former_files(Path(args.out)):  # where a former corpus lies among the texts
            files.pop(path.resolve(), None)
        if not files:
            wanted = " or ".join(map(repr, patterns))
            raise UserError(f"no file matches {wanted} in {', '.join(map(str, args.paths))}: choose with --glob")
        documents = split(files, args.val_fraction)
        tokenizer: Tokenizer
        tokenizer = Chars(characters_of(documents)) if args.tokenizer == "chars" else from_name(args.tokenizer)
        write_corpus(
            args.out,
            documents,
            tokenizer,
            source=", ".join(names),
            threads=args.threads,
            shard_bytes=args.shard_size,
            total_bytes=sum(path.stat().st_size for path in files),
        )


def split(files: dict[Path, str], val_fraction: float) -> list[tuple[str, TextFile]]:
    """By whole files, or where that gives less than half or more than twice the share, by the end of each."""
    documents = split_files(files, val_fraction)
    sizes = {path: path.stat().st_size for path in files}
    share = sum(sizes[document.path] for of, document in documents if of == "val") / max(1, sum(sizes.values()))
    if val_fraction / 2 <= share <= 2 * val_fraction:
        return documents
    if len(files) > 1:
        print(
            f"whole files would give {share:.1%} of the text to validation: it gets the end of each, {val_fraction:.1%}"
        )
    return [half for _, document in documents for half in halves(document.path, val_fraction)]


def copy_of_pipe(pipe: Path, copy: Path) -> Path:
    """What can be read once only (`<(…)`, a FIFO, /dev/stdin) as a file, since text is read twice."""
    with open(pipe, "rb") as source, open(copy, "wb") as target:
        shutil.copyfileobj(source, target)
    return copy


def halves(path: Path, val_fraction: float) -> list[tuple[str, TextFile]]:
    """One file cut in two, between characters; a half without text is left out."""
    size = path.stat().st_size
    cut = int(size * (1 - val_fraction))
    with open(path, "rb") as file:
        file.seek(cut)
        while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # a byte 0b10… continues a UTF-8 character
            cut += 1
    return [("train", TextFile(path, 0, cut))] * (cut > 0) + [("val", TextFile(path, cut, size))] * (cut < size)


if __name__ == "__main__":
    sys.exit(run_cli(main))
