"""Any Hugging Face dataset with a column of text: on the Hub, a local folder or file, or what save_to_disk wrote.

python data/hf/prepare.py Salesforce/wikitext --config wikitext-103-raw-v1 --val-split validation
python data/hf/prepare.py HuggingFaceFW/fineweb-edu --config sample-10BT --streaming --max-documents 1000000
python data/hf/prepare.py my_texts.jsonl --text-column body --out data/my_texts
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import huggingface_datasets
from harness.corpus_writing import argument_parser, fraction, position, positive, write_corpus
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
    parser.add_argument("--streaming", action="store_true", help="encode while downloading, keep no copy of the text")
    parser.add_argument("--max-documents", type=positive, metavar="N", help="stop after N documents of --split")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, bytes, or hf:NAME_OR_FOLDER for that of a Hugging Face model (default: gpt2)",
    )
    args = parser.parse_args()

    def texts(split):
        options = dict(config=args.config, revision=args.revision, streaming=args.streaming, num_proc=args.threads)
        return huggingface_datasets.texts(huggingface_datasets.load(args.name, split, **options), args.text_column)

    def documents():
        for text in itertools.islice(texts(args.split), args.max_documents):
            validates = not args.val_split and position(text.encode(errors="replace")) < args.val_fraction
            yield "val" if validates else "train", text
        for text in texts(args.val_split) if args.val_split else ():
            yield "val", text

    name = Path(args.name).name if Path(args.name).exists() else args.name
    source = "/".join(part for part in (name, args.config, args.split) if part)
    write_corpus(args.out, documents(), from_name(args.tokenizer), source=source, threads=args.threads)


if __name__ == "__main__":
    sys.exit(run_cli(main))
