"""What is there of an experiment's cells: whether they are trained, by which config, and what has been measured."""

import shlex
from pathlib import Path

from harness.checkpoint import read_checkpoint
from harness.errors import UserError
from harness.experiments.grid import Cell, Experiment
from harness.text_files import read_json, read_yaml

ANEW = "remove that folder to train it anew, or give the variant another name"
# Keys that say where a run writes and who looks on: they make no other run of it.
_FREE = ("run.name", "run.out_dir", "training.resume", "training.overwrite", "training.device", "training.compile")


def trained(cell: Cell) -> bool:
    """Whether the cell is trained to its end. UserError where its folder holds a run of another config, with the keys,
    one that started from a checkpoint that has changed since, or a checkpoint that cannot be read."""
    if changed := changed_keys(cell):
        raise UserError(f"{cell.folder} holds a run of another config: {', '.join(changed)}; {ANEW}")
    if not cell.checkpoint.exists():
        return False
    for needed in (cell.of_same_seed(variant) / "ckpt.pt" for variant in cell.needs):
        if needed.exists() and needed.stat().st_mtime_ns > cell.checkpoint.stat().st_mtime_ns:
            raise UserError(f"{cell.folder} was trained before {needed}, which it starts from, was written; {ANEW}")
    return read_checkpoint(cell.checkpoint).get("step") == cell.config.training.max_steps


def changed_keys(cell: Cell) -> list[str]:
    """The keys in which the config.yaml of the run in the cell's folder differs from the cell's config: "key then →
    now". What a run finds out by itself, as its vocabulary, is no difference."""
    path = cell.folder / "config.yaml"
    try:
        then = read_yaml(path, "config")
    except UserError as error:
        if not path.exists():
            return []
        raise UserError(f"{path} cannot be read: {error}; {ANEW}") from error
    if not isinstance(then, dict) or not all(isinstance(entries, dict) for entries in then.values()):
        raise UserError(f"{path} is no config of a run; {ANEW}")
    changed = []
    follows = cell.config.training.init_from != "scratch" or cell.config.training.feedback != "backprop"
    for section, entries in cell.config.to_dict().items():
        for name, now in entries.items():
            key, before = f"{section}.{name}", then.get(section, {}).get(name)
            if section == "tracking" or key in _FREE or before == now:
                continue
            if section == "model" and (now is None or (follows and key not in cell.config.sources)):
                continue
            changed.append(f"{key} {before} → {now}")
    return changed


def to_measure(experiment: Experiment, cell: Cell) -> list[tuple[list[str], Path]]:
    """The diagnostics that have not been run on the cell's checkpoints as they are now, or with other options."""
    record = recorded(experiment)
    found = [command for measurement in experiment.measurements for command in measurement.commands(cell)]
    return [(words, path) for words, path in found if not path.exists() or record.get(str(path)) != as_run(words)]


def as_run(words: list[str]) -> dict:
    """What tells the result of a diagnostic from that of another command or of other checkpoints."""
    checkpoints = [Path(word) for word in words[1 : words.index("--out")]]
    changed = [checkpoint.stat().st_mtime_ns for checkpoint in checkpoints if checkpoint.exists()]
    return {"command": shlex.join(words), "checkpoints": changed}


def other_options(experiment: Experiment, words: list[str], path: Path) -> bool:
    """Whether the result at `path` is known to be of other options than those of this command line."""
    command = recorded(experiment).get(str(path), {}).get("command")
    before = shlex.split(command) if command else words
    return before[before.index("--out") + 2 :] != words[words.index("--out") + 2 :]


def recorded(experiment: Experiment) -> dict[str, dict]:
    """The result files of diagnostics → `as_run` of the commands that wrote them."""
    try:
        record = read_json(experiment.folder / "measured.json")
    except (OSError, ValueError):  # then everything is measured again, and nothing is lost
        return {}
    return record if isinstance(record, dict) and all(isinstance(entry, dict) for entry in record.values()) else {}
