"""Curves that stay right over kills and resumes, in metrics.jsonl and in wandb."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.errors import UserError
from harness.tracking import Tracker, watched


def config(wandb: str = "disabled"):
    return SimpleNamespace(
        tracking=SimpleNamespace(wandb=wandb, project="offbyone", log_interval=1),
        run=SimpleNamespace(name="a run"),
        to_dict=lambda: {"run": {"name": "a run"}},
    )


def session(folder: Path, resume_step: int | None, steps, wandb: str = "disabled", close: bool = True) -> None:
    """A training process that logs `steps`; one that is killed does not close."""
    folder.mkdir(exist_ok=True)
    tracker = Tracker(folder, config(wandb), resume_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 10})
    if close:
        tracker.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(0, {"val/loss": 2.5, "val/perplexity": 12.0})
    assert lines(tmp_path) == [{"step": 0, "val/loss": 2.5, "val/perplexity": 12.0}]
    tracker.close()


def test_each_step_stands_there_once_after_any_number_of_resumes(tmp_path):
    session(tmp_path, None, range(0, 9), close=False)  # killed at 8, its checkpoint at 5
    session(tmp_path, 5, range(6, 8), close=False)  # killed at 7, before another checkpoint
    session(tmp_path, 5, range(6, 11))
    assert lines(tmp_path) == [{"step": step, "train/loss": step / 10} for step in range(11)]


def test_lines_that_are_missing_before_the_checkpoints_step_are_said(tmp_path, capsys):
    session(tmp_path, None, range(0, 9))
    session(tmp_path, 8, ())
    assert "warning" not in capsys.readouterr().out
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    session(tmp_path, 8, [9])
    assert "metrics.jsonl ends at step 3, the checkpoint is of step 8: lines are missing" in capsys.readouterr().out
    assert steps(tmp_path) == [0, 1, 2, 3, 9]


def test_a_run_that_starts_afresh_keeps_no_former_line(tmp_path):
    session(tmp_path, None, range(5))
    session(tmp_path, None, range(2))
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("rest", ['{"step": 6, "train/lo', "{", "\x00\x00\x00"])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, rest):
    session(tmp_path, None, range(6))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write(rest)
    session(tmp_path, 5, range(6, 8))
    assert steps(tmp_path) == list(range(8))


def flipped(line: bytes) -> bytes:
    return line.replace(b"step", b"s\xf4ep")


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda line: line.replace(b"}", b"]"),
        lambda line: line.replace(b"10", b"50", 1),  # a step out of order
        lambda line: line.replace(b"10", b"9", 1),  # a step twice
        lambda line: line.replace(b"\n", b"\r"),  # two lines in one
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"\n",
        lambda line: b"null\n",
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_refused_and_nothing_lost(tmp_path, damage):
    session(tmp_path, None, range(66))
    path = tmp_path / "metrics.jsonl"
    written = path.read_bytes().splitlines(keepends=True)
    written[10] = damage(written[10])
    path.write_bytes(b"".join(written))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1[12] is not what was written .* remove it") as caught:
        session(tmp_path, 65, [])
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"".join(written)
    session(tmp_path, 9, range(10, 12))  # of no account to a resume from before it
    assert steps(tmp_path) == list(range(12))


def test_sync_returns_once_the_lines_are_on_the_disk(tmp_path, monkeypatch):
    flushed = []
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(0, {"train/loss": 1.0})
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(os.pread(descriptor, 10**6, 0)))
    tracker.sync()
    assert flushed == [(tmp_path / "metrics.jsonl").read_bytes()]
    assert steps(tmp_path) == [0]


class Disk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, capsys):
    tracker = Tracker(tmp_path, config(), None)
    tracker._file = Disk(tracker._file, 100)
    for step in range(10):
        tracker.log(step, {"train/loss": step / 10})
    assert capsys.readouterr().out.count("warning: ") == 1
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        tracker.sync()
    tracker._file.room = 10**6
    tracker.log(10, {"train/loss": 1.0})
    tracker.close()
    assert lines(tmp_path) == [{"step": step, "train/loss": step / 10} for step in range(11)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(3, {"train/loss": value, "train/lr": 0.1})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text  # which Python reads back, and no other JSON reader does
    assert "Infinity" not in text
    assert lines(tmp_path) == [{"step": 3, "train/loss": None, "train/lr": 0.1}]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_evaluation_shows_how_far_it_is(monkeypatch, capsys, terminal):
    clock = iter(range(0, 1000, 4))  # 4 seconds a batch
    monkeypatch.setattr("harness.tracking.perf_counter", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert list(watched(list("abcdefg"), "evaluating")) == list("abcdefg")
    shown = capsys.readouterr()
    lines = [f"evaluating: {done} of 7 batches" for done in (2, 5)]
    assert shown.out.splitlines() == ([] if terminal else lines)
    assert ("evaluating" in shown.err) == terminal  # a bar
    assert list(watched(range(7), "evaluating", shown=False)) == list(range(7))
    assert capsys.readouterr() == ("", "")
