"""One process on its own, and two that torchrun started, say the same."""

import json

import pytest
import torch

from harness.distributed import Ranks, join_ranks
from tests.helpers import ROOT, run_on_two_ranks

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
