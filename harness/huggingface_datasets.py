"""Text out of Hugging Face datasets, on the Hub or in local files: what data/hf and data/openwebtext prepare."""

import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # unpacked by datasets itself
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load(name: str, split: str, *, config=None, revision=None, streaming=False, num_proc=None):
    """One split of the dataset `name`: on the Hub, a folder, a file (json, jsonl, csv, parquet, txt, perhaps
    compressed) or what `save_to_disk` wrote. `num_proc` processes download and convert it, unless it streams. UserError
    if that fails."""
    import datasets  # here: it takes a second

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path, options = Path(name), {}
    try:
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        if (path / "state.json").exists():
            return datasets.load_from_disk(name)
        if path.is_file():
            kind = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED][-1:]
            name, options["data_files"] = _BUILDERS.get("".join(kind), "text"), str(path)
        if not streaming:
            options["num_proc"] = num_proc
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming, **options)
    except Exception as error:  # wrong name, config or split, no network, …: each with a class of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"cannot load the split {split!r} of {path} ({reason}): check name, config and network"
        ) from error


class Texts:
    """The strings of one column, those that are missing or empty left out. A stream's `state` is where it stands, as
    JSON, and `go_on(state)`, before the first string, lets it begin there. UserError if there is no such column."""

    def __init__(self, dataset, column: str):
        known = dataset.column_names  # None where a stream does not know before its first row
        if known is not None and column not in known:
            found = ", ".join(known)
            raise UserError(f"the dataset has no column {column!r} but {found}: choose one with --text-column")
        self._dataset, self._column = dataset.select_columns(column), column
        self._batch, self._rows = None, 0  # what `datasets` says of where a batch begins, and the rows taken of it

    def state(self) -> dict:
        return {"batch": self._batch, "rows": self._rows}

    def go_on(self, state: dict) -> None:
        self._batch, self._rows = state["batch"], state["rows"]
        if self._batch:
            self._dataset.load_state_dict(self._batch)

    def __iter__(self) -> Iterator[str]:
        try:
            for batch in self._dataset.iter(batch_size=1000):
                for text in batch[self._column][self._rows :]:
                    self._rows += 1
                    if text is not None and not isinstance(text, str):
                        found = f"column {self._column!r} holds {type(text).__name__}"
                        raise UserError(f"{found}: choose one with --text-column")
                    if text:
                        yield text
                if hasattr(self._dataset, "state_dict"):
                    self._batch, self._rows = self._dataset.state_dict(), 0
                else:
                    self._rows = 0
        except UnicodeDecodeError as error:
            raise UserError(f"the dataset holds text that is not UTF-8 ({error.reason}): convert it first") from error
        except OSError as error:  # a connection lost for good: datasets itself has tried again by now
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"reading the dataset failed ({reason}): run it again") from error


def texts(dataset, column: str) -> Iterator[str]:
    return iter(Texts(dataset, column))
