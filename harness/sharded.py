"""Checkpoints of a model that is sharded over ranks, written in the background by torch.distributed.checkpoint.

Every rank writes its share of the weights and of the optimizer's state to out/<run>/shards/<step>/. When all of it is
on the disk, rank 0 reads the weights back and puts them, whole, into an ordinary ckpt.pt, which every diagnostic reads.
Its `optimizer` has no state; that is in `shards`: {"folder", "crc32": {file: CRC-32}}. The rename of ckpt.pt makes
the new checkpoint the current one; only then is the former folder removed. So a run can be killed at any moment, and go
on on another number of ranks, sharded or not.
"""

import errno
import io
import math
import pickle
import pickletools
import re
import shutil
import stat
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from harness.checkpoint import save_checkpoint
from harness.distributed import Ranks
from harness.errors import UserError
from harness.files import flush
from harness.parallel import own_part
from harness.runfolder import remove_shards

FOLDER = "shards"


class BackgroundSaver:
    """Writes checkpoints into the run's folder, where all ranks see the same, while training goes on.

    Every rank calls every method, in the same order.
    """

    def __init__(self, folder: Path, ranks: Ranks):
        self._folder, self._ranks = folder, ranks
        self._group = dist.new_group(backend="gloo")  # what the background sends does not meet what training sends
        self._failure = ""

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, content: dict[str, Any], paths: list[Path]):
        """Copy the model's and the optimizer's state, and return: they may change again. What is then written, on rank
        0 to each of `paths` in their order, has `content` and the weights; the last of them is ckpt.pt."""
        self.wait()
        of_optimizer = optimizer.state_dict()
        state = {
            "model": dict(model.named_parameters()),
            "optimizer": {str(i): values for i, values in of_optimizer.pop("state").items()},
        }
        if (self._folder / FOLDER).is_symlink():
            raise UserError(
                f"{self._folder / FOLDER} is a link: two runs that share it would remove each other's. Give a "
                "run.out_dir on the disk that it leads to, in its place"
            )
        shards = self._folder / FOLDER / str(content["step"])
        if self._ranks.is_main and shards.exists():  # of a process that was killed before it wrote its ckpt.pt
            shutil.rmtree(shards)
        self._ranks.share(None)  # nobody writes before that is done
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dcp.async_save(state, checkpoint_id=shards, process_group=self._group)
        del state
        how = (written, shards, content, of_optimizer, paths)
        self._ranks.background = threading.Thread(target=self._finish, args=how)
        self._ranks.background.start()

    def _finish(self, written, shards: Path, content: dict, of_optimizer: dict, paths: list[Path]) -> None:
        """On every rank the end of a save, in a thread. All ranks meet twice, whatever has failed on one of them, so
        that none waits for ever and each knows in the end what is to be told."""
        sums, failure = {}, ""
        try:
            written.result()
            names = [*shards.glob(f"__{self._ranks.rank}_*"), *([shards / ".metadata"] * self._ranks.is_main)]
            sums = {path.name: crc32(path) for path in names}
        except (Exception, dcp.api.CheckpointException) as error:
            failure = reason(error)
        found = self._gather((sums, failure))
        failure = next((failed for _, failed in found if failed), "")
        if self._ranks.is_main and not failure:
            try:
                crc32_of = {name: crc for own, _ in found for name, crc in own.items()}
                self._make_whole(shards, crc32_of, content, of_optimizer, paths)
            except Exception as error:
                failure = reason(error)
        if failure := next(filter(None, self._gather(failure)), ""):
            former = (
                "the former checkpoint is intact" if (self._folder / "ckpt.pt").exists() else "there was none before"
            )
            known = failure.startswith("cannot write")  # it says the rest itself
            self._failure = failure if known else f"cannot write {shards}: {failure}; {former}"

    def _gather(self, value) -> list:
        values = [value] * self._ranks.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _make_whole(self, shards: Path, crc32_of: dict, content: dict, of_optimizer: dict, paths: list[Path]) -> None:
        """On rank 0: the weights, whole, to each of the paths, the last of which is ckpt.pt and names the shards."""
        for folder in (shards, shards.parent, self._folder):
            flush(folder)
        weights = whole_weights(shards)
        if content["model_args"]["tie_embeddings"]:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        whole = {"model": weights} | content
        for path in paths[:-1]:
            save_checkpoint(path, whole)
        named = {"folder": f"{FOLDER}/{shards.name}", "crc32": crc32_of}
        save_checkpoint(paths[-1], whole | {"shards": named, "optimizer": of_optimizer})
        remove_shards(self._folder, named)

    def wait(self) -> None:
        """Return once the last checkpoint is complete. UserError, on every rank, if it could not be written."""
        if self._ranks.background:
            self._ranks.background.join()
            self._ranks.background = None
        failure, self._failure = self._failure, ""
        if failure:
            raise UserError(failure)


