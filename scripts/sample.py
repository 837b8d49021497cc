"""Stream text from a checkpoint: `python scripts/sample.py CHECKPOINT [--prompt TEXT] [--temperature T] …`."""

import argparse
import codecs
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch

from harness.checkpoint import load_model
from harness.corpus import Corpus
from harness.device import choose_device
from harness.generation import generate
from harness.tokenizer import Ids, Tokenizer, from_meta
from measure.perplexity import nonfinite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="ckpt.pt of this project or of nanoGPT, or hf:NAME_OR_FOLDER")
    parser.add_argument("--prompt", help="text to continue (default: a new document)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="default: 500")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default: 0.8")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--stop", action="store_true", help="end at the document separator")
    parser.add_argument("--num_samples", type=int, default=1, help="default: 1")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", metavar="DIR", help="the corpus with the tokenizer, where the checkpoint lacks it")
    args = parser.parse_args()
    for name, least in (("max_new_tokens", 0), ("temperature", 0), ("num_samples", 1), ("top_k", 1)):
        if (value := getattr(args, name)) is not None and not value >= least:  # NaN is not
            raise UserError(f"--{name} {value}: at least {least}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: above 0 and at most 1")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed}: at least 0 and below 2⁶⁴")

    device = choose_device(args.device)
    model, info = load_model(args.checkpoint, device)
    tokenizer = find_tokenizer(args, info, model.config.vocab_size)
    separator = tokenizer.separator
    prompt_text = (args.prompt or "").encode(errors="surrogateescape")  # any bytes, as they were typed
    prompt = [0 if separator is None else separator]
    if prompt_text:
        prompt = ([] if tokenizer.begin is None else [tokenizer.begin]) + tokenizer.encode(prompt_text).tolist()
    idx = torch.tensor([prompt], device=device)
    if findings := nonfinite(model, idx[:, -model.config.block_size :]):
        raise UserError(f"{args.checkpoint} predicts no distribution to draw from: {'; '.join(findings)}")
    generator = torch.Generator(device).manual_seed(args.seed)
    for number in range(args.num_samples):
        if number:
            print("\n" + "-" * 80)
        text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need several tokens
        print(text.decode(prompt_text), end="", flush=True)
        for token in generate(
            model,
            idx,
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_token=separator if args.stop else None,
            generator=generator,
        ):
            if token.item() < tokenizer.vocab_size:  # the padding of the vocabulary stands for no text
                print(text.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
        print(text.decode(b"", final=True))


def find_tokenizer(args, info: dict, vocab_size: int) -> Tokenizer:
    """That of the corpus in --data; else the checkpoint's own, or bare ids where only their number is known; for a
    Hugging Face checkpoint without one, GPT-2's. UserError where the checkpoint was trained with another."""
    if args.data:
        corpus = Corpus(args.data, (), vocab_size)
        corpus.check_fits(args.checkpoint, info, vocab_size)
        if corpus.note:
            print(f"note: {corpus.note}", file=sys.stderr)
        return corpus.tokenizer
    described = info.get("corpus") or ({"tokenizer": "gpt2"} if args.checkpoint.startswith("hf:") else None)
    if described is None:
        raise UserError(f"{args.checkpoint} does not say how its text was tokenized: name its corpus with --data DIR")
    if str(described["tokenizer"]).startswith("of its own"):
        what = f"{described['tokenizer']}, {described['problem']}"
        print(f"note: {args.checkpoint} has a tokenizer {what}: these are its ids", file=sys.stderr)
        return Ids(vocab_size)
    tokenizer = from_meta(described)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{args.checkpoint} has {vocab_size} token ids, the tokenizer '{tokenizer.name}' "
            f"{tokenizer.vocab_size}: give the corpus it was trained on with --data"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(run_cli(main))
