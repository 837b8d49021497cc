"""Files that torch.save wrote, read as data: no code in them runs, damage is noticed, and reading takes no more memory
than the file's size suggests.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError

SHARING = 16
"""Tensors may share memory, as a tied head or layers of the same weights do. Each with memory of its own, all may take
this many times the file's size."""

DEEPEST, MOST_VALUES = 50, 10**7
"""How deep the dicts and lists in a file may be nested, and how many values it may hold."""

OURS_ALONE = "Where it was made, write {'model': state_dict, 'model_args': {…}} alone with torch.save"


def read_torch_file(path: Path, device: str | torch.device = "cpu", advice: str = OURS_ALONE) -> Any:
    """What torch.save has written to `path`. UserError if the file cannot be read, is damaged by the checksums of its
    records, would take far more memory than its size, or holds anything but tensors and plain values; the `advice` is
    for the last case."""
    try:
        check_records(path)
        content = torch.load(path, map_location=device, weights_only=True)
        check_size(content, path)
        return content
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except IsADirectoryError:
        name = f"hf:{path}" if (path / "config.json").exists() else f"the checkpoint in it, {path / 'ckpt.pt'} say"
        raise UserError(f"{path} is a folder: name {name}") from None
    except (NotADirectoryError, PermissionError) as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL (\S+)", str(e))
        held = f" (such as {found[1]})" if found else ""
        raise UserError(
            f"{path} is not a checkpoint, or holds more than tensors and plain values{held}; "
            f"nothing in it was run. {advice}"
        ) from e
    except UserError:
        raise
    except Exception as e:  # the zip reader and the unpickler raise anything on other bytes, OSErrors too
        if path.suffix == ".safetensors":
            raise UserError(f"{path} is not a checkpoint: name the folder that it is in, hf:{path.parent}") from e
        if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            raise UserError(f"{path} does not fit into the memory that is free, {path.stat().st_size:,} bytes") from e
        raise UserError(f"{path} is truncated or not a checkpoint: PyTorch cannot read it") from e


def check_records(path: Path) -> None:
    """UserError unless every record of the zip file at `path` is stored uncompressed and has the CRC-32 that torch.save
    stored with it; torch.load does not compare these. UnpicklingError if a pickle in it makes a bytearray. Files that
    are no zip, such as those of PyTorch before 1.6, have no checksums."""
    with open(path, "rb") as opened:
        if opened.read(4) != b"PK\3\4":  # how torch.load tells that a file is a zip
            return _refuse_buffers(opened.read())
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint: the directory at its end is not there")
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            packed, size = sum(record.file_size for record in records), path.stat().st_size
            if packed > size:  # compressed records, or overlapping ones
                raise UserError(
                    f"{path} is a packed file: {size:,} bytes that unfold to {packed:,}. Unzip it, and put it together "
                    "again without compression (zip -0)"
                )
            folders = [record.filename for record in records if record.external_attr & 0x10]  # torch.save writes none
            if not any(record.CRC for record in records):  # saved without them, by set_crc32_options(False)
                for record in records:
                    record.CRC = None  # type: ignore[assignment]  # so that zipfile compares nothing
            damaged = folders[0] if folders else file.testzip()
            for record in records if not damaged else ():
                if record.filename.lower().endswith("data.pkl"):  # torch.load ignores the case
                    _refuse_buffers(file.read(record))
    except (UserError, pickle.UnpicklingError):
        raise
    except Exception as e:  # a damaged name, offset or flag
        raise UserError(f"{path} is damaged ({first_line(e)}): use another copy of it") from e
    if damaged:
        raise UserError(f"{path} is damaged: its record {damaged} is not what was written; use another copy of it")


def _refuse_buffers(content: bytes) -> None:
    """UnpicklingError if a pickle makes a bytearray, which may be of any length, whatever the file's."""
    if re.search(rb"c(builtins|__builtin__)\nbytearray\n", content):
        raise pickle.UnpicklingError("GLOBAL builtins.bytearray")


def check_size(content: Any, path: Path) -> None:
    """UserError if the content of `path` would take far more memory than the file, were each tensor given memory of its
    own or each value printed. A few bytes can repeat a number a million times, or make a list that holds itself."""
    size, values, text, memory = path.stat().st_size, 0, 0, 0
    waiting: list[tuple[Any, int]] = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, dict):
            waiting += [(x, depth + 1) for item in value.items() for x in item]
        elif isinstance(value, list | tuple | set):
            waiting += [(x, depth + 1) for x in value]
        elif isinstance(value, str | bytes):
            text += len(value)
        elif torch.is_tensor(value):
            if value.layout is not torch.strided or value.is_meta or value.is_nested:
                raise UserError(f"{path} holds a tensor that is sparse, nested or without values: save it as it is")
            memory += value.numel() * value.element_size()
        if depth > DEEPEST or values + text > size or values > MOST_VALUES or memory > SHARING * size:
            raise UserError(f"{path} is not a checkpoint: what it holds unfolds to far more than its {size:,} bytes")


def first_line(error: Exception) -> str:
    """What an error says, in a line: PyTorch's begin with where it was, and several may follow."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 else lines[0]