def reason(error: BaseException) -> str:
    """Why reading or writing shards failed, in a line: PyTorch tells of all ranks, each with its traceback, and its
    writer of a file hides the system's error."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__


def crc32(path: Path) -> int:
    """Of a file's content. OSError where it is no plain file."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def whole_weights(shards: Path) -> dict[str, Tensor]:
    """Every parameter, whole, on the CPU."""
    reader = Reader(shards)
    weights = {
        name.removeprefix("model."): torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.tensors().items()
        if name.startswith("model.")
    }
    reader.load({"model": weights})
    return weights


def optimizer_state(
    checkpoint: dict[str, Any], path: Path, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> dict[int, dict[str, Tensor]]:
    """The state of every parameter, by its number, in the checkpoint that was read from `path`: as `optimizer`, of any
    number of ranks, has its parameters. With `ranks` every rank calls this, and each looks at a part of the files.
    UserError if a file is missing, damaged, or holds anything but tensors."""
    ranks = ranks or Ranks(torch.device("cpu"))
    named: dict[str, Any] = checkpoint["shards"] if isinstance(checkpoint["shards"], dict) else {}
    folder, crc32_of = named.get("folder", ""), named.get("crc32", {})
    whole = isinstance(folder, str) and re.fullmatch(rf"{FOLDER}/\d+", folder) and isinstance(crc32_of, dict)
    if not whole or not all(type(name) is str and type(crc) is int for name, crc in crc32_of.items()):
        raise UserError(f"{path} has a shards that no run has written")
    check_files(shards := path.parent / folder, crc32_of, path, ranks)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[str, dict[str, Tensor]] = {}
    try:
        reader, size = Reader(shards), sum((shards / name).stat().st_size for name in crc32_of)
        if unknown := reader.files() - crc32_of.keys():
            raise ValueError(f"{min(unknown)} has no checksum")
        for key, about in reader.tensors().items():
            part, number, *name = key.split(".")
            if part != "optimizer":
                continue
            size -= about.size.numel() * about.properties.dtype.itemsize
            if not number.isdecimal() or size < 0:
                raise ValueError(f"{key} of {tuple(about.size)} is not in it")
            parameter = parameters[int(number)]
            sharded = about.size == parameter.shape
            made = torch.empty_like(parameter) if sharded else torch.empty(about.size, dtype=about.properties.dtype)
            state.setdefault(number, {})[".".join(name)] = made.detach().fill_(math.nan)
        reader.load({"optimizer": state})
        for number, values in state.items():
            if not all(own_part(x).isfinite().all() for x in values.values()):  # NaN where nothing was read into it
                raise ValueError(f"what is there of parameter {number} is not all, or not finite")
    except (Exception, dcp.api.CheckpointException) as error:  # the unpickler and the reader raise anything
        raise UserError(f"{shards} does not hold the optimizer's state of {path}: {reason(error)}") from error
    return {int(number): values for number, values in state.items()}


def check_files(shards: Path, crc32_of: dict[str, int], path: Path, ranks: Ranks) -> None:
    """UserError, on every rank, unless each of the files has its CRC-32."""
    found = None
    for name in sorted(crc32_of)[ranks.rank :: ranks.size]:
        try:
            if Path(name).name != name or crc32(shards / name) != crc32_of[name]:
                found = found or f"{shards / name} is damaged"
        except (OSError, ValueError) as error:
            found = found or f"cannot read {shards}/{name!r} ({getattr(error, 'strerror', None) or error})"
    if found := next(filter(None, ranks.gather(found)), None):
        advice = "start a run of another name with training.init_from, which takes the weights alone"
        raise UserError(
            f"{found}, so the optimizer's state of {path} is lost: use another copy of the run, or {advice}"
        )


class Reader(dcp.FileSystemReader):
    """PyTorch's, but nothing in the folder can run code: its index is a pickle, of which it loads anything."""

    def load(self, state: dict[str, Any]) -> None:
        """Fill the tensors in `state`, or this rank's shares of them."""
        with warnings.catch_warnings():  # that this process reads by itself
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=self, no_dist=True)

    def files(self) -> set[str]:
        """The names of all files that hold tensors."""
        return {about.relative_path for about in self.read_metadata().storage_data.values()}

    def tensors(self) -> dict[str, Any]:
        """The sizes and properties of all tensors, by name."""
        return self.read_metadata().state_dict_metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        for opcode, argument, _ in pickletools.genops(content):  # a memo is as long as the largest number in it
            if "PUT" in opcode.name and (argument or 0) > len(content):
                raise pickle.UnpicklingError(f"{opcode.name} in it")
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        held = metadata.state_dict_metadata.values()
        if not all(isinstance(about, TensorStorageMetadata) for about in held):
            raise pickle.UnpicklingError("it holds more than tensors")
        if any(Path(str(about.relative_path)).name != about.relative_path for about in metadata.storage_data.values()):
            raise pickle.UnpicklingError("it names files of other folders")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        path = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if dtype or path or name in _ADMITTED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_ADMITTED = {  # module → what an index of PyTorch's is made of
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
}
