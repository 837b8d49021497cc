"""A damaged checkpoint gives what was written or a line: never anything else."""

import random
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from harness.checkpoint import read_checkpoint, save_checkpoint
from harness.errors import UserError
from tests.helpers import optimizer_of, tiny_gpt, train_by_hand


def same(a, b) -> bool:
    """Down to the bits of every tensor, how it lies in memory, and the type of every value."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        laid = [(x.dtype, x.shape, x.stride()) for x in (a, b)]
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        return laid[0] == laid[1] and torch.equal(*bits)
    return a == b


def regions(path: Path) -> dict[str, list[int]]:
    """What a byte of a checkpoint is → the places of all such bytes."""
    content = path.read_bytes()
    found = ["what stands behind a record"] * len(content)
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            at = record.header_offset
            name, extra = (int.from_bytes(content[at + i : at + i + 2], "little") for i in (26, 28))
            kind = "weights" if "/data/" in record.filename else record.filename.partition("/")[2]
            parts = [("header", 30), ("name", name), ("padding", extra), (kind, record.file_size)]
            for kind, size in parts:
                found[at : at + size] = [kind] * size
                at += size
        found[file.start_dir :] = ["directory"] * (len(content) - file.start_dir)
    end = content.rindex(b"PK\5\6")
    found[end:] = ["end of directory"] * (len(content) - end)
    return {kind: [i for i, other in enumerate(found) if other == kind] for kind in dict.fromkeys(found)}


def damage(path: Path, flips: int, cuts: int) -> Counter:
    """So many bytes of each region, one at a time, have one bit or all of them changed, and so many cuts: how often
    what was read then is what was written (`same`), something else (`other`), or a line."""
    written, content, generator = read_checkpoint(path), path.read_bytes(), random.Random(0)
    damaged = [content[:length] for length in generator.sample(range(len(content)), cuts)]
    for places in regions(path).values():
        for at in generator.choices(places, k=flips):
            change = generator.choice([1 << bit for bit in range(8)] + [255])
            damaged.append(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
    outcomes: Counter = Counter()
    for case in damaged:
        path.write_bytes(case)
        try:
            outcomes["same" if same(read_checkpoint(path), written) else "other"] += 1
        except UserError as error:
            outcomes["lines"] += "\n" not in str(error)
    assert outcomes.total() == len(damaged)
    return outcomes


@pytest.fixture
def run(tmp_path):
    """A run's two checkpoints, with all that is in one."""
    model = tiny_gpt(n_embd=4)
    optimizer = optimizer_of(model)
    train_by_hand(model, optimizer, 1)
    best = {"format": 1, "model": model.state_dict(), "model_args": asdict(model.config), "step": 1, "feedback": {}}
    best |= {"best_val_loss": 1.5, "config": {"run": {"name": "a", "seed": 1}}, "machine": {"ranks": 1}}
    best |= {"corpus": {"tokenizer": "chars", "vocabulary": "añ中", "folder": "a", "sha256": "0" * 64}}
    save_checkpoint(tmp_path / "best.pt", best)
    save_checkpoint(tmp_path / "ckpt.pt", best | {"optimizer": optimizer.state_dict(), "scaler": {}})
    return tmp_path


@pytest.mark.parametrize(
    ("flips", "cuts"), [(6, 20), pytest.param(1000, 1000, marks=[pytest.mark.faults, pytest.mark.slow])]
)
@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_checkpoint_with_a_flipped_byte_anywhere_or_cut_is_what_it_was_or_a_line(run, name, flips, cuts):
    outcomes = damage(run / name, flips, cuts)
    assert not outcomes["other"]
    assert outcomes["lines"] > cuts + 2 * flips  # cuts, and what is flipped in the weights and in the numbers, at least
