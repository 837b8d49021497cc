"""An experiment as its file in experiments/ tells it: a base config × named variants × seeds, every cell of which is an
ordinary run, and the diagnostics that are run on each.

    question: Which mechanism keeps a head from sinking where it has nothing to do?
    base: ../configs/backcopy_softmax.yaml         # relative to this file
    seeds: [1, 2, 3]
    config: {training: {dtype: float32}}           # sections over those of the base, for all variants
    variants:                                      # name → sections over those; the first is the baseline
      softmax:
      softmax1: {model: {normalizer: softmax1}}
      tuned: {training: {init_from: "@softmax"}}   # the checkpoint of that variant's cell of the same seed
    diagnostics:                                   # script → its options; their _ stand for -
      every: 250                                   # also on the checkpoints of every so many steps, where given
      activation_kurtosis: {batches: 16, batch_size: 32}
      compare_kl: {reference: "@softmax", variants: [tuned]}     # of some variants alone
      quantization: {along: false}                 # at the end of training alone
"""

import json
import keyword
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.comparison import find_diagnostic
from harness.config import Config
from harness.config_files import load_config
from harness.diagnostics import Diagnostic, argument_parser, arguments_for
from harness.errors import UserError
from harness.text_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
_KEYS = {"question", "base", "seeds", "variants", "config", "diagnostics", "prepare", "machine"}
_REQUIRED = ("question", "base", "seeds", "variants")
_OWN = (
    "run.name",
    "run.out_dir",
    "run.seed",
    "training.keep_interval",
    "training.resume",
    "training.overwrite",
    "evaluation.only",
)
"""keys of a config that are the experiment's to set, or that would undo a cell"""
_REFERENCES = ("training.init_from", "kl.reference")  # the keys of a config that may name another cell


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    variant: str
    seed: int
    arguments: list[str]
    """`python train.py *arguments` in the repository's root makes it"""
    config: Config
    needs: tuple[str, ...]
    """the variants whose cells of this seed have to be trained before"""

    @property
    def name(self) -> str:
        return f"{self.variant}_s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ckpt.pt"

    def of_same_seed(self, variant: str) -> Path:
        """The folder of that variant's cell."""
        return self.folder.parent / f"{variant}_s{self.seed}"


@dataclass(frozen=True)
class Measurement:
    """A diagnostic as the experiment wants it run."""

    diagnostic: Diagnostic
    options: list[str]
    reference: str | None = None
    """the variant whose cell of the same seed is what a cell is compared with"""
    along: bool = False
    """whether it is run on the checkpoints along training too"""
    variants: tuple[str, ...] = ()
    """of whose cells it is; empty: of all"""

    @property
    def name(self) -> str:
        return self.diagnostic.name

    def commands(self, cell: Cell) -> Iterator[tuple[list[str], Path]]:
        """The command lines that measure a trained cell, without the interpreter, and the JSON file that each writes:
        one for the last checkpoint, and one for those along training, if there are any."""
        if (self.variants and cell.variant not in self.variants) or cell.variant == self.reference:
            return
        first = [str(cell.of_same_seed(self.reference) / "ckpt.pt")] if self.reference else []
        folder = cell.folder / "diagnostics"
        kept = kept_checkpoints(cell.folder) if self.along else []
        steps = [path for path in kept if int(path.stem) < cell.config.training.max_steps]  # the end is ckpt.pt
        for checkpoints, out in (([cell.checkpoint], folder), (steps, folder / "along")):
            if checkpoints:
                found = [f"scripts/{self.name}.py", *first, *map(str, checkpoints), "--out", str(out), *self.options]
                yield found, out / f"{self.name}.json"


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints along a run's training, in their order; see training.keep_interval."""
    kept = [path for path in (folder / "steps").glob("*.pt") if path.stem.isascii() and path.stem.isdecimal()]
    return sorted(kept, key=lambda path: int(path.stem))


@dataclass(frozen=True)
class Experiment:
    path: Path
    question: str
    seeds: list[int]
    variants: list[str]
    """the first is the baseline"""
    cells: list[Cell]
    """in an order in which every one comes after those that it needs"""
    measurements: list[Measurement]
    folder: Path
    """out/NAME, which holds the cells' folders"""
    machine: str | None = None
    """what it is sized for, in words"""
    prepare: list[str] = field(default_factory=list)
    """the command line, without the interpreter, that makes its corpus; empty: the corpus's own prepare.py"""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def baseline(self) -> str:
        return self.variants[0]


