"""What tests start: programs in processes of their own, training runs that are forked, stopped and compared, ranks."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import torch

from harness.distributed import join_ranks
from harness.errors import run_cli
from tests.helpers import ROOT

# --- programs ---------------------------------------------------------------------------------------------------------


def run_python(*arguments, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """`python arguments` in a process of its own; a path ending in .py is one of this repository."""
    words = [str(ROOT / a) if str(a).endswith(".py") else str(a) for a in arguments]
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )


def forked(function, stdout: int | None = None, stderr: int | None = None) -> int:
    """The exit status of `function()` in a fork of this process, which has these descriptors (None: closed) for its
    standard output and error."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        for number, name, given in ((1, "stdout", stdout), (2, "stderr", stderr)):
            if given is None:
                os.close(number)
            else:
                os.dup2(given, number)
            setattr(
                sys, name, None if given is None else os.fdopen(number, "w", closefd=False)
            )  # as Python itself does
        os._exit(function() or 0)
    except BaseException:
        os._exit(99)


def run_on_two_ranks(*arguments) -> subprocess.CompletedProcess:
    """torchrun in the current folder, a thread a rank."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    return run_python(*torchrun, *arguments, cwd=Path.cwd(), OMP_NUM_THREADS="1")


def children(pid: int) -> list[int]:
    """The processes that this one's main thread has started, in that order."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- training runs ----------------------------------------------------------------------------------------------------

# Each run is forked from a server that has imported train.py already: a start costs milliseconds where a fresh
# interpreter takes seconds, and it can be killed like any other process.
CONTEXT = multiprocessing.get_context("forkserver")
# AdamW imports the second, attention the third, a sharded run the next two, a run the last.
CONTEXT.set_forkserver_preload(
    ["train", "torch._dynamo", "kernels.cpu", "harness.sharded", "torch.distributed.fsdp", "tests.processes"]
)


def started(function, *arguments) -> multiprocessing.Process:
    """A process of the server's that calls `function(*arguments)`."""
    with contextlib.chdir(ROOT):  # the server, started by the first, finds what it imports from here
        forkserver.ensure_running()
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def write_to(log: str | Path, mode: str = "w") -> None:
    """Have what this process, forked from the server, writes from now on go to the file."""
    with open(log, mode) as f:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(f.fileno(), number)
            setattr(sys, name, os.fdopen(number, "w", 1, closefd=False))  # the server's may be files, and this a pipe


def _child(arguments, log, signal_at, environment, inject):
    write_to(log)
    import train

    os.environ.update(environment)
    train.peak_flops = lambda *_: (1e12, "no measurement")  # a third of a run's time; test_device.py measures

    def log_metrics(tracker, step, metrics, log_metrics=train.Tracker.log):
        log_metrics(tracker, step, metrics)
        if signal_at and step == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])

    train.Tracker.log = log_metrics
    if inject:
        inject()
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    sys.exit(run_cli(train.main))


class TrainingRun:
    """`train.py config.yaml --run.name NAME …` in the current folder. With `signal_at`, a step and a signal, it is sent
    that signal between the step's line of metrics and its checkpoint: from outside a loaded machine may miss the step.
    `inject` is called in the run's process before it begins.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        signal_at: tuple[int, int] | None = None,
        inject: Callable[[], None] | None = None,
        **environment: str,
    ):
        self.folder, self.log = Path("out") / name, Path(f"{name}{environment.get('RANK', '')}.log")
        arguments = ("config.yaml", "--run.name", name, *arguments)
        self.process = started(_child, arguments, self.log, signal_at, environment, inject)

    @classmethod
    def read(cls, name: str) -> "TrainingRun":
        """A run that another process has written."""
        run = cls.__new__(cls)
        run.folder = Path("out") / name
        return run

    def wait(self) -> int:
        self.process.join(900)
        return self.process.exitcode

    def wait_for_step(self, step: int) -> None:
        deadline = time.time() + 600
        while not any(line["step"] >= step for line in self.metrics()):
            assert self.process.is_alive(), self.output()
            assert time.time() < deadline, self.output()
            time.sleep(0.002)

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def output(self) -> str:
        return self.log.read_text()

    def checkpoint(self, name="ckpt.pt") -> dict:
        return torch.load(self.folder / name, weights_only=True)


def finished(name: str, *arguments: str) -> TrainingRun:
    run = TrainingRun(name, *arguments)
    assert run.wait() == 0, run.output()
    return run


def meeting(size: int) -> tuple[torch.distributed.TCPStore, list[dict[str, str]]]:
    """What torchrun gives so many ranks: it keeps the store where they meet, and says where by these variables."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(size)}
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def started_on_ranks(size: int, name: str, *arguments: str, inject=None) -> list[TrainingRun]:
    """A run on so many ranks. `inject` is for rank 0 alone."""
    store, places = meeting(size)
    ranks = [
        TrainingRun(name, *arguments, inject=None if rank else inject, **place) for rank, place in enumerate(places)
    ]
    ranks[0].store = store  # which has to live as long as they do
    return ranks


def finished_on_ranks(size: int, name: str, *arguments: str) -> TrainingRun:
    ranks = started_on_ranks(size, name, *arguments)
    for rank in ranks:
        assert rank.wait() == 0, rank.output()
    return ranks[0]


def _rank(work, log, environment):
    write_to(log)
    os.environ.update(environment)
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    work(ranks)
    ranks.leave()


def on_ranks(number: int, work) -> None:
    """Call `work(ranks)`, a function at a module's top, in so many processes that train together."""
    _store, places = meeting(number)
    processes = [started(_rank, work, Path(f"rank{rank}.log"), place) for rank, place in enumerate(places)]
    for rank, process in enumerate(processes):
        process.join(900)
        assert process.exitcode == 0, Path(f"rank{rank}.log").read_text()


def killed(name: str, *arguments: str, at: int) -> None:
    run = TrainingRun(name, *arguments, signal_at=(at, signal.SIGKILL))
    assert run.wait() == -signal.SIGKILL, run.output()


def refused(name: str, *arguments: str) -> str:
    """The one line that a mistake gets."""
    run = TrainingRun(name, *arguments)
    assert run.wait() == 2, run.output()
    errors = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.output()
    assert "Traceback" not in run.output()
    return errors[0]


def reproducible(lines: list[dict]) -> list[dict]:
    """The metrics without those that a clock gives."""
    return [{k: v for k, v in line.items() if k not in ("train/tokens_per_second", "train/mfu")} for line in lines]


def assert_same_run(a: TrainingRun, b: TrainingRun) -> None:
    assert reproducible(a.metrics()) == reproducible(b.metrics())
    one, other = a.checkpoint(), b.checkpoint()
    assert one["step"] == other["step"]
    assert one["best_val_loss"] == other["best_val_loss"]
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][key]), key
    for i, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][i][k]) for k, value in state.items())
