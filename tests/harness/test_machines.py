"""The ranks of a machine end together, as asked, in one line; two machines do, whatever becomes of one of them."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import machines
from harness.distributed import LOST
from harness.errors import run_cli
from harness.launch import prepare
from harness.machines import Launcher, Machines, machines_of
from harness.signals import STOPS
from tests.processes import started, write_to

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_JOB_ID": "7042",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """What SLURM's own command says of `node[3-4]`, and of nothing else."""
    path = tmp_path / "scontrol"
    path.write_text('#!/bin/sh\ntest "$*" = "show hostnames node[3-4]" && printf "node3\\nnode4\\n"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 0, Machines()),
        ({"MASTER_ADDR": "left over", "NODE_RANK": ""}, 1, Machines()),
        ({}, 8, Machines(ranks=6)),  # which divides 12
        ({"NPROC_PER_NODE": "3", "MAX_RESTARTS": "2"}, 0, Machines(ranks=3, restarts=2)),
        ({"--max-restarts": "1", "MAX_RESTARTS": "2"}, 0, Machines(restarts=1)),
        (TWO, 0, Machines(2, 1, "a", 1234)),
        (TWO, 8, Machines(2, 1, "a", 1234, 6)),
        (SLURM, 4, Machines(2, 1, "node3", 29542, 3)),
        (SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "80"}, 4, Machines(2, 1, "b", 80, 3)),
        (SLURM | TWO | {"NNODES": "3"}, 0, Machines(3, 1, "a", 1234)),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, 0, Machines()),  # a job's script, which srun has not started
    ],
)
def test_the_environment_says_which_machines_train(environment, gpus, expected, scontrol):
    assert machines_of(environment, gpus, batch_size=12) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NNODES": "two"}, "NNODES: 'two' is not a whole number from 1 to 100000"),
        ({"NODE_RANK": "1"},
         "NODE_RANK is set and NNODES, how many machines train together, is not: set it, or unset NODE_RANK"),
        (TWO | {"NODE_RANK": "2"}, "NODE_RANK: '2' is not a whole number from 0 to 1"),
        (TWO | {"NODE_RANK": ""}, "NODE_RANK is not set: with several machines it counts them, from 0 on"),
        (TWO | {"MASTER_ADDR": ""},
         "MASTER_ADDR is not set: with several machines it is the address of the one with NODE_RANK 0"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT: '70000' is not a whole number from 1 to 65535"),
        ({"NPROC_PER_NODE": "9"}, "NPROC_PER_NODE: '9' is not a whole number from 1 to 4"),  # GPUs
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: '-1' is not a whole number from 0 to 1000000"),
        ({"--max-restarts": "x"}, "--max-restarts: 'x' is not a whole number from 0 to 1000000"),
        ({"RANK_TIMEOUT": "½"}, "RANK_TIMEOUT: '½' is not a whole number from 1 to 86400"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"},
         "srun started 8 tasks on 2 nodes: start one a node, by srun --ntasks-per-node=1"),
        (SLURM | {"SLURM_STEP_NODELIST": "x"},
         "scontrol show hostnames x names none: set MASTER_ADDR to the first of them"),
    ],
)  # fmt: skip
def test_a_mistake_in_it_is_one_line(environment, expected, scontrol, capsys):
    assert run_cli(lambda: machines_of(environment, 4, 12)) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- one machine, whose ranks are shells ------------------------------------------------------------------------------


def launch(script: str, ranks: int = 3, prepare=lambda: None, **more) -> int:
    """The status of ranks that run a shell script."""
    former = [(number, signal.getsignal(number)) for number in (*STOPS, signal.SIGTSTP)]
    try:
        return Launcher(Machines(ranks=ranks, **more)).run(lambda: ["sh", "-c", script], prepare)
    finally:
        for number, handler in former:
            signal.signal(number, handler)


def test_ranks_know_their_places(here):
    assert launch('echo "$RANK $LOCAL_RANK $GROUP_RANK $WORLD_SIZE $MASTER_ADDR" > $RANK', ranks=2) == 0
    assert [Path(rank).read_text() for rank in "01"] == ["0 0 0 2 localhost\n", "1 1 0 2 localhost\n"]


