"""Runs killed with SIGKILL, at random moments and at every one of their writes, and started again.

Each ends with the losses and weights of the run that nothing has stopped, bit for bit; none loses more than an
interval; nothing is left behind. The short forms are a few kills; `./run_tests.sh -m faults` is the whole.
"""

import builtins
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.runfolder import RunFolder
from harness.sharded import Reader
from harness.tracking import known_id, stored_steps
from tests.processes import TrainingRun, reproducible, started_on_ranks

INTERVAL = 4
CONFIG = f"""
run: {{seed: 1}}
model: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, bias: false, normalizer: softmax1, dropout: 0.1}}
data: {{corpus: corpus}}
optimizer: {{lr: 1e-1, warmup_steps: 2, min_lr: 1e-1, decay_steps: 13}}
training:
  {{max_steps: 12, batch_size: 8, device: cpu, dtype: float32, checkpoint_interval: {INTERVAL}, keep_interval: 6}}
evaluation: {{interval: 3, batches: 2}}
tracking: {{wandb: disabled, log_interval: 1}}
"""


@pytest.fixture(autouse=True)
def folder(training_folder) -> None:
    Path("config.yaml").write_text(CONFIG)
    Path("out").mkdir()  # so that every run does the same


# --- the moments of a run ---------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Watches what a run's process does to the files of its folder. Each change is a moment with a name:
    "rename best.pt 2" comes before the second file is renamed to best.pt. `log`: a file for the names. `stop_at`: the
    moment at which the process receives `signals`. `pause`: seconds to wait at each, for kills from outside."""

    folder: Path
    log: Path | None = None
    stop_at: str | None = None
    signals: tuple[int, ...] = (signal.SIGKILL,)
    pause: float = 0.0

    def __call__(self) -> None:
        self.folder, self.count = self.folder.absolute(), Counter()
        self.open, self.fsync = builtins.open, os.fsync
        builtins.open, os.fsync = self._open, self._fsync  # Python tells its audit hooks neither of writes nor of fsync
        sys.addaudithook(self._audit)

    def moment(self, what: str, path: Path, just_before: Callable[[], object] = lambda: None) -> None:
        path = Path(os.path.normpath(path.absolute()))
        if not path.is_relative_to(self.folder):
            return
        event = f"{what} {re.sub(r'[.][0-9]+[.]tmp$', '.tmp', str(path.relative_to(self.folder)))}"
        self.count[event] += 1
        name = f"{event} {self.count[event]}"
        if self.log:
            with self.open(self.log, "a") as file:
                file.write(f"{name}\n")
        if name == self.stop_at:
            just_before()
            for number in self.signals:
                signal.raise_signal(number)
        time.sleep(self.pause)

    def _audit(self, event: str, arguments: tuple) -> None:
        """open, os.rename, os.remove, os.mkdir and os.rmdir, as Python itself reports them."""
        if event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.moment("open", Path(arguments[0]))
        elif event == "os.rename":
            self.moment("rename", Path(arguments[1]))
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            within = f"/proc/self/fd/{arguments[-1]}" if arguments[-1] >= 0 else ""
            self.moment(event.removeprefix("os."), Path(os.path.realpath(within) if within else "", arguments[0]))

    def _fsync(self, descriptor: int) -> None:
        self.moment("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self.fsync(descriptor)

    def _open(self, path, mode="r", *rest, **more):
        file = self.open(path, mode, *rest, **more)
        if isinstance(path, str | os.PathLike) and mode[0] in "wa":
            write, first = file.write, True

            def torn(content) -> int:
                nonlocal first
                if first or mode[0] == "a":  # of a file that is written at one go, one moment is enough
                    first = False
                    self.moment("write", Path(path), lambda: (write(content[: len(content) // 2]), file.flush()))
                return write(content)

            file.write = torn
        return file


# --- runs that are killed ---------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What is trained: the config's changes, on so many ranks."""

    ranks: int = 1
    arguments: tuple[str, ...] = ()

    def start(self, name: str, **moments) -> list[TrainingRun]:
        inject = Moments(Path("out") / name, **moments)
        return started_on_ranks(self.ranks, name, *self.arguments, inject=inject)

    def finish(self, name: str, **moments) -> TrainingRun:
        runs = self.start(name, **moments)
        for run in runs:
            assert run.wait() == 0, run.output()
        return runs[0]

    def kill_at(self, name: str, moment: str) -> None:
        runs = self.start(name, stop_at=moment)
        assert runs[0].wait() == -signal.SIGKILL, f"{moment}: {runs[0].output()}"
        kill(runs)
        look_at_what_is_left(runs[0])

    def kill_after(self, name: str, seconds: float, pause: float) -> bool:
        """Whether that was before its end."""
        runs = self.start(name, pause=pause)
        time.sleep(seconds)
        kill(runs)
        look_at_what_is_left(runs[0])
        assert runs[0].process.exitcode in (0, -signal.SIGKILL), runs[0].output()
        return runs[0].process.exitcode != 0


def kill(runs: list[TrainingRun]) -> None:
    for run in runs:
        run.process.kill()
    for run in runs:
        run.wait()


def look_at_what_is_left(run: TrainingRun) -> None:
    """The checkpoints are whole, and behind by an interval at most, or by two if they are written in the background; at
    most one temporary file is left."""
    for name in ("ckpt.pt", "best.pt"):
        if (run.folder / name).exists():
            run.checkpoint(name)
    if steps := [line["step"] for line in run.metrics()]:
        saved = run.checkpoint()["step"] if (run.folder / "ckpt.pt").exists() else 0
        assert steps[-1] - saved <= INTERVAL * (2 if (run.folder / "shards").exists() else 1)
    assert len(leftovers(run.folder)) <= 1


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob("*.tmp")]