def load_experiment(path: Path, out: Path = Path("out")) -> Experiment:
    """The experiment in a file, with its cells under out/NAME; of a claim's file, the experiment that decides it.
    UserError for every mistake in it, naming file and key."""
    content = read_yaml(path, "experiment")
    if isinstance(content, dict) and isinstance(named := content.get("experiment"), str):  # a claim's file
        if not (path.parent / named).is_file():
            raise UserError(f"{path}: experiment: there is no {path.parent / named}")
        return load_experiment(path.parent / named, out)
    if not isinstance(content, dict) or not _KEYS.issuperset(content):
        unknown = f", not {next(k for k in content if k not in _KEYS)!r}" if isinstance(content, dict) else ""
        raise UserError(f"{path}: an experiment has the keys {', '.join(sorted(_KEYS))}{unknown}")
    if lacking := [key for key in _REQUIRED if not content.get(key)]:
        raise UserError(f"{path}: it lacks {', '.join(lacking)}")
    seeds, variants = content["seeds"], content["variants"]
    for key in ("question", "base", "machine"):
        if not isinstance(content.get(key, ""), str) or "\0" in content.get(key, ""):
            raise UserError(f"{path}: {key}: a text is expected, not {content[key]!r}")
    if not isinstance(seeds, list) or not all(type(s) is int for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: {seeds!r} is no list of different integers, like [1, 2, 3]")
    if not isinstance(variants, dict):
        raise UserError(f"{path}: variants: a mapping of names to sections of a config, not {variants!r}")
    for name in variants:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or keyword.iskeyword(name):
            raise UserError(f"{path}: variants: {name!r}: a name is letters, digits and _, and begins with a letter")
        if len([other for other in variants if str(other).lower() == name.lower()]) > 1:
            raise UserError(f"{path}: variants: {name!r} and another one differ in their case alone")
    folder = out / path.stem
    measurements, every = _measurements(path, content.get("diagnostics") or {}, list(variants))
    cells = [
        _cell(path, content, folder, every, variant, changes, seed, list(variants))
        for variant, changes in variants.items()
        for seed in seeds
    ]
    return Experiment(
        path,
        content["question"],
        seeds,
        list(variants),
        _in_order(path, cells),
        measurements,
        folder,
        content.get("machine"),
        _prepare(path, content.get("prepare")),
    )


def _cell(path: Path, content: dict, folder: Path, every, variant: str, changes, seed: int, variants) -> Cell:
    base = path.parent / os.path.expanduser(content["base"])
    if not base.is_file():
        raise UserError(f"{path}: base: there is no {base}")
    arguments = [os.path.relpath(base, ROOT) if base.resolve().is_relative_to(ROOT) else str(base)]
    given: dict[str, Any] = {}
    for where, sections in (("config", content.get("config")), (f"variants: {variant}", changes)):
        for section, entries in _mapping(path, where, sections).items():
            for key, value in _mapping(path, f"{where}: {section}", entries).items():
                if f"{section}.{key}" in _OWN:
                    raise UserError(f"{path}: {where}: {section}.{key} is no choice of an experiment's: leave it out")
                if not isinstance(value, str | int | float | None):
                    raise UserError(f"{path}: {where}: {section}.{key}: {value!r} is no value of a config")
                given[f"{section}.{key}"] = value
    needs = []
    for key in _REFERENCES:
        if str(given.get(key)).startswith("@"):
            needs.append(_variant(path, f"variants: {variant}: {key}", given[key], variants))
            given[key] = folder / f"{needs[-1]}_s{seed}" / "ckpt.pt"
    if every:
        given["training.keep_interval"] = every
    given |= {"run.out_dir": folder, "run.name": f"{variant}_s{seed}", "run.seed": seed}
    for key, value in given.items():
        text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        arguments += [f"--{key}={text}"] if text.startswith("--") else [f"--{key}", text]
    config = load_config([str(base), *arguments[1:]], f"{path}, variant {variant}")
    return Cell(variant, seed, arguments, config, tuple(needs))


def _mapping(path: Path, where: str, value: Any) -> dict:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {where}: a mapping is expected, not {value!r}")
    return value or {}


def _variant(path: Path, where: str, reference: Any, variants: list[str]) -> str:
    """The variant that "@NAME" names."""
    name = str(reference).removeprefix("@")
    if not str(reference).startswith("@") or name not in variants:
        raise UserError(f"{path}: {where}: {reference!r} is no @VARIANT; the variants are {', '.join(variants)}")
    return name


def _measurements(path: Path, content: Any, variants: list[str]) -> tuple[list[Measurement], int | None]:
    """The diagnostics, and the interval of the checkpoints along training."""
    asked = dict(_mapping(path, "diagnostics", content))
    every = asked.pop("every", None)
    if every is not None and (type(every) is not int or every < 1):
        raise UserError(f"{path}: diagnostics: every: {every!r} is no positive number of steps")
    found = []
    for name, given in asked.items():
        where, options = f"{path}: diagnostics: {name}", dict(_mapping(path, f"diagnostics: {name}", given))
        try:
            diagnostic = find_diagnostic(name)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        reference, along = options.pop("reference", None), options.pop("along", True)
        chosen = options.pop("variants", [])
        if not isinstance(chosen, list) or (unknown := [v for v in chosen if v not in variants]):
            wrong = unknown[0] if isinstance(chosen, list) else repr(chosen)
            raise UserError(f"{where}: variants: there is no {wrong}; there are {', '.join(variants)}")
        if diagnostic.takes_reference != (reference is not None):
            raise UserError(f"{where}: it " + ("takes no reference" if reference else "needs a reference: @VARIANT"))
        if reference is not None:
            reference = _variant(path, f"diagnostics: {name}: reference", reference, variants)
        words = list(_words(where, options))
        _check_options(where, diagnostic, words)
        found.append(Measurement(diagnostic, words, reference, bool(every and along), tuple(chosen)))
    return found, every


def _words(where: str, options: dict[str, Any]) -> Iterator[str]:
    """The options as words of a command line: a list is several words, true is the bare option."""
    for key, value in options.items():
        if not isinstance(key, str) or key in ("out", "help", "h", "wandb"):
            raise UserError(f"{where}: {key!r} is no option to give here")
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def _check_options(where: str, diagnostic: Diagnostic, words: list[str]) -> None:
    """UserError where the script would not take these options."""
    parser = argument_parser(diagnostic.name, "", diagnostic.batches, diagnostic.batch_size)
    diagnostic.add_arguments(parser)

    def refuse(message: str):
        raise UserError(f"{where}: {message}")

    # argparse's own error prints the usage and ends the process. The parser is made elsewhere, so that no subclass can
    # bring another one.
    parser.error = refuse  # type: ignore[method-assign, assignment]
    checkpoints = ["reference.pt", "ckpt.pt"] if diagnostic.takes_reference else ["ckpt.pt"]
    arguments = parser.parse_args([*checkpoints, *words])
    try:
        arguments_for(diagnostic, arguments)
    except UserError as error:
        refuse(str(error))


def _in_order(path: Path, cells: list[Cell]) -> list[Cell]:
    """Each cell after those that it needs; all seeds of the first variants first otherwise."""
    ordered: list[Cell] = []
    waiting = list(cells)
    while waiting:
        there = {cell.name for cell in ordered}
        ready = [cell for cell in waiting if all(f"{need}_s{cell.seed}" in there for need in cell.needs)]
        if not ready:
            raise UserError(f"{path}: variants: {waiting[0].variant} needs itself, by way of {waiting[0].needs[0]}")
        ordered += ready
        waiting = [cell for cell in waiting if cell not in ready]
    return ordered


def _prepare(path: Path, words: Any) -> list[str]:
    if words is None:
        return []
    if not isinstance(words, list) or not words or not re.fullmatch(r"data/\w+/prepare\.py", str(words[0])):
        raise UserError(f"{path}: prepare: a list that begins with data/CORPUS/prepare.py is expected, not {words!r}")
    return list(map(str, words))
