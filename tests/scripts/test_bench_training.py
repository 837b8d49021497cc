"""scripts/bench_training.py, as a user calls it."""

import json
import sys
from pathlib import Path

import pytest

from scripts import bench_training


@pytest.mark.slow
@pytest.mark.usefixtures("training_folder", "forked_workers")
def test_every_optimizer_is_a_row_with_its_share_of_the_step(monkeypatch):
    argv = ["bench_training.py", "config.yaml", "--optimizers", "--steps", "2", "--out", "found.json"]
    monkeypatch.setattr(sys, "argv", argv)
    bench_training.main()
    rows = json.loads(Path("found.json").read_text())["rows"]
    names = ("adamw", "sgd", "muon", "adamw_muon_embeddings")
    assert [row["config"] for row in rows] == [f"config, {name}" for name in names]
    assert all(0 < row["optimizer share"] < 1 and row["optimizer"] < row["ms"] for row in rows)
