"""One process on its own, and two that torchrun started, say the same; and end together, in one voice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness import distributed
from harness.distributed import LAUNCHER, LOST, Ranks, Watch, join_ranks, one_voice, with_timeout
from harness.errors import UserError
from tests.helpers import ROOT
from tests.processes import TrainingRun, assert_same_run, children, finished_on_ranks, run_on_two_ranks

PROGRAM = """
import json, pathlib, sys; sys.path.insert(0, sys.argv[1])
import torch
from harness.distributed import join_ranks
ranks = join_ranks("cpu")
found = {
    "rank": ranks.rank, "size": ranks.size, "main": ranks.is_main,
    "sum": ranks.sum(torch.tensor([1.5, 10.0 ** ranks.rank])).tolist(),
    "max": ranks.max(5 - ranks.rank), "share": ranks.share({"name": f"from {ranks.rank}"}),
}
pathlib.Path(f"found_{ranks.rank}.json").write_text(json.dumps(found))
ranks.leave()
"""


def test_a_process_alone_is_its_own_sum(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks("cpu")
    assert ranks == Ranks(torch.device("cpu"), 0, 1)
    assert ranks.is_main
    assert ranks.sum(torch.tensor([2.0])).tolist() == [2]
    assert (ranks.max(7), ranks.share("x")) == (7, "x")
    ranks.leave()


@pytest.mark.slow
def test_two_ranks_add_up_agree_and_hear_rank_0(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_on_two_ranks(tmp_path / "program.py", ROOT)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found_{rank}.json").read_text())
        assert (found["rank"], found["size"], found["main"]) == (rank, 2, rank == 0)
        assert (found["sum"], found["max"], found["share"]) == ([3, 11], 5, {"name": "from 0"})


# --- how ranks end ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start_two(training_folder):
    """Two ranks of a run, as two processes of a launcher that keeps their store; killed when the test ends."""
    store, ranks = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False), []

    def start(*arguments: str, signal_at: tuple[int, int] | None = None, **environment: str) -> list[TrainingRun]:
        there = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        there |= {"WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment
        places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        ranks.extend(TrainingRun("two", *arguments, signal_at=signal_at, **there, **place) for place in places)
        return ranks

    yield start
    for rank in ranks:
        rank.process.kill()


def errors(ranks: list[TrainingRun]) -> list[str]:
    for rank in ranks:
        assert "Traceback" not in rank.output(), rank.output()
    return [line for rank in ranks for line in rank.output().splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--optimizer.lr", "x"), "command line: optimizer.lr takes a number ≥ 0, not 'x'"),  # before they have met
        (("--training.batch_size", "7"), "command line: training.batch_size: 7 sequences cannot be shared"),  # by both
        (("--run.out_dir", "/proc"), "cannot write to the run's folder /proc/two"),  # by rank 0 alone
    ],
)
def test_a_mistake_is_said_by_one_rank_and_the_status_of_all(arguments, error, start_two):
    ranks = start_two(*arguments)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert len(found := errors(ranks)) == 1, found
    assert found[0].startswith(f"error: {error}")


@pytest.mark.parametrize(
    ("lost", "number", "silence", "reason"),
    [
        (0, signal.SIGKILL, 30, "the connection to another rank broke ("),  # known before the silence is
        (1, signal.SIGSTOP, 1, "rank 1 on "),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_ends_the_other_in_a_line(lost, number, silence, reason, start_two):
    ranks = start_two("--training.max_steps", "100000", RANK_TIMEOUT=str(silence))
    ranks[0].wait_for_step(3)
    os.kill(ranks[lost].process.pid, number)
    start, other = time.monotonic(), ranks[1 - lost]
    assert other.wait() == LOST, other.output()
    assert time.monotonic() - start < 15  # 3 s in which the cause may come, or 1 s of silence, on a loaded machine
    (found,) = errors([other])
    assert found.startswith(f"error: {reason}")
    assert found.endswith(": the same command continues from the last checkpoint")


def test_a_call_that_gets_no_answer_is_given_up():
    assert with_timeout(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        with_timeout(lambda: 1 / 0)
    with pytest.raises(dist.DistError, match="no answer within"):
        with_timeout(lambda: time.sleep(1), 0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_of_rank_0_while_it_first_saves_is_no_error_of_the_others(number, start_two):
    ranks = start_two("--training.max_steps", "100000", signal_at=(0, number))  # rank 0 alone logs, and gets it
    assert [rank.wait() for rank in ranks] == [128 + number] * 2
    assert errors(ranks) == []
    assert f"{number.name} before the first step: nothing is lost" in ranks[0].output()


def lose_parent() -> None:
    """The parent is process 1, a launcher, until there is a file `gone`."""
    os.getppid = lambda: 2 if Path("gone").exists() else 1


def test_a_rank_alone_whose_launcher_has_gone_saves_and_ends(training_folder):
    def start() -> TrainingRun:
        return TrainingRun("run", "--training.max_steps", "100000", inject=lose_parent, **{LAUNCHER: "1"})

    run = start()
    run.wait_for_step(1)
    Path("gone").touch()
    assert run.wait() == 128 + signal.SIGTERM, run.output()
    assert "the same command continues" in run.output()
    assert start().wait() in (-signal.SIGTERM, 128 + signal.SIGTERM)  # it had gone while the rank still imported


def test_a_run_started_by_hand_outlives_its_shell(training_folder):
    run = TrainingRun("run", "--training.max_steps", "100000", inject=lose_parent)
    run.wait_for_step(1)
    Path("gone").touch()
    time.sleep(1.3)  # a launcher is looked for once a second
    assert run.process.is_alive(), run.output()
    run.process.kill()


class Connection:
    """To a store, until it is broken."""

    def __init__(self, store: dist.Store):
        self.store, self.broken = store, False

    def __getattr__(self, name: str):
        if self.broken:
            raise dist.DistNetworkError("Broken pipe")
        return getattr(self.store, name)


def test_a_watch_connects_again_but_not_to_the_store_of_a_later_attempt(monkeypatch):
    """Which may answer at the same address: there the other ranks are alive, and those of this attempt have ended."""
    stores, connections = [dist.HashStore()], []

    def connect() -> Connection:
        connections.append(Connection(stores[-1]))
        return connections[-1]

    def goes_on(seconds: float) -> bool:
        rounds, deadline = watch._rounds, time.monotonic() + seconds
        while watch._rounds <= rounds + 1 and time.monotonic() < deadline:  # one may be under way
            time.sleep(0.01)
        return watch._rounds > rounds + 1

    monkeypatch.setattr(distributed, "meeting_store", connect)
    monkeypatch.setattr(Watch, "_guard", lambda _: None)  # which would end this process
    watch = Watch(0, 2, limit=0.1)
    assert goes_on(10)
    connections[-1].broken = True
    assert goes_on(10)
    stores.append(dist.HashStore())
    connections[-1].broken = True
    assert not goes_on(0.3)
    assert not stores[-1].check(["alive/0"])
    watch.leave()


def start_torchrun(*options: str) -> subprocess.Popen:
    """A run named `run`, of the config in the current folder."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(ROOT / "train.py"))
    with open("log", "w") as log:
        return subprocess.Popen(
            [*command, "config.yaml", "--run.name", "run", *STEPS],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


STEPS = ("--training.max_steps", "300", "--training.checkpoint_interval", "50")


@pytest.mark.faults
def test_torchrun_starts_its_ranks_again_after_one_was_killed(training_folder):
    uninterrupted = finished_on_ranks(2, "whole", *STEPS)
    process, run = start_torchrun("--nproc_per_node", "2", "--max-restarts", "1"), TrainingRun.read("run")
    while not any(line["step"] >= 70 for line in run.metrics()):
        assert process.poll() is None, Path("log").read_text()
        time.sleep(0.01)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert process.wait(120) == 0, Path("log").read_text()
    assert_same_run(run, uninterrupted)


@pytest.mark.faults
def test_the_only_rank_of_a_torchrun_that_was_killed_saves_and_ends(training_folder):
    process, run = start_torchrun("--nproc_per_node", "1"), TrainingRun.read("run")
    while not run.metrics():
        assert process.poll() is None, Path("log").read_text()
        time.sleep(0.01)
    (rank,) = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < deadline, Path("log").read_text()
        time.sleep(0.05)
    assert "the same command continues" in Path("log").read_text()


MEETING = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"WORLD_SIZE": "2"},
            "that this is one of several ranks, but not so RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR",
        ),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x says that this is one of several ranks, but not so WORLD_SIZE, RANK"),
        (MEETING | {"MASTER_PORT": "b"}, "but not so MASTER_PORT: unset it"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
                "RANK_TIMEOUT": "nan",
            },
            "RANK_TIMEOUT: 'nan' is not a whole number of seconds",
        ),
    ],
)
def test_a_mistake_in_what_says_that_there_are_ranks_is_a_line(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected), one_voice():
        join_ranks("cpu")
