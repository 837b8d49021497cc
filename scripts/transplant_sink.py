"""Move the sinks of a trained model into a null slot, without training: `transplant_sink.py CHECKPOINT OUT --data DIR`.

Each head gets a null slot in front of the first token (the normalizer kvbias). Its key and its value are the means of
those that the tokens of a calibration text have when they come first. OUT/ckpt.pt is a checkpoint as any other, for the
diagnostics and for training.init_from.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import numpy as np
import torch

from harness.checkpoint import FORMAT, check_finite, save_checkpoint
from harness.corpus import SPLITS
from harness.diagnostics import Subject
from harness.figures import print_table
from harness.files import check_folder, make_folder
from measure.transplant import first_tokens, transplanted

COLUMNS = ("layer", "key_agreement", "value_agreement")
READING = (
    "key_agreement, value_agreement: norm of the mean over mean norm, averaged over heads. At 1 all tokens have one\n"
    "key, or one value, when they come first, and a null slot can stand for them."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="ckpt.pt or hf:NAME_OR_FOLDER, trained with softmax")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, to be made, for ckpt.pt")
    parser.add_argument("--data", metavar="DIR", help="the corpus; default: the one the checkpoint was trained on")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="spread over the split; default: 4096")
    parser.add_argument("--value", choices=("mean", "zero"), default="mean", help="of the null slot; default: mean")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    args = parser.parse_args(namespace=argparse.Namespace(bos=None, block_size=None))  # what a Subject asks for besides
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: at least 1")
    path = args.out / "ckpt.pt"
    if path.exists():
        raise UserError(f"{path} is there already: give another folder, or remove it")
    check_folder(args.out)  # before a large model is read in vain

    subject = Subject(args.checkpoint, args)
    check_finite(subject.model, args.checkpoint)
    subject.corpus.verify(args.split)
    text = subject.corpus.tokens[args.split]
    chosen = text[np.linspace(0, len(text) - 1, min(args.tokens, len(text))).astype(np.int64)].astype(np.int64)
    first = first_tokens(subject.model, torch.from_numpy(chosen).to(subject.device))
    try:
        model = transplanted(subject.model, first, with_value=args.value == "mean")
    except ValueError as e:
        raise UserError(f"{args.checkpoint}: {e}") from e
    make_folder(args.out)
    corpus = subject.corpus.tokenizer.describe() | {"folder": subject.corpus_folder, "sha256": subject.corpus.sha256}
    content = {"format": FORMAT, "model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
    save_checkpoint(path, content | {"step": subject.step or 0, "corpus": corpus, "source": args.checkpoint})
    rows = [
        {"layer": layer, **{name: getattr(token, name).mean().item() for name in COLUMNS[1:]}}
        for layer, token in enumerate(first)
    ]
    print_table(rows, list(COLUMNS))
    print(f"\n{READING}\n\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
