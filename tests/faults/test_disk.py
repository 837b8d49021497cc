"""Disks that are full or read-only, outputs that nobody reads, and limits: one line, and nothing of the run is lost."""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TRAINING
from tests.helpers import squares_corpus
from tests.processes import TrainingRun, assert_same_run, finished, killed

pytestmark = pytest.mark.usefixtures("training_folder")
LONG = ("--training.max_steps", "100000", "--training.checkpoint_interval", "100000", "--evaluation.interval", "100000")


def mount(*arguments) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def out():
    """The folder of runs, for a file system of its own to be mounted there."""
    folder = Path("out").absolute()
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> TrainingRun:
    """A run that meets no fault."""
    with contextlib.chdir(tmp_path_factory.mktemp("undisturbed")):
        Path("config.yaml").write_text(TRAINING)
        squares_corpus()
        run = finished("run")
        run.folder = run.folder.absolute()
    return run


def the_line(run: TrainingRun, status: int = 2) -> str:
    """The one line that the run's end is explained by."""
    assert run.wait() == status, run.output()
    (line,) = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in run.output()
    return line


def test_a_disk_that_fills_up_costs_no_more_than_the_steps_since_the_last_checkpoint(out, undisturbed):
    mount("-t", "tmpfs", "-o", "size=900k", "tmpfs", out)  # two checkpoints with their optimizer's state are too many
    line = the_line(TrainingRun("run"))
    assert line.startswith("error: cannot write out/run/ckpt.pt at step 6: [Errno 28] No space left on device")
    assert not [*out.rglob("*.tmp")]
    mount("-o", "remount,size=8m", out)
    resumed = finished("run")
    assert "resuming out/run from step 5" in resumed.output()
    assert_same_run(resumed, undisturbed)


def test_a_run_that_cannot_resume_on_a_full_disk_leaves_what_is_there(out, undisturbed):
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", out)
    killed("run", at=7)
    before = (out / "run" / "ckpt.pt").read_bytes()
    with contextlib.suppress(OSError), open(out / "filled", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    line = the_line(TrainingRun("run"))
    assert "No space left on device" in line
    assert (out / "run" / "ckpt.pt").read_bytes() == before
    (out / "filled").unlink()
    assert_same_run(finished("run"), undisturbed)


def test_a_folder_that_can_only_be_read_is_said_before_anything_is_done(out):
    finished("run", "--training.max_steps", "5")
    content = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    mount("--bind", out, out)
    mount("-o", "remount,bind,ro", out)
    for name in ("run", "another"):
        line = the_line(TrainingRun(name))
        assert f"cannot write to the run's folder out/{name}: Read-only file system" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == content
    evaluated = finished("run", "--evaluation.only", "true")
    assert "the whole validation set" in evaluated.output()


def test_descriptors_and_file_sizes_that_run_out_leave_the_former_checkpoint():
    for limit, number, said in (
        (resource.RLIMIT_NOFILE, 3, "Too many open files"),
        (resource.RLIMIT_FSIZE, 100_000, "File too large"),
    ):
        run = TrainingRun(f"run{limit}", *LONG[:2], "--training.checkpoint_interval", "50", *LONG[4:])
        run.wait_for_step(5)
        resource.prlimit(run.process.pid, limit, (number, number))
        line = the_line(run)
        assert said in line
        step = run.checkpoint()["step"]
        assert step % 50 == 0
        assert [line["step"] for line in run.metrics()][: step + 1] == [*range(step + 1)]
        assert not [*run.folder.rglob("*.tmp")]


def test_memory_that_runs_out_says_what_takes_less():
    run = TrainingRun("run", "--model.n_embd", "8192")  # some 6 GB of weights
    status = Path(f"/proc/{run.process.pid}/statm").read_text().split()
    size = int(status[0]) * os.sysconf("SC_PAGESIZE")
    resource.prlimit(run.process.pid, resource.RLIMIT_AS, (size + 2**29, size + 2**29))
    line = the_line(run)
    assert line.startswith("error: out of memory, ")
    assert "training.micro_batch_size from 8 to 4" in line


def test_an_output_on_a_full_disk_is_dropped_and_the_run_goes_on(undisturbed):
    Path("run.log").symlink_to("/dev/full")
    run = TrainingRun("run")
    assert run.wait() == 0
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("sent", [None, signal.SIGINT])
def test_a_run_whose_output_nobody_reads_any_more_saves_first(sent):
    """As in `| head`; and in `| tee log` where a Ctrl-C ends tee too."""
    os.mkfifo("run.log")
    run = TrainingRun("run", *LONG)
    with open("run.log") as reader:
        said = "".join(itertools.takewhile(lambda line: not line.startswith("step 3/"), reader))
        assert "step 2/" in said, said
        if sent:
            os.kill(run.process.pid, sent)
    assert run.wait() in ((128 + signal.SIGHUP,) if sent is None else (128 + signal.SIGHUP, 128 + sent))
    step = run.checkpoint()["step"]
    assert 3 <= step < 100_000
    assert [line["step"] for line in run.metrics()] == [*range(step + 1)]
