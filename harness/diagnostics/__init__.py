"""The diagnostics' frame: checkpoints and batches in; a table, a JSON file and a picture out.

A diagnostic is one `Diagnostic`: what it measures on a `Subject` (a checkpoint with its data), how it draws the
`Result`, and what its columns mean. Each has a module here, named like its script in scripts/, and `run` is the
script's command line. The maths is in measure/.
"""

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from harness.batches import KINDS, Windows, begin_with
from harness.checkpoint import load_model
from harness.corpus import SPLITS, Corpus
from harness.device import choose_device, float64_on
from harness.errors import UserError
from harness.figures import print_table, save_figure, share_scales
from harness.files import check_folder, make_folder, write_text
from harness.resuming import crop_block_size
from harness.text_files import read_json
from harness.tokenizer import from_meta, id_or_text
from harness.tracking import log_diagnostic, wandb_run

LABELS = ("name", "parameter", "scheme", "divergence", "layer", "head", "position")
"""Columns that tell a row from the others: a note names a row by them."""


@dataclass
class Result:
    """What a diagnostic found on one checkpoint. None stands for what does not exist (a kurtosis of equal numbers)."""

    rows: list[dict]
    summary: Mapping[str, float | None]
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict]] = field(default_factory=dict)  # further rows, under their own names


@dataclass(frozen=True)
class Diagnostic:
    name: str
    about: str
    """what it answers: the module's docstring, and what --help begins with"""
    columns: dict[str, str]
    """column of the rows → what it means; the table prints them in this order, and `--help` explains them"""
    measure: Callable[["Subject"], Result]
    draw: Callable[[Result, str], Figure]
    """draw(result, title)"""
    reading: str = ""
    """how to read the table, printed under it"""
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    """the columns of further tables, by name"""
    shown: Callable[[dict], bool] = lambda row: True
    """which rows are printed, where they are too many to read; the JSON has all"""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    check_arguments: Callable[[argparse.Namespace], None] = lambda args: None
    """raises UserError before anything is loaded, and changes nothing"""
    takes_reference: bool = False
    """whether the first checkpoint is what the others are compared with: `args.reference`, and not among them"""
    headlines: Mapping[str, str] = field(default_factory=dict)
    """the values of the summary that compare_checkpoints draws → their unit, and which way is better, if one is;
    without any, the first few"""
    batches: int | None = 8
    """default of --batches; None is the whole split"""
    batch_size: int = 4
    """default of --batch-size"""

    def result(self, subject: "Subject") -> Result:
        """What it measures, with what is to be said about the corpus among the notes."""
        result = self.measure(subject)
        result.notes += subject.corpus_notes
        return result


