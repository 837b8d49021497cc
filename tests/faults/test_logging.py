"""Logging never takes a run down: whatever happens to the real wandb is a warning, and metrics.jsonl is complete."""

import json
import re
import subprocess
import sys

import pytest
import wandb

from harness.tracking import known_id, stored_steps
from tests.helpers import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# In a process of its own: wandb keeps its service, and what it has ended with, for the whole process.
RUN = """
import os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

silent = set()  # words of requests that get no answer


class Server(BaseHTTPRequestHandler):
    # As much of wandb's as it takes to log in and to start a run.
    def do_POST(self):
        request = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        while any(word in request + self.path for word in silent):
            time.sleep(1)
        bucket = '{"id": "1", "name": "abcd", "displayName": "a", "config": "{}", "historyLineCount": 0,'
        bucket += '"project": {"id": "2", "name": "offbyone", "entity": {"id": "3", "name": "me"}}}'
        viewer = '{"id": "4", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}'
        data = f'{{"viewer": {viewer}, "upsertBucket": {{"inserted": true, "bucket": {bucket}}}}}'
        answer = f'{{"data": {data}}}'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}", "WANDB_API_KEY": "a" * 40}
fault, folder, resume_step, first, last = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
os.environ["WANDB_MODE"] = "offline" if fault in ("none", "disk") else ""
silent |= {"no login": {"viewer"}, "no start": {"psertBucket"}}.get(fault, set())

from harness.config import Config, TrackingConfig
from harness.tracking import Tracker


def service(number):
    for pid in subprocess.check_output(["pgrep", "-P", str(os.getpid()), "wandb-core"], text=True).split():
        os.kill(int(pid), number)


if fault == "no server":
    server.shutdown()
    server.server_close()
begun = time.monotonic()
tracker = Tracker(folder, Config(tracking=TrackingConfig(wandb="auto")), resume_step if resume_step >= 0 else None)
print("started after", time.monotonic() - begun)
for step in range(first, last):
    if step == 50 and fault == "silence":
        silent.add("")
    if step == 50 and fault == "killed":
        service(signal.SIGKILL)
    tracker.log(step, {"train/loss": step / 10, "x" * 200: 1.0})
    tracker.sync()
tracker.close()
print("closed after", time.monotonic() - begun)
"""


def run(fault: str, folder, resume_step: int, first: int, last: int) -> str:
    """What a run prints that logs the steps from `first` up to `last`."""
    words = [sys.executable, "-c", RUN, fault, folder, resume_step, first, last]
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stdout


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "said", "seconds"),
    [
        ("no server", "wandb: offline (cannot go online: ", 120),
        ("no login", "wandb: offline (cannot go online: ", 120),
        ("no start", "wandb: offline (cannot go online: Timed out initializing run", 120),
        ("silence", "wandb: stopped: Timed out finishing run", 240),
        ("killed", "wandb: stopped: ", 120),
    ],
)
def test_a_server_or_service_that_fails_is_said_once_and_a_resume_has_every_step_once(tmp_path, fault, said, seconds):
    output = run(fault, tmp_path, -1, 0, 100)
    assert output.count(said) == 1, output
    assert steps(tmp_path) == [*range(100)]
    assert float(output.rpartition("closed after ")[2]) < seconds
    run("none", tmp_path, 79, 80, 120)
    assert steps(tmp_path) == [*range(120)]
    wandb.teardown()
    assert stored_steps(tmp_path, known_id(tmp_path)) >= set(range(80, 120))


def test_wandbs_full_disk_is_said_and_a_resume_sends_what_it_lacks(tmp_path):
    disk = tmp_path / "wandb"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        output = run("disk", tmp_path, -1, 0, 3000)
        # Whether wandb's own files stumble over it, or only its service, which says nothing
        assert re.search(r"wandb: .*(No space left on device|steps, its disk may be full)", output), output
        assert steps(tmp_path) == [*range(3000)]
        assert len(stored_steps(tmp_path, known_id(tmp_path))) < 3000
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert "No space" not in run("disk", tmp_path, 2999, 3000, 3010)
        assert stored_steps(tmp_path, known_id(tmp_path)) == set(range(3010))
        assert steps(tmp_path) == [*range(3010)]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
