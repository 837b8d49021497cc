"""OpenWebText in GPT-2's byte-pair encoding, split as nanoGPT splits it: about 9 billion tokens, 18 GB.

Downloads some 13 GB and unpacks them to 40 GB under ~/.cache/huggingface (HF_HOME moves it).
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import argument_parser, write_corpus
from harness.errors import run_cli
from harness.huggingface_datasets import load, texts
from harness.tokenizer import GPT2

NAME = "Skylion007/openwebtext"


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("--revision", help="branch or commit on the Hub, e.g. refs/convert/parquet")
    args = parser.parse_args()
    dataset = load(NAME, "train", revision=args.revision, num_proc=args.threads)
    halves = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    write_corpus(
        args.out,
        itertools.chain(
            (("val", text) for text in texts(halves["test"], "text")),
            (("train", text) for text in texts(halves["train"], "text")),
        ),
        GPT2(),
        source=NAME,
        threads=args.threads,
        shard_bytes=args.shard_size,
        total_bytes=dataset.data.nbytes,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