class Subject:
    """A checkpoint under measurement: `model` in eval mode on `device`, `info` beside it, and its data."""

    def __init__(self, path: str, args: argparse.Namespace):
        self.path, self.args, self.device = path, args, choose_device(args.device)
        self.model, self.info = load_model(path, self.device)
        config = self.model.config
        if args.block_size and args.block_size > config.block_size:
            raise UserError(f"--block-size {args.block_size}: the context of {path} is {config.block_size}")
        self.bos: int | None = self._begin_of_text() if isinstance(args.bos, str) else args.bos
        if (self.bos or 0) >= config.vocab_size:
            raise UserError(f"--bos {args.bos}: {path} has {config.vocab_size} token ids, from 0")
        crop_block_size(self.model, args.block_size or config.block_size)
        if getattr(args, "dtype", None) == "float64":
            self.model.to(float64_on(self.device))

    def _begin_of_text(self) -> int:
        """The id of --bos, a text, by the checkpoint's own tokenizer, or the corpus's where it does not say one."""
        own = self.info.get("corpus", {})
        tokenizer = from_meta(own) if own.get("tokenizer") and "problem" not in own else self.corpus.tokenizer
        return tokenizer.token_of(self.args.bos)

    @property
    def step(self) -> int | None:
        return self.info.get("step", self.info.get("iter_num"))

    @property
    def arguments(self) -> dict:
        """What the result depends on besides the checkpoint: arguments, with the corpus and device that were chosen."""
        chosen = {"bos": self.bos, "data": self.corpus_folder, "device": str(self.device)}
        given = vars(self.args) | chosen | {"windows": None if self.kind == "stream" else self.kind}
        left_out = {"checkpoints", "out", "wandb"} | {k for k in ("block_size", "bos", "windows") if given[k] is None}
        return {k: v for k, v in given.items() if k not in left_out}

    @property
    def corpus_folder(self) -> str | None:
        """The one in --data, or that of the checkpoint's own corpus; None where the checkpoint does not say which."""
        return self.args.data or self.info.get("corpus", {}).get("folder")

    @property
    def kind(self) -> str:
        """Of windows: the one in --windows, or that of the checkpoint's training."""
        data = self.info.get("config", {}).get("data", {})
        return getattr(self.args, "windows", None) or data.get("windows", "stream")

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus in `corpus_folder`. UserError if it is missing or does not fit the model."""
        folder = self.corpus_folder
        if folder is None:
            raise UserError(f"{self.path} does not say which corpus it was trained on: name one with --data DIR")
        if not self.args.data and not Path(folder).is_dir():
            raise UserError(f"{folder}, the corpus that {self.path} was trained on, is not here: name one with --data")
        vocab_size = self.model.config.vocab_size
        corpus = Corpus(folder, [self.args.split], vocab_size, lazily=True)
        corpus.check_fits(self.path, self.info, vocab_size)
        return corpus

    @property
    def corpus_notes(self) -> list[str]:
        """What was assumed about the corpus, and if it has been prepared anew since the training; nothing of a corpus
        that was not opened."""
        if "corpus" not in vars(self):
            return []
        notes, trained_on = [self.corpus.note] if self.corpus.note else [], self.info.get("corpus", {}).get("sha256")
        if not self.args.data and trained_on not in (None, self.corpus.sha256):
            notes.append(f"{self.corpus.folder} holds other text now than {self.path} was trained on")
        return notes

    def windows(self, split: str | None = None) -> Windows:
        """The windows of block_size of a split (default: --split), of the kind that --windows says."""
        (corpus := self.corpus).verify(split := split or self.args.split)
        if self.kind == "documents" and self.bos is not None and self.bos == corpus.meta.get("begin_of_text"):
            raise UserError(f"--bos {self.bos}: the documents in {corpus.folder} begin with it already: leave it out")
        return Windows(corpus, split, self.model.config.block_size, self.kind)

    def offsets(self, split: str | None = None, count: int | None = None):
        """Where windows that text fills start: all, or `count` of them, spread evenly."""
        return self.windows(split).whole(count)

    def batches(self, offsets=None, split: str | None = None, what: str = "batches") -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y), (B, T) int64 each, under a progress bar: --batches of --batch-size windows, spread evenly over the
        split, or the windows at `offsets`; with --bos in front of each."""
        args, windows = self.args, self.windows(split)
        if offsets is None:
            offsets = self.offsets(split, args.batches and args.batches * args.batch_size)
        starts = range(0, len(offsets), args.batch_size)
        for start in tqdm(starts, desc=what, leave=False, disable=None):
            x, y = windows.gather(offsets[start : start + args.batch_size], self.device)
            yield (x, y) if self.bos is None else begin_with(self.bos, x, y)


def run(diagnostic: Diagnostic, argv: list[str] | None = None) -> None:
    """The script's command line: measure and print one checkpoint after the other, then write the JSON and pictures."""
    parser = argument_parser(diagnostic.name, diagnostic.about, diagnostic.batches, diagnostic.batch_size)
    parser.epilog = help_of_columns(diagnostic)
    diagnostic.add_arguments(parser)
    args = arguments_for(diagnostic, parser.parse_args(argv))
    folder = check_files(diagnostic.name, args)
    results, entries = {}, []
    for path, label in zip(args.checkpoints, labels(args.checkpoints), strict=True):
        subject = Subject(path, args)  # one model in memory at a time
        results[label] = diagnostic.result(subject)
        entries.append(entry(diagnostic.name, subject, results[label]))
        print(f"{label}, step {subject.step}" if subject.step is not None else label)
        print_result(diagnostic, results[label])
    written = [write_json(folder / f"{diagnostic.name}.json", entries)]
    figures = [diagnostic.draw(result, label) for label, result in results.items()]
    share_scales(figures)
    for path, result, figure, picture in zip(
        args.checkpoints, results.values(), figures, pictures(written[0], args.checkpoints), strict=True
    ):
        written.append(save_figure(figure, picture))
        if args.wandb:
            log_diagnostic(Path(path).parent, name_in_run(diagnostic.name, path), result.summary, picture)
    print("\nwritten: " + ", ".join(map(str, written)))


