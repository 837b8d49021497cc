"""The Bigram-Backcopy task on the characters of a text: the fruit fly of attention sinks (Guo et al. 2024).

A sequence is a begin-of-text token and 64 characters. The first is drawn as often as it is in the text. After an
ordinary character the next one is drawn from the text's bigrams; after a *trigger*, one of three frequent characters,
it repeats the character before the trigger. (A trigger that comes first has none before it, and is ordinary there.)
So a head that copies has nothing to do at an ordinary character, and sinks into the first token within a minute.

By default the text is the Python standard library's source, as data/stdlib takes it. Only its most frequent characters
are taken, and pairs that hold another one are left out. Every draw is a function of (seed, split, position): more
sequences leave those before them as they are.

    python data/backcopy/prepare.py --input play.txt --triggers 'te ' --out data/backcopy_play
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.stdlib.prepare import source_files
from harness.corpus import SPLITS
from harness.corpus_writing import argument_parser, positive, write_corpus
from harness.errors import UserError, run_cli
from harness.tokenizer import Chars

LENGTH = 64  # characters of a sequence
BEGIN = "␂"  # stands for the begin-of-text token, and so for no character of the text
VALIDATION = 2048  # sequences


def main():
    parser = argument_parser(__file__, __doc__)
    parser.add_argument("--input", type=Path, metavar="FILE", help="the text; default: the standard library's source")
    parser.add_argument("--triggers", metavar="CHARACTERS", help="default: the three that are most frequent")
    parser.add_argument("--characters", type=positive, default=96, metavar="N", help="most frequent; default: 96")
    parser.add_argument("--sequences", type=positive, default=65536, metavar="N", help="to train on; default: 65536")
    parser.add_argument("--seed", type=int, default=1337, metavar="S", help="default: 1337")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed}: at least 0 and below 2⁶⁴")

    paths = [args.input] if args.input else sorted(source_files())
    try:
        # A file of the standard library that is in another encoding may cost a few characters.
        texts = [path.read_bytes().decode(errors="strict" if args.input else "replace") for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{args.input} is no UTF-8 text, from byte {error.start} on: convert it, as by iconv"
        ) from error
    vocabulary, pairs = bigrams(texts, args.characters)
    by_frequency = "".join(vocabulary[i] for i in np.argsort(-pairs.sum(1), kind="stable"))
    triggers = by_frequency[:3] if args.triggers is None else args.triggers
    if unknown := set(triggers) - set(vocabulary):
        raise UserError(f"--triggers: {min(unknown)!r} is none of the {len(vocabulary)} characters taken from the text")
    if not 0 < len(set(triggers)) < len(vocabulary):
        raise UserError(f"--triggers {triggers!r}: at least one character, and not all {len(vocabulary)} of the text")
    trigger_ids = sorted({vocabulary.index(character) for character in triggers})

    def documents():
        for split, count in zip(SPLITS, (args.sequences, VALIDATION), strict=True):
            ids = sequences(pairs, trigger_ids, count, args.seed, SPLITS.index(split))
            text = "".join(map(vocabulary.__getitem__, ids.ravel().tolist()))
            yield from ((split, text[start : start + LENGTH]) for start in range(0, len(text), LENGTH))

    write_corpus(
        args.out,
        documents(),
        Chars(vocabulary + BEGIN, begin=len(vocabulary)),
        source=f"Bigram-Backcopy of {args.input.name if args.input else 'the standard library'}",
        threads=args.threads,
        shard_bytes=args.shard_size,
        extra={"sequence_length": LENGTH, "triggers": trigger_ids, "seed": args.seed},
    )


def bigrams(texts: Iterable[str], most: int) -> tuple[str, np.ndarray]:
    """The most frequent characters of the texts, sorted, and how often each follows each: (V, V) int64, by the first
    and the second. UserError where there is no pair of them."""
    codes = [np.frombuffer(text.encode("utf-32-le"), "<u4") for text in texts]
    counts = sum((np.bincount(code, minlength=0x110000) for code in codes), np.zeros(0x110000, np.int64))
    counts[ord(BEGIN)] = 0
    kept = np.sort(np.argsort(-counts, kind="stable")[: min(most, np.count_nonzero(counts))])
    V = len(kept)
    ids = np.full(0x110000, V)
    ids[kept] = np.arange(V)
    pairs = np.zeros((V + 1) ** 2, np.int64)
    for code in codes:
        of_text = ids[code]
        pairs += np.bincount((V + 1) * of_text[:-1] + of_text[1:], minlength=len(pairs))
    table = pairs.reshape(V + 1, V + 1)[:V, :V]
    if not table.any():
        raise UserError("the text has no two characters that follow each other")
    return "".join(map(chr, kept)), table


def sequences(pairs: np.ndarray, triggers: list[int], count: int, seed: int, stream: int) -> np.ndarray:
    """(count, LENGTH) ids by the rule above, all sequences at once. `pairs` as `bigrams` counts them; a character that
    nothing follows in the text is followed by any one, as often as it is in the text."""
    V = len(pairs)
    frequency = pairs.sum(1)
    table = np.concatenate((np.where(frequency[:, None] > 0, pairs, frequency), frequency[None]))  # last row: the first
    totals, ends = table.sum(1), np.cumsum(table)
    before, previous = np.full(count, V), np.full(count, V)
    ids = np.empty((count, LENGTH), np.int64)
    for position in range(LENGTH):
        generator = np.random.Generator(np.random.Philox(key=[seed, len(SPLITS) * position + stream]))
        draws = ends[V * previous + V - 1] - 1 - generator.integers(0, totals[previous])
        drawn = np.searchsorted(ends, draws, side="right") % V
        copies = np.isin(previous, triggers) & (position > 1)
        ids[:, position] = np.where(copies, before, drawn)
        before, previous = previous, ids[:, position]
    return ids


if __name__ == "__main__":
    sys.exit(run_cli(main))
