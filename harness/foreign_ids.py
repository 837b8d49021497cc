"""Files of token ids that another program wrote: what they seem to hold, and what their ids may stand for."""

import io
import pickle
import pickletools
from contextlib import suppress
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.tokenizer import GPT2, Ids, Tokenizer, from_meta

MAGIC = {b"\x93NUMPY": "a .npy file", b"\x1f\x8b\x08": "gzip", b"PK\x03\x04": "a zip or .npz file", b"PAR1": "Parquet"}


def foreign_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer of a meta.json that another program or a user wrote: bare ids, where all that is known here is how
    many there are."""
    if "vocab_size" not in meta:
        return from_meta(meta)
    with suppress(UserError):
        return from_meta(meta)
    return from_meta(meta | {"tokenizer": Ids.name})


def file_format(raw: bytes) -> str | None:
    """What a file that begins with `raw` is, if not an array of numbers alone."""
    for magic, name in MAGIC.items():
        if raw.startswith(magic):
            return name
    text = raw.decode(errors="replace").rstrip("\ufffd")  # the last character may be cut off
    readable = "\ufffd" not in text and all(character.isprintable() or character in "\t\n\r\f" for character in text)
    return "plain text" if readable and len(raw) >= 64 else None


def number_format(raw: bytes, vocab_size: int) -> str | None:
    """The numbers that an array which begins with `raw` more likely holds than uint16 ids; None where nothing speaks
    for others."""
    raw = raw[: len(raw) // 8 * 8]
    if len(raw) < 64:
        return None
    for dtype in ("float64", "float32"):  # read as these, uint16 ids are denormal for the most part
        values = np.frombuffer(raw, dtype)
        zero = values == 0
        if not zero.all() and np.all(zero | ((np.abs(values) > 1e-4) & (np.abs(values) < 2**32))):
            return dtype
    for order, name in (("<", ""), (">", "big-endian ")):  # wider ids: the words above the lowest are 0, or small
        words = np.frombuffer(raw, f"{order}u2")
        for bits in (64, 32):
            groups = words.reshape(-1, bits // 16)[:, :: 1 if order == "<" else -1]
            low, high = groups[:, 0], groups[:, 1:]
            negative = (high == 0xFFFF).all(1)
            if low.any() and ((high == 0).all(1) | negative).all():
                return f"{name}int{bits}" + (" with negative ids" if negative.any() else "")
        if not negative.all() and high[~negative].max() < 8 and low.max() >= 1024:  # some 500,000 ids at most
            return f"{name}int32 with negative ids" if negative.any() else f"{name}uint32 with ids above 65,535"
    swapped = np.frombuffer(raw, ">u2")
    if not (words := np.frombuffer(raw, "<u2") % 256).any() and swapped.any():
        return "big-endian uint16"
    if swapped.max() < vocab_size <= np.frombuffer(raw, "<u2").max():
        return "big-endian uint16"
    even, odd = (np.bincount(np.frombuffer(raw, "u1")[i::2], minlength=256) for i in (0, 1))
    enough = len(raw) >= 4096 and vocab_size <= GPT2.vocab_size  # ids of larger ones may fill both bytes evenly
    if enough and odd[1:].any() and np.minimum(even, odd).sum() > 0.85 * len(raw) / 2:
        return "uint8"  # what stands at even and at odd places is alike
    return None


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every object that has to be looked up by its name, so that nothing in the file can run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_vocabulary(path: Path) -> str | int:
    """The characters of nanoGPT's meta.pkl, {"vocab_size": V, "itos": {0: "a", …}, "stoi": {"a": 0, …}}, or V where it
    has no itos.

    Admits dicts, strings and integers only; UserError for anything else, and nothing in it is executed.
    """
    try:
        content = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(content):
            # Unpickling would allocate a memo as long as the largest number says, and hash nested tuples for ever.
            if opcode.name.startswith("TUPLE") or ("PUT" in opcode.name and (argument or 0) > len(content)):
                raise ValueError(f"{opcode.name} in it")
        meta = _PlainUnpickler(io.BytesIO(content)).load()
        if "itos" not in meta and isinstance(vocab_size := meta["vocab_size"], int) and vocab_size > 0:
            return vocab_size
        characters = [meta["itos"][i] for i in range(meta["vocab_size"])]
        if not all(isinstance(character, str) and len(character) == 1 for character in characters):
            raise ValueError("an id that is not one character")
        return "".join(characters)
    except Exception as error:  # bytes of unknown origin can fail in any way, and none is a mistake of ours
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path} is no character vocabulary of nanoGPT's ({reason}): remove or replace it") from error