def argument_parser(
    name: str, about: str, batches: int | None, batch_size: int | None, otherwise: str = "the whole split"
) -> argparse.ArgumentParser:
    """The arguments that every diagnostic takes; `otherwise` is what --help says of a default that is None."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/{name}.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="ckpt.pt, or hf:NAME_OR_FOLDER")
    parser.add_argument("--data", metavar="DIR", help="the corpus; default: the one the checkpoint was trained on")
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: val")
    for option, letter, default in (("--batches", "N", batches), ("--batch-size", "B", batch_size)):
        parser.add_argument(option, type=int, default=default, metavar=letter, help=f"default: {default or otherwise}")
    parser.add_argument("--block-size", type=int, metavar="T", help="tokens a window; default: the model's, the most")
    kinds = "from where a document starts, or from anywhere in the text; default: as the checkpoint was trained"
    parser.add_argument("--windows", choices=KINDS, help=kinds)
    bos = "a begin-of-text token, its id or its text, in front of each window, one token of which goes; default: none"
    parser.add_argument("--bos", type=id_or_text, metavar="TOKEN|none", help=bos)
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=1337, metavar="S", help="of what is drawn at random; default: 1337")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: diagnostics/ beside a ckpt.pt, diagnostics/best/ beside a best.pt; of several, out/NAME/. "
        "Results that are there and answer another question are kept, in its folder earlier/",
    )
    parser.add_argument("--wandb", action="store_true", help="log summary and picture to the checkpoint's own run")
    return parser


def arguments_for(diagnostic: Diagnostic, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments as `diagnostic.measure` sees them, with the reference apart from the other checkpoints. UserError
    for what is wrong with them, before anything is loaded."""
    check_arguments(args)
    diagnostic.check_arguments(args)
    if not diagnostic.takes_reference:
        return args
    reference, *others = args.checkpoints
    return argparse.Namespace(**vars(args) | {"checkpoints": others, "reference": reference})


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("batches", "batch_size", "block_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if isinstance(args.bos, int) and args.bos < 0:
        raise UserError(f"--bos {args.bos}: a token's id, from 0, its text, or none")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed}: at least 0 and below 2⁶⁴")


def check_files(name: str, args: argparse.Namespace) -> Path:
    """The output folder, not made yet. UserError for what would else show only after hours of measuring: a checkpoint
    or a wandb run that is not there, a folder that cannot be written."""
    for path in args.checkpoints:
        if not path.startswith("hf:") and not Path(path).exists():
            raise UserError(f"no checkpoint {path}")
        if args.wandb:
            wandb_run(Path(path).parent)
    folder = output_folder(name, args)
    check_folder(folder)
    return folder


def labels(paths: list[str]) -> list[str]:
    """A short name for each checkpoint: its run's, with the file's where it is not ckpt.pt; the path where that is not
    enough to tell them apart."""

    def short_name(path: str) -> str:
        if path.startswith("hf:"):
            return path
        run, stem = Path(path).resolve().parent.name, Path(path).stem
        return run if stem == "ckpt" else f"{run}/{stem}"

    if len(set(paths)) < len(paths):
        raise UserError(f"{next(p for p in paths if paths.count(p) > 1)} is given twice")
    short = [short_name(p) for p in paths]
    return [s if short.count(s) == 1 else p for s, p in zip(short, paths, strict=True)]


def output_folder(name: str, args: argparse.Namespace) -> Path:
    if args.out:
        return args.out
    if len(args.checkpoints) == 1 and not args.checkpoints[0].startswith("hf:"):
        return Path(args.checkpoints[0]).parent / name_in_run("diagnostics", args.checkpoints[0])
    return Path("out") / name


def name_in_run(name: str, path: str) -> str:
    """What the name stands for in the run of a checkpoint: of ckpt.pt the name itself, of best.pt `name/best`."""
    return name if Path(path).stem == "ckpt" else f"{name}/{Path(path).stem}"


