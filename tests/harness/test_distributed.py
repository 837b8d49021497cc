"""One process on its own, and two that torchrun started, say the same; and end together, in one voice."""

import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from harness.distributed import LOST, Ranks, answer, join_ranks
from tests.helpers import ROOT, TrainingRun, run_on_two_ranks

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

    def start(*arguments: str, **environment: str) -> list[TrainingRun]:
        there = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        there |= {"WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment
        ranks.extend(TrainingRun("two", *arguments, RANK=rank, LOCAL_RANK=rank, **there) for rank in "01")
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
    assert answer(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        answer(lambda: 1 / 0)
    with pytest.raises(dist.DistError, match="no answer within"):
        answer(lambda: time.sleep(1), 0.01)