def same(one, other) -> bool:
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def files(folder: Path) -> list[str]:
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("wandb/") or name.endswith(".tmp"))


def assert_ends_as(whole: TrainingRun, run: TrainingRun) -> None:
    steps = [line["step"] for line in run.metrics()]
    assert steps == sorted(set(steps))
    assert reproducible(run.metrics()) == reproducible(whole.metrics())
    assert files(run.folder) == files(whole.folder)
    for name in [name for name in files(whole.folder) if name.endswith(".pt")]:
        one, other = whole.checkpoint(name), run.checkpoint(name)
        one["config"]["run"] = other["config"]["run"]  # they are not of one name
        for checkpoint, of in ((one, whole), (other, run)):
            if "shards" in checkpoint:
                checkpoint["shards"] = tensors(of.folder / checkpoint["shards"]["folder"])
        assert same(one, other), name


def tensors(shards: Path) -> dict[str, torch.Tensor]:
    reader = Reader(shards)
    found = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in reader.tensors().items()}
    reader.load(found)
    return found


# --- kills at every write ---------------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_as_one_never_stopped():
    """Each of these is the end of a process. The best evaluation is that of step 6, in the middle of the run."""
    whole = Setting().finish("whole")
    assert whole.checkpoint("best.pt")["step"] == 6
    for moment in (
        "write metrics.jsonl 1",  # half a line, and no checkpoint yet
        "rename ckpt.pt 1",  # the first best.pt is there
        "rename best.pt 3",  # of step 6, after a start from nothing
        "rename ckpt.pt 1",  # of step 6, after a start from step 4; best.pt is there
        "rename steps/6.pt 1",
        "write ckpt.pt.tmp 2",
    ):
        Setting().kill_at("killed", moment)
    run = Setting().finish("killed")
    assert "resuming out/killed from step 6" in run.output()
    assert_ends_as(whole, run)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(8))
def test_a_kill_at_any_write_costs_nothing(part):
    whole = Setting().finish("whole", log=Path("moments"))
    moments = Path("moments").read_text().splitlines()
    assert len(moments) > 80
    for moment in moments[part::8]:
        name = f"killed at {moment}".replace("/", " ")
        Setting().kill_at(name, moment)
        assert_ends_as(whole, Setting().finish(name))


# --- kills at random moments ------------------------------------------------------------------------------------------

PAUSE = 0.002  # seconds at each write, which together are a third of a run's life


def assert_survives(kills: int, seed: int, setting: Setting) -> None:
    """Every one of so many runs, each killed once at a random moment of its life, ends as one never stopped."""
    whole = setting.finish("warm", pause=PAUSE)  # the first one waits for its server
    start = time.time()
    setting.finish("whole", pause=PAUSE)
    life, draw, tried, killed = time.time() - start, random.Random(seed), 0, 0
    while killed < kills:
        name, tried = f"killed{tried}", tried + 1
        if setting.kill_after(name, draw.uniform(0, life), PAUSE):
            killed += 1
            assert_ends_as(whole, setting.finish(name))


def test_a_run_killed_at_a_random_moment_ends_as_one_never_stopped():
    assert_survives(2, time.time_ns(), Setting())


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_runs_killed_at_random_moments_end_as_one_never_stopped(seed):
    assert_survives(10, seed, Setting())


@pytest.mark.faults
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("seed", range(2))
def test_ranks_killed_at_random_moments(seed, parallel):
    assert_survives(10, seed, Setting(2, ("--training.parallel", parallel)))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2))
def test_runs_killed_beside_an_offline_wandb_leave_every_step_there_once(seed):
    assert_survives(10, seed, Setting(arguments=("--tracking.wandb", "offline")))
    for folder in [*Path("out").glob("killed*")]:
        run_id, found = known_id(folder), Counter()
        for part in (folder / "wandb").glob("offline-run-*"):
            shutil.copytree(part, Path("part", "wandb", part.name))
            found.update(stored_steps(Path("part"), run_id))
            shutil.rmtree("part")
        assert found == Counter(range(13))


# --- kills while a run takes the place of a former one ----------------------------------------------------------------

AFRESH = ("--training.resume", "never", "--training.overwrite", "true", "--run.seed", "7")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if name != ".lock"}


def assert_one_of_them_is_left(chosen: Callable[[list[str]], list[str]]) -> None:
    """Killed at any of the chosen moments, of all up to the new run's first checkpoint."""
    former = Setting().finish("former")
    new = Setting(arguments=("--run.seed", "7"))
    whole = new.finish("new")
    content = contents(former.folder)
    shutil.copytree(former.folder, "out/run")
    Setting(arguments=AFRESH).finish("run", log=Path("moments"))
    moments = Path("moments").read_text().splitlines()
    for moment in chosen(moments[: moments.index("rename ckpt.pt 1") + 2]):
        shutil.rmtree("out/run")
        shutil.copytree(former.folder, "out/run")
        Setting(arguments=AFRESH).kill_at("run", moment)
        with RunFolder(Path("out/run")):  # as the next command does, whatever it is
            left = contents(Path("out/run"))
        if left != content:
            assert_ends_as(whole, new.finish("run"))


def test_a_run_killed_while_it_takes_the_place_of_another_leaves_one_of_them_whole():
    """While files are moved aside, when the new ones begin, and while the former are removed."""

    def chosen(moments: list[str]) -> list[str]:
        aside, removed = ([m for m in moments if re.match(rf"{what} \.\w+/", m)] for what in ("rename", "remove"))
        return [aside[1], "rename config.yaml 1", removed[1]]

    assert_one_of_them_is_left(chosen)


@pytest.mark.faults
def test_a_kill_at_any_moment_of_taking_the_place_of_another():
    assert_one_of_them_is_left(lambda moments: moments)
