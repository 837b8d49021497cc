"""The job for SLURM, with stand-ins for srun, scontrol and the training."""

import os
import subprocess

import pytest

from tests.helpers import ROOT

SRUN = """#!/bin/bash
export SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=node[1-2] status=0
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || status=$?; done
exit $status
"""
TRAINING = """#!/bin/bash
echo "node ${SLURM_NODEID:--} restarts ${MAX_RESTARTS:--}: $*" >>calls
[[ $* == *--print_config ]] && exit "${CONFIG_STATUS:-0}"
exit "${STATUS:-0}"
"""


@pytest.mark.parametrize(
    ("environment", "status", "requeued"),
    [
        ({}, 0, False),
        ({"CONFIG_STATUS": "2"}, 2, False),  # and nothing is started
        ({"STATUS": "2"}, 2, False),
        ({"STATUS": "1"}, 1, False),
        ({"STATUS": "138", "SLURM_RESTART_COUNT": "99"}, 138, True),  # the time was up
        ({"STATUS": "138", "SLURM_RESTART_COUNT": "100"}, 138, False),
        ({"STATUS": "75"}, 75, True),
        ({"STATUS": "75", "SLURM_RESTART_COUNT": "10"}, 75, False),
    ],
)
def test_the_job_starts_a_launcher_a_node_and_is_requeued_where_that_helps(environment, status, requeued, tmp_path):
    for name, text in (
        ("srun", SRUN),
        ("run_training.sh", TRAINING),
        ("scontrol", '#!/bin/sh\necho "scontrol $*" >>calls\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "HOME": "/"} | environment
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "configs/x.yaml", "--run.name", "a b"]
    done = subprocess.run(command, env=job, cwd="/", capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    first, *calls = (tmp_path / "calls").read_text().splitlines()
    assert first == "node - restarts -: configs/x.yaml --run.name a b --print_config"
    nodes = [] if "CONFIG_STATUS" in environment else [0, 1]
    expected = [f"node {node} restarts 3: configs/x.yaml --run.name a b" for node in nodes]
    assert calls == expected + ["scontrol requeue 7"] * requeued
    assert ("put into the queue again" in done.stdout) == requeued
