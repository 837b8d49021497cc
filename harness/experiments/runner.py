"""Runs the cells of an experiment: trains what is not trained, measures what is not measured, one after another or
several at a time, each in processes of its own. Whatever stops it, the same command goes on from there.
"""

import contextlib
import datetime
import fcntl
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
from tqdm import tqdm

from harness.corpus import is_prepared
from harness.device import commit, processor_name
from harness.distributed import LAUNCHER
from harness.errors import UserError
from harness.experiments.grid import ROOT, Cell, Experiment
from harness.experiments.state import ANEW, as_run, changed_keys, recorded, to_measure, trained
from harness.files import NOT_OFFERED, make_folder, write_text
from harness.launch import prepare
from harness.signals import heeded
from harness.text_files import read_json

TRAINED, FINISHED, UNMEASURED, FAILED = "trained", "finished", "trained, but not all measured", "not trained"


class Interrupted(Exception):
    """A signal has asked for an end; its number is the argument."""


class Job:
    """The processes of one cell, one after another: its training, or its diagnostics."""

    def __init__(self, experiment: Experiment, cell: Cell, slot: int, threads: int, measures: bool):
        self.experiment, self.cell, self.measures = experiment, cell, measures
        self.started, self.problems = time.monotonic(), list[str]()
        self._commands = self._plan()
        self._environment = os.environ | {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", experiment.name)}
        self._environment |= {"OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())}
        if torch.cuda.device_count():
            self._environment["CUDA_VISIBLE_DEVICES"] = _visible(slot)
        self.log = experiment.folder / "logs" / f"{cell.name}.log"
        self._process: subprocess.Popen | None = None
        self._words: list[str] = []
        self._result: Path | None = None
        self._log_start = 0

    def _plan(self) -> Iterator[tuple[list[str], Path | None]]:
        if self.measures:
            yield from to_measure(self.experiment, self.cell)
        else:
            yield ["train.py", *self.cell.arguments], None

    def advance(self) -> bool:
        """Start the next process where none is running; False once there is none left."""
        if self._process:
            if self._process.poll() is None:
                return True
            self._ended(self._process.returncode)
        self._words, self._result = next(self._commands, ([], None))
        if not self._words:
            return False
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n$ python {shlex.join(self._words)}\n")
            log.flush()
            self._log_start = log.tell()
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

    def _ended(self, status: int) -> None:
        """Take note of how a process ended."""
        if status:
            self.problems.append(f"{self._words[0]}: {self._last_words(status)}")
        elif self._result:
            record = recorded(self.experiment) | {str(self._result): as_run(self._words)}
            write_text(self.experiment.folder / "measured.json", json.dumps(record, indent=1))

    def _last_words(self, status: int) -> str:
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        said = self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
        return next((line for line in reversed(said) if line.strip()), f"status {status}").removeprefix("error: ")

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
            f"{', '.join(keys)}; {ANEW}"
        )
    make_folder(experiment.folder / "logs")
    with open(experiment.folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run_experiment.py is working in {experiment.folder}: wait for it") from None
        except OSError as error:  # a file system without locks
            if error.errno not in NOT_OFFERED:
                raise
        prepare_corpora(experiment)
        handlers = {number: signal.signal(number, _interrupt) for number in heeded()}
        try:
            return Schedule(experiment, jobs, command).run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _interrupt(number, _frame) -> None:
    raise Interrupted(number)


class Schedule:
    """Which cells run when, and what is said of them. A cell is trained once those that it starts from are; it is
    measured once it and those that it is compared with are trained."""

    def __init__(self, experiment: Experiment, jobs: int, command: str = ""):
        self.experiment, self.jobs, self.command = experiment, jobs, command
        self.threads = threads(jobs)
        self.waiting = [(cell, measures) for cell in experiment.cells for measures in (False, True)]
        self.running = dict[int, Job]()  # by slot
        self.state: dict[str, str] = {}  # cell → TRAINED, or how it ended: FINISHED, UNMEASURED, FAILED
        self.taken: dict[str, float] = {}  # cell → seconds, of what was run now
        self.bar = tqdm(total=len(experiment.cells), desc=experiment.name, unit="cell", disable=not sys.stderr.isatty())

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
            for job in self.running.values():  # there are some only where this ends by an error
                job.stop(signal.SIGTERM)
            self.bar.close()
        failed = [cell.name for cell in self.experiment.cells if self.state[cell.name] != FINISHED]
        if failed:
            print(f"{len(failed)} of {len(self.state)} cells are not done: {', '.join(failed)}")
        return 1 if failed else 0

    def _next(self, slot: int) -> Job | None:
        """The job of the first waiting cell that has something to do and can do it now."""
        for cell, measures in list(self.waiting):
            needs = self._needs(cell) if measures else cell.needs
            states = {variant: self.state.get(f"{variant}_s{cell.seed}") for variant in needs}
            if None in states.values() or (measures and cell.name not in self.state):
                continue
            self.waiting.remove((cell, measures))
            if self.state.get(cell.name) == FAILED:
                continue
            if lacking := [variant for variant, state in states.items() if state == FAILED]:
                problem = f"{'not measured' if measures else 'not run'}: {lacking[0]}_s{cell.seed} is not trained"
                self._settle(cell, UNMEASURED if measures else FAILED, problem)
                continue
            try:
                todo = to_measure(self.experiment, cell) if measures else not trained(cell)
            except UserError as error:
                self._settle(cell, FAILED, f"not run: {' '.join(str(error).split())}")
                continue
            if todo:
                self._write_facts()
                return Job(self.experiment, cell, slot, self.threads, measures)
            self._end(cell, measures)
        return None

    def _needs(self, cell: Cell) -> set[str]:
        """The variants that the cell is compared with."""
        return {m.reference for m in self.experiment.measurements if m.reference and list(m.commands(cell))}

    def _done(self, job: Job) -> None:
        name = job.cell.name
        self.taken[name] = self.taken.get(name, 0.0) + time.monotonic() - job.started
        if job.problems:
            self._settle(job.cell, UNMEASURED if job.measures else FAILED, "; ".join(job.problems))
        else:
            self._end(job.cell, job.measures)

    def _end(self, cell: Cell, measures: bool) -> None:
        """A cell is trained, or measured too."""
        if not measures:
            self.state[cell.name] = TRAINED
        else:
            taken = self.taken.get(cell.name)
            self._settle(cell, FINISHED, f"done in {clock(taken)}" if taken else "")

    def _settle(self, cell: Cell, state: str, what: str) -> None:
        self.state[cell.name] = state
        self.bar.update()
        if not what:
            return
        done = f"{self._settled()} of {len(self.experiment.cells)} cells"
        tqdm.write(f"{cell.name}: {what}; {', '.join(filter(None, [done, self._left()]))}", file=sys.stdout)
        sys.stdout.flush()

    def _settled(self) -> int:
        return sum(state != TRAINED for state in self.state.values())

    def _write_facts(self) -> None:
        """Once, before anything is run."""
        if self.command:
            write_facts(self.experiment, self.command, self.jobs)
            self.command = ""

    def _left(self) -> str:
        """The time left, from what settled cells have taken: those of the same variant or, for want of them, all."""
        by_variant: dict[str, list[float]] = {}
        for cell in self.experiment.cells:
            if cell.name in self.taken and self.state.get(cell.name) in (FINISHED, UNMEASURED):
                by_variant.setdefault(cell.variant, []).append(self.taken[cell.name])
        every = [seconds for found in by_variant.values() for seconds in found]
        if not every:
            return ""
        now, left = time.monotonic(), 0.0
        since = {job.cell.name: now - job.started for job in self.running.values()}
        for cell in self.experiment.cells:
            if self.state.get(cell.name) in (None, TRAINED):
                own = by_variant.get(cell.variant, every)
                so_far = self.taken.get(cell.name, 0.0) + since.get(cell.name, 0.0)
                left += max(0.0, sum(own) / len(own) - so_far)
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
        self.running.clear()
        print(f"stopped with {self._settled()} of {len(self.experiment.cells)} cells: the same command continues")
        return 128 + number


def threads(jobs: int) -> int:
    """Of each process where `jobs` run at a time."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def prepare_corpora(experiment: Experiment) -> None:
    """Prepare the corpora that are not there yet."""
    for folder in dict.fromkeys(cell.config.data.corpus for cell in experiment.cells):
        if experiment.prepare and not is_prepared(Path(folder)):
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
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        before = read_json(path)
        earlier = before.pop("earlier", [])
        before["machine"]["jobs"] = jobs  # how many at a time makes no other result
        another = any(before.get(key) != facts[key] for key in ("commit", "date", "machine"))
        if another and before not in earlier:
            earlier.append(before)
    write_text(path, json.dumps(facts | {"earlier": earlier}, indent=1, ensure_ascii=False))