def pictures(json_path: Path, checkpoints: list[str]) -> list[Path]:
    """Beside the JSON a picture of each checkpoint: NAME.png of one, NAME_LABEL.png of several."""
    if len(checkpoints) == 1:
        return [json_path.with_suffix(".png")]
    names = [label.replace("/", "_") for label in labels(checkpoints)]
    if len(set(names)) < len(names):  # a/best and a_best
        names = [f"{number}_{name}" for number, name in enumerate(names, 1)]
    return [json_path.with_name(f"{json_path.stem}_{name}.png") for name in names]


def help_of_columns(diagnostic: Diagnostic) -> str:
    lines = []
    for title, columns in {"columns": diagnostic.columns, **diagnostic.tables}.items():
        lines.append(f"{title}:")
        width = max(map(len, columns)) + 4
        for column, meaning in columns.items():
            text = textwrap.wrap(meaning, 118 - width)
            lines += [f"  {column}".ljust(width) + text[0], *(" " * width + line for line in text[1:])]
    return "\n".join(lines)


def print_result(diagnostic: Diagnostic, result: Result) -> None:
    shown = [row for row in result.rows if diagnostic.shown(row)]
    print_table(shown, list(diagnostic.columns))
    if len(shown) < len(result.rows):
        print(f"and {len(result.rows) - len(shown)} rows more in the JSON")
    for name, columns in diagnostic.tables.items():
        if result.tables.get(name):
            print(f"\n{name}:")
            print_table(result.tables[name], [c for c in columns if any(c in row for row in result.tables[name])])
    print()
    print_table([{"summary": name, "value": value} for name, value in result.summary.items()], ["summary", "value"])
    for note in result.notes:
        print(f"note: {note}")
    if diagnostic.reading:
        print("\n" + textwrap.fill(diagnostic.reading, 120))


def entry(script: str, subject: Subject | None, result: Result, path: str | None = None) -> dict:
    """A result as its JSON object: a value that is not finite is null, with a note."""
    notes = list(result.notes)
    finite = {
        key: _finite(value, key, notes)
        for key, value in {"rows": result.rows, **result.tables, "summary": result.summary}.items()
    }
    return {
        "script": script,
        "checkpoint": subject.path if subject else path,
        "step": subject.step if subject else None,
        "config": asdict(subject.model.config) if subject else None,
        "arguments": subject.arguments if subject else None,
        **finite,
        "notes": notes,
    }


def _finite(value, where: str, notes: list[str]):
    if isinstance(value, dict):
        named = {k: value[k] for k in LABELS if value.get(k) is not None}
        label = ", ".join(str(v) if k == "name" else f"{k} {v}" for k, v in named.items())
        return {k: _finite(v, f"{where} {label}".rstrip() + f": {k}", notes) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v, where, notes) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{where} is {value}")
        return None
    return value


def write_json(path: Path, entries: list[dict]) -> Path:
    """One checkpoint's object, or {"checkpoints": [several]}; whole or not at all. Results that are there and answer
    another question are kept. Returns the path."""
    content = entries[0] if len(entries) == 1 else {"checkpoints": entries}
    make_folder(path.parent)
    if path.exists():
        keep_results(path, content)
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False))
    return path


def keep_results(path: Path, content: dict) -> None:
    """Move the JSON at `path` and its pictures to a folder in earlier/, unless `content` answers the same question: the
    same scripts, of the same checkpoints and steps, with the same arguments. What is none of ours is kept too."""
    now = _questions(content)
    try:
        before = _questions(read_json(path))
    except (ValueError, AttributeError, TypeError):
        before = [{"checkpoint": None, "foreign": sha256(path.read_bytes()).hexdigest()}]
    asked, asking = (json.dumps(questions, sort_keys=True) for questions in (before, now))
    if asked == asking:
        return
    found = (question["checkpoint"] for question in before)
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint in found if isinstance(checkpoint, str)))
    names = "+".join(re.sub(r"[^\w.-]", "_", label) for label in labels(checkpoints))
    folder = path.parent / "earlier" / f"{names[:100]}-{sha256(asked.encode()).hexdigest()[:8]}".lstrip("-")
    make_folder(folder)
    for file in {path, path.with_suffix(".png"), *pictures(path, checkpoints)}:
        if file.exists():
            file.replace(folder / file.name)
    print(f"\nearlier results in {path.parent}, which answer another question, are now in {folder}")


def _questions(content: dict) -> list[dict]:
    entries = content.get("checkpoints", [content])
    return [{key: e.get(key) for key in ("script", "checkpoint", "step", "arguments")} for e in entries]