@pytest.mark.parametrize(("ranks", "threads"), [(1, "PyTorch's"), (2, "3")])
def test_ranks_share_the_processors(ranks, threads, here, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machines.os, "cpu_count", lambda: 6)
    assert launch("echo ${OMP_NUM_THREADS:-PyTorch\\'s} > threads", ranks=ranks) == 0
    assert Path("threads").read_text() == f"{threads}\n"


@pytest.mark.parametrize(
    ("script", "status", "said", "starts"),
    [
        ("exit 2", 2, "", 1),  # a user's mistake stays one
        ("exit 75", 75, "", 3),
        ("test $RANK = 1 && exit 1; sleep 0.2; exit 75", 1, "", 3),  # the first is the cause
        ("test $RANK = 1 && kill -9 $$; sleep 0.2; exit 75", 137, "error: rank 1 on HOST was killed by SIGKILL", 3),
        ("exit 143", 143, "", 1),  # a signal to another machine
        ("test $(cat starts | wc -l) -gt 5 || exit 75", 0, "", 2),  # all is well the second time
    ],
)
def test_a_failure_ends_all_is_said_once_and_tried_again_where_that_may_help(
    script, status, said, starts, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert launch(f"echo $RANK >> starts; sleep 0.1; {script}", restarts=2) == status
    errors = capfd.readouterr().err.splitlines()
    assert len(Path("starts").read_text().split()) == 3 * starts
    assert len(errors) == (starts if said else 0)
    assert all(line.startswith(said.replace("HOST", socket.gethostname())) for line in errors)


def test_what_does_not_end_by_itself_is_killed(monkeypatch):
    monkeypatch.setattr(machines, "_KILLED_AFTER", 0.1)
    start = time.monotonic()
    assert launch("trap '' TERM; test $RANK = 1 && exit 75; test $RANK = 2 && kill -STOP $$; sleep 60") == LOST
    assert time.monotonic() - start < 30


@contextlib.contextmanager
def signalled(*numbers: int, pause: float = 0.2) -> Iterator[None]:
    """This process gets these signals one after another, once the ranks have had time to start."""

    def send() -> None:
        for number in numbers:
            time.sleep(pause)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def waits_for(number: int, then: str) -> str:
    """The script of a rank that does something at a signal, and runs on."""
    return f"trap '{then}' {signal.Signals(number).name.removeprefix('SIG')}; while :; do sleep 0.02; done"


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_reaches_every_rank_once_and_waits_for_what_it_saves(number, here, monkeypatch):
    """Longer than others are waited for after a failure, and whichever rank ends first."""
    monkeypatch.setattr(machines, "_KILLED_AFTER", 0.1)
    saves = f"echo $RANK >> saved; sleep 0.$RANK; test $RANK = 2 && sleep 0.3; touch done$RANK; exit {128 + number}"
    with signalled(number):
        assert launch(waits_for(number, saves), restarts=3) == 128 + number
    assert sorted(Path("saved").read_text().split()) == ["0", "1", "2"]
    assert all(Path(f"done{rank}").exists() for rank in "012")


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("exit 0", 0),  # it was the last step
        ("test $RANK = 1 && sleep 0.2 && exit 2; exit 143", 2),  # the disk was full
        ("test $RANK = 1 && sleep 0.2 && exit 1; exit 143", 1),
        ("test $RANK = 1 && kill -9 $$; sleep 0.2; exit 75", 137),  # out of memory
    ],
)
def test_a_failure_after_a_signal_is_not_hidden_by_it(then, status):
    with signalled(signal.SIGTERM):
        assert launch(waits_for(signal.SIGTERM, then), restarts=3) == status


def test_one_ctrl_c_after_another_signal_lets_the_ranks_save(here):
    with signalled(signal.SIGTERM, signal.SIGINT):
        script = waits_for(signal.SIGTERM, "sleep 0.4; touch saved$RANK; exit 143")
        assert launch(f"trap : INT; {script}", ranks=2) == 143
    assert len([*here.glob("saved*")]) == 2


