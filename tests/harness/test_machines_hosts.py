"""Two hosts, each with a network of its own, that train: a cable is cut, a host dies, the run continues."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.distributed import LOST
from tests.helpers import ROOT
from tests.processes import TrainingRun, assert_same_run, finished_on_ranks


class Hosts:
    """Two network namespaces with a cable between them, a rank on each."""

    def __init__(self, config: Path):
        self.names, self.config = [f"obo{os.getpid()}{side}" for side in "ab"], config
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.names[0], "type", "veth", "peer", "name", self.names[1])
        for i, name in enumerate(self.names):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", name, state)

    def start(self, host: int, *arguments: str, **environment: str) -> subprocess.Popen:
        there = {"NNODES": "2", "NODE_RANK": str(host), "MASTER_ADDR": "10.77.0.1", "NPROC_PER_NODE": "1"}
        there |= {
            "RANK_TIMEOUT": "3",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
        } | environment
        folder = self.config.parent
        options = ("--data.corpus", str(folder / "corpus"), "--run.out_dir", str(folder / "out"), "--run.name", "two")
        command = (sys.executable, "-m", "harness.launch", str(ROOT), str(self.config), *options, *arguments)
        with open(folder / f"host{host}.log", "w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command], cwd=ROOT, env=os.environ | there,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def kill(self, host: int) -> None:
        """Every process at once, as a machine that loses its power; but its network says that they are gone."""
        for pid in ip("netns", "pids", self.names[host]).split():
            os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        for i, name in enumerate(self.names):
            self.kill(i)
            ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts(training_folder):
    if not shutil.which("ip"):
        pytest.skip("needs the command ip (iproute2), to make hosts of network namespaces")
    try:
        made = Hosts(Path("config.yaml").resolve())
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield made
    made.remove()


STEPS = ("--training.max_steps", "300", "--training.checkpoint_interval", "50", "--tracking.log_interval", "10")
STEPS += ("--evaluation.interval", "100")


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or f'"step": {step},' not in (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, Path("host0.log").read_text()
        time.sleep(0.02)


def lines_after_the_last_step(host: int) -> list[str]:
    lines = Path(f"host{host}.log").read_text().splitlines()
    return lines[max((i + 1 for i, line in enumerate(lines) if line.startswith("step ")), default=0) :]


@pytest.mark.faults
def test_hosts_whose_cable_is_cut_end_in_a_line_and_the_same_commands_continue(hosts):
    uninterrupted = finished_on_ranks(2, "whole", *STEPS)
    both = [hosts.start(host, *STEPS) for host in (0, 1)]
    wait_for_step(Path("out/two"), 70)
    hosts.cable("down")
    start = time.monotonic()
    assert [host.wait(60) for host in both] == [LOST, LOST]
    print(f"a cut cable: both ended after {time.monotonic() - start:.1f} s")
    for host, reason in ((0, "rank 1 on "), (1, "10.77.0.1, where the ranks meet, has not answered for 3 s")):
        (line,) = lines_after_the_last_step(host)
        assert line.startswith(f"error: {reason}")
    hosts.cable("up")
    both = [hosts.start(host, *STEPS) for host in (0, 1)]
    assert [host.wait(120) for host in both] == [0, 0], Path("host0.log").read_text()
    assert_same_run(TrainingRun.read("two"), uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("dying", [0, 1])
def test_a_host_that_dies_is_waited_for_and_the_run_continues(dying, hosts):
    uninterrupted = finished_on_ranks(2, "whole", *STEPS)
    both = [hosts.start(host, *STEPS, MAX_RESTARTS="1") for host in (0, 1)]
    wait_for_step(Path("out/two"), 70)
    hosts.kill(dying)
    time.sleep(1)
    both[dying] = hosts.start(dying, *STEPS, MAX_RESTARTS="1")
    assert [host.wait(120) for host in both] == [0, 0], Path("host0.log").read_text()
    said = [line for line in Path(f"host{1 - dying}.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert_same_run(TrainingRun.read("two"), uninterrupted)
