"""Runs the cells of an experiment: trains what is not trained, measures what is not measured, one after another or
several at a time, each in processes of its own. Whatever stops it, the same command goes on from there.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from harness.checkpoint import read_checkpoint
from harness.device import commit, processor_name
from harness.errors import UserError
from harness.experiments.grid import ROOT, Cell, Experiment
from harness.files import make_folder, write_text
from harness.launch import prepare

# Keys that say where a run writes and who looks on: they make no other run of it.
_FREE = ("run.name", "run.out_dir", "training.resume", "training.overwrite", "training.device", "training.compile")
FINISHED, UNMEASURED, FAILED = "finished", "trained, but not all measured", "not trained"


class Interrupted(Exception):
    """A signal has asked for an end; its number is the argument."""


# ----------------------------------------------------------------------------------------------------------------------
# What is there


def trained(cell: Cell) -> bool:
    """Whether the cell is trained to its end. UserError where its folder holds a run of another config, with the keys,
    or a checkpoint that cannot be read."""
    if changed := changed_keys(cell):
        raise UserError(
            f"{cell.folder} holds a run of another config: {', '.join(changed)}; remove that folder to train it anew, "
            "or give the variant another name"
        )
    return cell.checkpoint.exists() and read_checkpoint(cell.checkpoint).get("step") == cell.config.training.max_steps


def changed_keys(cell: Cell) -> list[str]:
    """The keys in which the config.yaml of the run in the cell's folder differs from the cell's config: "key then →
    now". What a run finds out by itself, as its vocabulary, is no difference."""
    try:
        then = yaml.safe_load((cell.folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{cell.folder}/config.yaml cannot be read: {error}") from error
    if not isinstance(then, dict):
        raise UserError(f"{cell.folder}/config.yaml is no config of a run: remove that folder to train the cell anew")
    changed = []
    follows = cell.config.training.init_from != "scratch" or cell.config.training.feedback != "backprop"
    for section, entries in cell.config.to_dict().items():
        for name, now in entries.items():
            key, before = f"{section}.{name}", (then.get(section) or {}).get(name)
            if section == "tracking" or key in _FREE or before == now:
                continue
            if section == "model" and (now is None or (follows and key not in cell.config.sources)):
                continue
            changed.append(f"{key} {before} → {now}")
    return changed


def to_measure(experiment: Experiment, cell: Cell) -> list[tuple[list[str], Path]]:
    """The diagnostics that have not been run on the cell's checkpoints as they are now, or with other options."""
    record = _record(experiment)
    found = [command for measurement in experiment.measurements for command in measurement.commands(cell)]
    return [(words, path) for words, path in found if not path.exists() or record.get(str(path)) != _as_run(words)]


def _as_run(words: list[str]) -> dict:
    """What tells the result of a diagnostic from that of another command or of other checkpoints."""
    checkpoints = [Path(word) for word in words[1 : words.index("--out")]]
    changed = [checkpoint.stat().st_mtime_ns for checkpoint in checkpoints if checkpoint.exists()]
    return {"command": shlex.join(words), "checkpoints": changed}


def _record(experiment: Experiment) -> dict[str, dict]:
    try:
        return json.loads((experiment.folder / "measured.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # then everything is measured again, and nothing is lost
        return {}


# ----------------------------------------------------------------------------------------------------------------------
# Running


class Job:
    """One cell's processes, one after another: its training, then its diagnostics."""

    def __init__(self, experiment: Experiment, cell: Cell, slot: int, threads: int, train: bool):
        self.experiment, self.cell, self.started = experiment, cell, time.monotonic()
        self.problems: list[str] = []
        self.trained = not train
        self._commands = self._plan(train)
        self._environment = os.environ | {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", experiment.name)}
        self._environment |= {"OMP_NUM_THREADS": str(threads)}
        if torch.cuda.device_count():
            self._environment["CUDA_VISIBLE_DEVICES"] = _visible(slot)
        self.log = experiment.folder / "logs" / f"{cell.name}.log"
        self._process: subprocess.Popen | None = None
        self._words: list[str] = []
        self._result: Path | None = None

    def _plan(self, train: bool) -> Iterator[tuple[list[str], Path | None]]:
        if train:
            yield ["train.py", *self.cell.arguments], None
        yield from to_measure(self.experiment, self.cell)  # known after the training

    def advance(self) -> bool:
        """Start the next process where none is running; False once there is none left."""
        if self._process and self._process.poll() is None:
            return True
        if self._process and not self._ended(self._process.returncode):
            return False
        self._words, self._result = next(self._commands, ([], None))
        if not self._words:
            return False
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n$ python {shlex.join(self._words)}\n")
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, *self._words],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is ours to pass on, once
            )
        return True

    def _ended(self, status: int) -> bool:
        """Take note of how a process ended; False where nothing can come after it."""
        if status == 0 and self._result:
            record = _record(self.experiment) | {str(self._result): _as_run(self._words)}
            write_text(self.experiment.folder / "measured.json", json.dumps(record, indent=1))
        if status:
            self.problems.append(f"{self._words[0]}: {self._last_words(status)}")
        self.trained = self.trained or not status
        return self.trained

    def _last_words(self, status: int) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip()][-1].removeprefix("error: ")
        return said if status > 0 else f"ended by {signal.Signals(-status).name}"

    def stop(self, number: int) -> None:
        """Have the running process end; a training saves first."""
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def wait(self) -> None:
        if self._process:
            self._process.wait()

    def progress(self) -> str:
        """The cell and what is being done: the step of its training, or the diagnostic."""
        if self._result:
            return f"{self.cell.name} {self._result.stem}"
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            with open(self.cell.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                step = json.loads(file.read().split(b"\n")[-2])["step"]
            return f"{self.cell.name} step {step}/{self.cell.config.training.max_steps}"
        return self.cell.name


def _visible(slot: int) -> str:
    """The slot's GPU, by the name that it has among those that the user made visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[slot] if visible else str(slot)


def run_experiment(experiment: Experiment, jobs: int | None, command: str) -> int:
    """Train and measure all cells, `jobs` at a time (None: one, or one a GPU); the exit status: 1 if a cell failed.
    UserError, before anything is started, for cells that were trained with another config."""
    gpus = torch.cuda.device_count()
    jobs = min(jobs or max(1, gpus), len(experiment.cells))
    if gpus and jobs > gpus:
        raise UserError(f"--jobs {jobs}: there are {gpus} GPUs, and a cell takes one")
    refused = {cell.name: keys for cell in experiment.cells if (keys := changed_keys(cell))}
    if refused:
        name, keys = next(iter(refused.items()))
        more = f" (as do {', '.join(list(refused)[1:])})" if len(refused) > 1 else ""
        raise UserError(
            f"{experiment.folder}/{name} holds a run of another config than {experiment.path} says{more}: "
            f"{', '.join(keys)}; remove that folder to train it anew, or give the variant another name"
        )
    make_folder(experiment.folder / "logs")
    prepare_corpora(experiment)
    write_facts(experiment, command, jobs)
    handlers = {n: signal.signal(n, _interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return Schedule(experiment, jobs).run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(number, _frame) -> None:
    raise Interrupted(number)


class Schedule:
    """Which cells run when, and what is said of them."""

    def __init__(self, experiment: Experiment, jobs: int):
        self.experiment, self.jobs = experiment, jobs
        self.threads = threads(jobs)
        self.waiting, self.running = list(experiment.cells), dict[int, Job]()
        self.state: dict[str, str] = {}  # cell → FINISHED, UNMEASURED or FAILED
        self.seconds: dict[str, list[float]] = {}  # variant → of its cells that were run now
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=len(self.waiting), desc=experiment.name, unit="cell", disable=not terminal)

    def run(self) -> int:
        try:
            while self.waiting or self.running:
                for slot in range(self.jobs):
                    if slot not in self.running and (job := self._next(slot)):
                        self.running[slot] = job
                for slot, job in list(self.running.items()):
                    if not job.advance():
                        del self.running[slot]
                        self._done(job)
                self.bar.set_postfix_str(", ".join([job.progress() for job in self.running.values()] + [self._left()]))
                time.sleep(0.1)
        except Interrupted as interruption:
            return self._stop(interruption.args[0])
        finally:
            self.bar.close()
        failed = [name for name, state in self.state.items() if state != FINISHED]
        if failed:
            logs = self.experiment.folder / "logs"
            print(
                f"{len(failed)} of {len(self.state)} cells are not done: {', '.join(failed)}; see {logs}/", flush=True
            )
        return 1 if failed else 0

    def _next(self, slot: int) -> Job | None:
        """The job of the first waiting cell that has something to do and can do it now."""
        for cell in list(self.waiting):
            needs = [self.state.get(f"{variant}_s{cell.seed}") for variant in self._needs(cell)]
            if None in needs:
                continue
            self.waiting.remove(cell)
            try:
                if FAILED in needs:
                    raise UserError(f"it needs {', '.join(self._needs(cell))}")
                train = not trained(cell)
            except UserError as error:
                self._settle(cell, FAILED, f"not run: {' '.join(str(error).split())}")
                continue
            if train or to_measure(self.experiment, cell):
                return Job(self.experiment, cell, slot, self.threads, train)
            self._settle(cell, FINISHED, "")
        return None

    def _needs(self, cell: Cell) -> set[str]:
        compared = {m.reference for m in self.experiment.measurements if m.reference and list(m.commands(cell))}
        return {*cell.needs, *compared}

    def _done(self, job: Job) -> None:
        taken = time.monotonic() - job.started
        self.seconds.setdefault(job.cell.variant, []).append(taken)
        state = FAILED if not job.trained else UNMEASURED if job.problems else FINISHED
        self._settle(job.cell, state, "; ".join(job.problems) or f"trained and measured in {clock(taken)}")

    def _settle(self, cell: Cell, state: str, what: str) -> None:
        self.state[cell.name] = state
        self.bar.update()
        if not what:
            return
        done = f"{len(self.state)} of {len(self.experiment.cells)} cells"
        tqdm.write(f"{cell.name}: {what}; {', '.join(filter(None, [done, self._left()]))}", file=sys.stdout)
        sys.stdout.flush()

    def _left(self) -> str:
        """The time left, from what cells have taken so far: those of the same variant or, for want of them, all."""
        every = [seconds for found in self.seconds.values() for seconds in found]
        if not every:
            return ""
        now, jobs = time.monotonic(), self.running.values()

        def expected(cell: Cell) -> float:
            own = self.seconds.get(cell.variant, every)
            return sum(own) / len(own)

        left = sum(expected(cell) for cell in self.waiting)
        left += sum(max(0.0, expected(job.cell) - (now - job.started)) for job in jobs)
        return f"{clock(left / self.jobs)} left"

    def _stop(self, number: int) -> int:
        """Let the running trainings save, and end; a second signal ends them at once."""
        print("\nstopping: the trainings save first; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        try:
            for job in self.running.values():
                job.stop(signal.SIGTERM)
            for job in self.running.values():
                job.wait()
        except Interrupted:
            for job in self.running.values():
                job.stop(signal.SIGKILL)
        print(f"stopped with {len(self.state)} of {len(self.experiment.cells)} cells: the same command continues")
        return 128 + number


def threads(jobs: int) -> int:
    """Of each process where `jobs` run at a time."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def prepare_corpora(experiment: Experiment) -> None:
    """Prepare the corpora that are not there yet."""
    for folder in dict.fromkeys(cell.config.data.corpus for cell in experiment.cells):
        if experiment.prepare and not (Path(folder) / "val.bin").exists():
            print(f"preparing {folder}", flush=True)
            if subprocess.run([sys.executable, *experiment.prepare], cwd=ROOT).returncode:
                raise UserError(f"{experiment.path}: prepare: python {shlex.join(experiment.prepare)} failed")
        prepare(Path(folder))


def write_facts(experiment: Experiment, command: str, jobs: int) -> None:
    """experiment.json: which experiment the folder is of, and with what it was run. Runs of it before, by another
    commit or machine, stay in it under `earlier`."""
    path = experiment.folder / "experiment.json"
    file = experiment.path.resolve()
    machine = {
        "processor": processor_name(),
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        "cores": os.cpu_count(),
        "jobs": jobs,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
    }
    facts = {
        "file": str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine,
    }
    earlier: list[dict] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = before.pop("earlier", [])
        if before != facts and before not in earlier:
            earlier.append(before)
    write_text(path, json.dumps(facts | {"earlier": earlier}, indent=1, ensure_ascii=False))
