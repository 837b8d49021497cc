"""Checkpoints of a model that is sharded over ranks, written in the background by torch.distributed.checkpoint.

Every rank writes its share of the weights and of the optimizer's state to out/<run>/shards/<step>/. When all of it is
on the disk, rank 0 reads the weights back and puts them, whole, into an ordinary ckpt.pt, which every diagnostic reads.
Its `optimizer` has no state; that is in `shards`: {"folder", "crc32": {file: CRC-32}}. The rename of ckpt.pt makes
the new checkpoint the current one; only then is the former folder removed. So a run can be killed at any moment, and go
on on another number of ranks, sharded or not.
"""

import pickle
import re
import shutil
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
        except dcp.api.CheckpointException as error:  # what other ranks met too, each with its traceback
            failure = str(next(iter(error.failures.values()))[0])
        except Exception as error:
            failure = str(error) or type(error).__name__
        found = self._gather((sums, failure))
        failure = next((failed for _, failed in found if failed), "")
        if self._ranks.is_main and not failure:
            try:
                crc32_of = {name: crc for own, _ in found for name, crc in own.items()}
                self._make_whole(shards, crc32_of, content, of_optimizer, paths)
            except Exception as error:
                failure = str(error) or type(error).__name__
        failure = next(filter(None, self._gather(failure)), "")
        if failure:
            failure = " ".join(failure.split())
            known = failure.startswith("cannot write")  # it says the rest itself
            self._failure = failure if known else f"cannot write {shards}: {failure}; the former checkpoint is intact"

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
        for former in shards.parent.iterdir():
            if former != shards and former.name.isdecimal():
                shutil.rmtree(former, ignore_errors=True)

    def wait(self) -> None:
        """Return once the last checkpoint is complete. UserError, on every rank, if it could not be written."""
        if self._ranks.background:
            self._ranks.background.join()
            self._ranks.background = None
        failure, self._failure = self._failure, ""
        if failure:
            raise UserError(failure)


def crc32(path: Path) -> int:
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
    named = checkpoint["shards"] if isinstance(checkpoint["shards"], dict) else {}
    folder, crc32_of = named.get("folder"), named.get("crc32")
    if not isinstance(folder, str) or not re.fullmatch(rf"{FOLDER}/\d+", folder) or not isinstance(crc32_of, dict):
        raise UserError(f"{path} has a shards that no run has written")
    check_files(shards := path.parent / folder, crc32_of, path, ranks)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[str, dict[str, Tensor]] = {}
    try:
        reader, size = Reader(shards), sum((shards / name).stat().st_size for name in crc32_of)
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
            state.setdefault(number, {})[".".join(name)] = made.detach()
        reader.load({"optimizer": state})
    except (Exception, dcp.api.CheckpointException) as error:  # the unpickler and the reader raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shards} does not hold the optimizer's state of {path}: {reason}") from error
    return {int(number): values for number, values in state.items()}


def check_files(shards: Path, crc32_of: dict[str, int], path: Path, ranks: Ranks) -> None:
    """UserError, on every rank, unless each of the files has its CRC-32."""
    found = None
    for name in sorted(crc32_of, key=str)[ranks.rank :: ranks.size]:
        try:
            if Path(str(name)).name != name or crc32(shards / name) != crc32_of[name]:
                found = found or f"{shards / name} is damaged"
        except OSError as error:
            found = found or f"cannot read {shards / name} ({error.strerror})"
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

    def tensors(self) -> dict[str, Any]:
        """The sizes and properties of all tensors, by name."""
        return self.read_metadata().state_dict_metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        held = metadata.state_dict_metadata.values()
        if not all(isinstance(about, TensorStorageMetadata) for about in held):
            raise pickle.UnpicklingError("it holds more than tensors")
        if any(Path(about.relative_path).name != about.relative_path for about in metadata.storage_data.values()):
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
