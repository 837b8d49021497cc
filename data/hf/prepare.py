"""Any Hugging Face dataset with a column of text: on the Hub, a local folder or file, or what save_to_disk wrote.

python data/hf/prepare.py Salesforce/wikitext --config wikitext-103-raw-v1 --val-split validation
python data/hf/prepare.py HuggingFaceFW/fineweb-edu --config sample-10BT --streaming --max-documents 1000000
python data/hf/prepare.py my_texts.jsonl --text-column body --out data/my_texts
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import huggingface_datasets
from harness.corpus_writing import argument_parser, fraction, positive, write_corpus
from harness.errors import run_cli
from harness.tokenizer import from_name


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("name", help="the dataset's name on the Hub, or a path")
    parser.add_argument("--config", help="the dataset's configuration, where it has several")
    parser.add_argument("--revision", help="branch or commit on the Hub")
    parser.add_argument("--split", default="train", help="the split to train on (default: train)")
    parser.add_argument("--val-split", help="the split to validate on (default: part of --split, see --val-fraction)")
    parser.add_argument(
        "--val-fraction", type=fraction, default=0.005, metavar="F", help="chosen by a hash of the text"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="encode while downloading, keep no copy of the text; when it was interrupted, the same command goes on",
    )
    parser.add_argument("--max-documents", type=positive, metavar="N", help="stop after N documents of --split")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, bytes, or hf:NAME_OR_FOLDER for that of a Hugging Face model (default: gpt2)",
    )
    args = parser.parse_args()
    path = Path(args.name)
    source = "/".join(part for part in (path.name if path.exists() else args.name, args.config, args.split) if part)
    write_corpus(
        args.out,
        Documents(args),
        from_name(args.tokenizer),
        source=source,
        threads=args.threads,
        shard_bytes=args.shard_size,
        arguments=what_decides(args) if args.streaming else None,
    )


class Documents:
    """Those of --split and then those of --val-split, as pairs of a split, or the share of validation, and a text."""

    def __init__(self, args):
        self._args, self._splits = args, [args.split, *([args.val_split] if args.val_split else [])]
        self._texts: huggingface_datasets.Texts | None = None
        self._begin: dict[str, Any] = {"split": 0, "documents": 0, "texts": None}
        self._split = self._taken = 0

    def state(self) -> dict:
        texts = self._texts.state() if self._texts else None
        return {"split": self._split, "documents": self._taken, "texts": texts}

    def go_on(self, state: dict) -> None:
        self._begin, self._split, self._taken = state, state["split"], state["documents"]

    def __iter__(self) -> Iterator[tuple[str | float, str]]:
        args, begin = self._args, self._begin
        options = dict(config=args.config, revision=args.revision, streaming=args.streaming, num_proc=args.threads)
        for number, split in enumerate(self._splits[begin["split"] :], begin["split"]):
            self._texts = huggingface_datasets.Texts(
                huggingface_datasets.load(args.name, split, **options), args.text_column
            )
            self._split, self._taken = number, 0
            of_split = "val" if number else "train" if args.val_split else args.val_fraction
            if begin["texts"] and number == begin["split"]:
                self._texts.go_on(begin["texts"])
                self._taken = begin["documents"]
            for text in self._texts:
                if number == 0 and self._taken == args.max_documents:
                    break
                self._taken += 1
                yield of_split, text


def what_decides(args) -> dict:
    """All that the text depends on: the command line, and of a local dataset its files' sizes and dates."""
    path, decides = Path(args.name), {key: value for key, value in vars(args).items() if key not in ("out", "threads")}
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return decides | {"files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]}


if __name__ == "__main__":
    sys.exit(run_cli(main))