def test_a_hangup_that_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signalled(signal.SIGHUP, pause=0.1):
            assert launch("sleep 0.3", ranks=2) == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_second_ctrl_c_kills_and_a_pause_is_none(monkeypatch):
    kill = os.kill
    monkeypatch.setattr(machines.os, "kill", lambda pid, number: number == signal.SIGSTOP or kill(pid, number))
    with signalled(signal.SIGTSTP, signal.SIGINT, signal.SIGINT):
        assert launch("trap '' INT; while :; do sleep 0.02; done") == 130


def test_who_is_waited_for_is_said_once(monkeypatch, capfd):
    for name, seconds in (("_SAID_AFTER", 0.1), ("_PATIENCE", 0.5), ("_KILLED_AFTER", 0.1)):
        monkeypatch.setattr(machines, name, seconds)
    assert launch("exit 0", ranks=1, size=2) == LOST
    said = capfd.readouterr()
    assert said.out == "waiting for the machine with NODE_RANK 1\n"
    assert "minutes for the machine with NODE_RANK 1: the same command continues" in said.err


# --- two machines on loopback, whose ranks are shells -----------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _machine(rank: int, port: int, log: str, arguments: dict) -> None:
    write_to(log, "a")
    script, corpus = arguments.pop("script"), arguments.pop("corpus", None)
    launcher = Launcher(Machines(**{"size": 2, "rank": rank, "address": "localhost", "port": port} | arguments))
    sys.exit(run_cli(lambda: launcher.run(lambda: ["sh", "-c", script], lambda: corpus and prepare(Path(corpus)))))


class Machine:
    def __init__(self, rank: int, port: int, script: str, **arguments):
        self.log = Path(f"machine{rank}.log")
        self.process = started(_machine, rank, port, str(self.log.resolve()), {"script": script} | arguments)

    def wait(self) -> tuple[int, str]:
        self.process.join(60)
        return self.process.exitcode, self.log.read_text()


@pytest.mark.parametrize("dying", [0, 1])
def test_a_machine_that_dies_is_taken_in_again_by_the_same_command(dying, here):
    """The first one too, at which all meet. A rank that lost it ends with 75."""
    port = free_port()
    script = f"cd {here}; test -e back && exit 0; touch started$RANK; "
    script += "while kill -0 $PPID; do test -e dead && exit 75; sleep 0.05; done"
    two = [Machine(rank, port, script, restarts=1) for rank in (0, 1)]
    while len([*here.glob("started*")]) < 2:
        assert two[dying].process.is_alive(), two[dying].log.read_text()
        time.sleep(0.05)
    two[dying].process.kill()
    two[dying].process.join()
    (here / "dead").touch()
    time.sleep(0.3)
    (here / "back").touch()
    two[dying] = Machine(dying, port, script, restarts=1)
    assert [machine.wait()[0] for machine in two] == [0, 0]
    assert "starting the ranks again" in two[1 - dying].log.read_text()


@pytest.mark.parametrize(
    ("changes", "statuses", "error"),
    [
        ({"ranks": 2}, (2, 2),
         "error: NNODES × NPROC_PER_NODE is 2 × 1 here and 2 × 2 on the machine with NODE_RANK 1: make them equal\n"),
        ({"corpus": "nowhere"}, (2, 2),
         "error: data.corpus: nowhere has neither a val.bin nor a prepare.py to make one\n"),
        ({}, (0, 0), ""),
    ],
)  # fmt: skip
def test_all_wait_for_the_first_machine_and_a_mistake_is_said_there(here, changes, statuses, error):
    port = free_port()
    second = Machine(1, port, "exit 0", **{k: v for k, v in changes.items() if k == "ranks"})
    first = Machine(0, port, "exit 0", **{k: v for k, v in changes.items() if k != "ranks"})
    assert (first.wait(), second.wait()) == ((statuses[0], error), (statuses[1], ""))
