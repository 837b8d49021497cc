"""What torch.save wrote is read as data: nothing is run, and a small file takes little memory and time."""

import collections
import io
import pickle
import zipfile

import pytest
import torch

from harness.errors import UserError
from harness.torch_files import read_torch_file


class Storage:
    """A record of a file of torch.save's, with as many numbers as it says."""

    def __init__(self, key: str, numbers: int):
        self.key, self.numbers = key, numbers


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, obj.key, "cpu", obj.numbers) if isinstance(obj, Storage) else None


def tensor(storage: Storage, size: tuple, stride: tuple, offset: int = 0) -> Call:
    hooks: collections.OrderedDict = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)


def archive(path, content, compression=zipfile.ZIP_STORED, **records: bytes) -> None:
    """Written as by torch.save, with a content or a compression that it would refuse."""
    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr("archive/byteorder", "little")
        for key, record in records.items():
            file.writestr(f"archive/data/{key}", record)
        file.writestr("archive/version", "3\n")


def laughs() -> list:
    found = ["ha"]
    for _ in range(40):
        found = [found, found]
    return found


def itself() -> dict:
    found: dict = {}
    found["itself"] = found
    return found


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


ONE = Storage("a", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": tensor(ONE, (10**6, 10**6), (0, 0))}, "unfolds to far more"),
        ({str(i): tensor(Storage("a", 1000), (1000,), (1,)) for i in range(500)}, "unfolds to far more"),
        ({"a": tensor(Storage("a", 10**9), (10**9,), (1,))}, "PyTorch cannot read it"),
        ({"a": tensor(ONE, (2,), (1,))}, "PyTorch cannot read it"),
        ({"a": Call(bytearray, 10**12)}, r"such as builtins\.bytearray"),
        ({"a": laughs()}, "unfolds to far more"),
        (itself(), "unfolds to far more"),
        ({"a": nested(200)}, "unfolds to far more"),
        ({"a": torch.zeros(2, device="meta")}, "sparse, nested or without values"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse, nested or without values"),
    ],
    ids=["stride 0", "shared", "claimed", "beyond", "bytearray", "laughs", "itself", "deep", "meta", "sparse"],
)
def test_what_unfolds_to_more_than_its_file_is_refused_before_it_takes_the_memory(tmp_path, content, reason):
    path = tmp_path / "a.pt"
    if any(isinstance(value, Call) for value in content.values()):
        archive(path, content, a=bytes(4000 if len(content) > 1 else 4))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"a\.pt .*{reason}"):
        read_torch_file(path)


def test_packed_records_are_refused_with_what_to_do(tmp_path):
    archive(
        tmp_path / "a.pt", {"a": tensor(Storage("a", 10**6), (10**6,), (1,))}, zipfile.ZIP_DEFLATED, a=bytes(4 * 10**6)
    )
    with pytest.raises(UserError, match=r"a\.pt is a packed file: .* unfold to 4,000,\d+\. Unzip it, and .*zip -0"):
        read_torch_file(tmp_path / "a.pt")


def test_what_shares_memory_or_repeats_a_number_within_its_size_is_read(tmp_path):
    shared = torch.arange(1000.0)
    content = {"a": shared, "b": shared[10:20], "c": torch.ones(1).expand(50, 4), "plain": [(1, 2.5), {"x": None}, "x"]}
    torch.save(content, tmp_path / "a.pt")
    read = read_torch_file(tmp_path / "a.pt")
    assert torch.equal(read["c"], content["c"])
    assert read["b"].data_ptr() == read["a"].data_ptr() + 40
    assert read["plain"] == content["plain"]
