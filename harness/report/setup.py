"""What was run, in words made from the cells' configs, and by what."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from harness.checkpoint import without_weights
from harness.experiments.grid import Cell, Experiment
from harness.report.document import Block, Code, Column, Facts, Listing, Table, Text
from harness.report.document import Cell as TableCell

_NOT_CHANGED = ("run", "tracking")  # sections that make no other run


def setup(experiment: Experiment) -> list[Block]:
    blocks: list[Block] = [Text(_in_words(experiment))]
    if experiment.machine:
        blocks.append(Text(f"Sized for {experiment.machine}.", aside=True))
    rows = [
        [TableCell(variant), TableCell("; ".join(_changes(experiment, variant)) or "nothing")]
        for variant in experiment.variants
    ]
    first = f"the baseline: {Path(experiment.cells[0].arguments[0]).name}"
    rows[0][1] = TableCell(", ".join([first, *common(experiment)]))
    columns = [Column("variant", numeric=False), Column("what it changes over the baseline", numeric=False)]
    blocks.append(Table("The variants", columns, rows, variants=True))
    if experiment.measurements:
        blocks += [Text("Measured on each run’s last checkpoint:"), Listing(_diagnostics(experiment))]
    else:
        blocks.append(Text("No diagnostic is run on the checkpoints."))
    return blocks


def _in_words(experiment: Experiment) -> str:
    cell = next(cell for cell in experiment.cells if cell.variant == experiment.baseline)
    m, t = cell.config.model, cell.config.training
    size = parameters(cell)
    shape = f"{_count(m.n_layer, 'layer')} of {_count(m.n_head, 'head')}, {m.n_embd} wide"
    tokens = t.max_steps * t.batch_size * m.block_size
    start = "" if t.init_from == "scratch" else f" from {_shown(experiment, t.init_from)}"
    seeds = ", ".join(map(str, experiment.seeds))
    return (
        f"{_count(len(experiment.variants), 'variant')} × {_count(len(experiment.seeds), 'seed')} ({seeds}), "
        f"{_count(len(experiment.cells), 'run')}. The baseline, {experiment.baseline}, is a GPT of {shape}, at a "
        f"context of {m.block_size} tokens"
        + (f" ({size:,} parameters)" if size else "")
        + f", trained{start} on {cell.config.data.corpus} for {t.max_steps:,} steps of {t.batch_size} windows, "
        f"{tokens:,} tokens in all, by {cell.config.optimizer.name} with a peak learning rate of "
        f"{cell.config.optimizer.lr:g}, in {_dtype(t.dtype)}."
    )


def _dtype(dtype: str) -> str:
    return "the fastest precision of the device" if dtype == "auto" else dtype


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def parameters(cell: Cell) -> int | None:
    """Of the cell's model; None where its vocabulary is not known, since it has not been trained."""
    try:
        vocab_size = yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8"))["model"]["vocab_size"]
        return sum(p.numel() for p in without_weights(cell.config.model.gpt_config(vocab_size)).parameters())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _changes(experiment: Experiment, variant: str) -> list[str]:
    """ "model.normalizer softmax → softmax1", a key a line."""
    base, own = (
        next(cell for cell in experiment.cells if cell.variant == v).config.to_dict()
        for v in (experiment.baseline, variant)
    )
    return [
        f"{section}.{key} {_shown(experiment, base[section][key])} → {_shown(experiment, value)}"
        for section, entries in own.items()
        for key, value in entries.items()
        if section not in _NOT_CHANGED and value != base[section][key]
    ]


def common(experiment: Experiment) -> list[str]:
    """ "training.dtype float32": the keys that the experiment sets for all variants."""
    given = [dict(_pairs(cell.arguments)) for cell in experiment.cells]
    return [
        f"{key} {value}"
        for key, value in given[0].items()
        if not key.startswith(("run.", "tracking.", "training.keep_interval"))
        and all(other.get(key) == value for other in given)
    ]


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    return [(key.removeprefix("--"), value) for key, value in zip(arguments[1::2], arguments[2::2], strict=True)]


def _shown(experiment: Experiment, value: Any) -> str:
    """A value as YAML has it; another cell's checkpoint as the experiment's file has it, @VARIANT."""
    path = Path(str(value))
    if path.parent.parent == experiment.folder and path.name == "ckpt.pt":
        return "@" + path.parent.name.rpartition("_s")[0]
    return value if isinstance(value, str) else json.dumps(value)


def _diagnostics(experiment: Experiment) -> list[str]:
    found = []
    every = experiment.cells[0].config.training.keep_interval
    for m in experiment.measurements:
        parts = [" ".join([m.name, *m.options])]
        parts += [f"against {m.reference}’s checkpoint of the same seed"] if m.reference else []
        parts += [f"of {', '.join(m.variants)} alone"] if m.variants else []
        parts += [f"along training too, every {every} steps"] if m.along else []
        found.append(", ".join(parts))
    return found


def provenance(experiment: Experiment, facts: dict) -> list[Block]:
    """Commands, versions, commit, date, machine."""
    rows = _versions(facts)
    for i, earlier in enumerate(facts.get("earlier") or []):
        before = dict(_versions(earlier))
        differs = [f"{name} {value}" for name, value in before.items() if dict(rows).get(name) != value]
        rows.append((f"an earlier run ({i + 1})", "; ".join(differs) or "the same"))
    commands = []
    for cell in experiment.cells:
        commands.append(f"# {cell.name}")
        commands.append(shlex.join(["python", "train.py", *cell.arguments]))
        commands += [shlex.join(["python", *words]) for m in experiment.measurements for words, _ in m.commands(cell)]
    return [
        Text("The whole experiment, from the repository’s root:"),
        Code("", f"{facts.get('command')}\npython scripts/report.py {shlex.quote(str(experiment.folder))}"),
        Facts(rows),
        Code(f"The commands of its {_count(len(experiment.cells), 'run')}", "\n".join(commands)),
        Code(f"{experiment.path.name}", experiment.path.read_text(encoding="utf-8").rstrip("\n")),
    ]


def _versions(facts: dict) -> list[tuple[str, str]]:
    machine = facts.get("machine") or {}
    there = [
        ("date", facts.get("date")),
        ("commit", facts.get("commit")),
        ("processor", machine.get("processor")),
        ("GPUs", machine.get("gpus")),
        ("cores", machine.get("cores")),
        ("runs at a time", machine.get("jobs")),
        ("Python", machine.get("python")),
        ("PyTorch", machine.get("torch")),
        ("platform", machine.get("platform")),
    ]
    return [(name, str(value)) for name, value in there if value]
