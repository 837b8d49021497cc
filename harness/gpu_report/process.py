"""A section in a process of its own, which a crash or a time limit ends without ending the report."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.files import write_text

ROOT = Path(__file__).resolve().parents[2]


def run_section(name: str, options: dict, limit: float, work: Path) -> dict:
    """The section's entry in the report; `limit` in seconds. Everything it started ends with it."""
    if limit <= 0:
        return {"section": name, "seconds": 0.0, "error": "not started: no time was left", "rows": []}
    log, rows, options_file = (work / f"{name}.{suffix}" for suffix in ("log", "jsonl", "options.json"))
    rows.unlink(missing_ok=True)
    write_text(options_file, json.dumps(options | {"seconds": limit}))
    start, status = time.monotonic(), None
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.gpu_report", name, options_file.resolve(), rows.resolve()],
            stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")] if rows.exists() else []
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
    error = None if status == 0 else f"{outcome(status, limit)}\n{last}".rstrip()
    return {"section": name, "seconds": time.monotonic() - start, "error": error, "rows": found}


def outcome(status: int | None, limit: float) -> str:
    """How a section ended that did not end well: `status` as Popen's, None at its time limit in seconds."""
    if status is None:
        return f"stopped at its limit of {limit:.0f} s"
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
