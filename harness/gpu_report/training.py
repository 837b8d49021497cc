"""(e) softmax and softmax1 at 124M, trained at the same time for the minutes left, then both diagnosed.

Each is train.py in a process of its own, and the card is shared: the losses are what counts here, not the speed. As
many steps as the speed of section (d) lets hope for; outliers and quantization by the diagnostics' own scripts.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.gpu_report import Section, Table, Task
from harness.gpu_report.steps import CONFIG, corpus_of, overrides

NORMALIZERS = ("softmax", "softmax1")
CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte", "val_full/loss", "val_full/bits_per_byte")
DIAGNOSTICS = {
    "activation_kurtosis": ["--batches", "2", "--batch-size", "4"],
    "quantization": ["--batches", "2", "--batch-size", "4", "--seeds", "1"],
}
AROUND = 120.0  # seconds besides training: starting, compiling, evaluating, diagnosing


def run(task: Task) -> Iterator[dict]:
    steps = 4 if task.cpu else planned_steps(task)
    out = Path(task.folder)
    commands = {normalizer: command(task, normalizer, steps, out) for normalizer in NORMALIZERS}
    for normalizer in NORMALIZERS:
        shutil.rmtree(out / f"124m_{normalizer}", ignore_errors=True)
    yield {"what": "command", "value": " ".join(["python", *commands["softmax"][1:]])}
    if corpus_of(task) != task.corpus:
        yield {"what": "note", "value": f"{task.corpus} is not prepared: trained on {corpus_of(task)}"}
    together(commands.values())
    for normalizer in NORMALIZERS:
        lines = [json.loads(line) for line in (out / f"124m_{normalizer}" / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            kept = {name: line[name] for name in CURVES if name in line}
            yield {"what": "curve", "normalizer": normalizer, "step": line["step"]} | kept
    where = ["--device", "cpu"] if task.cpu else []
    checkpoints = [str(out / f"124m_{normalizer}" / "ckpt.pt") for normalizer in NORMALIZERS]
    together(
        [sys.executable, f"scripts/{script}.py", checkpoint, *arguments, *where]
        for checkpoint in checkpoints
        for script, arguments in DIAGNOSTICS.items()
    )
    for normalizer in NORMALIZERS:
        for script in DIAGNOSTICS:
            path = out / f"124m_{normalizer}" / "diagnostics" / f"{script}.json"
            summary = json.loads(path.read_text())["summary"]
            yield {"what": "summary", "normalizer": normalizer, "script": script, "summary": summary}


def planned_steps(task: Task) -> int:
    """As many as fit into the time left, both trainings together."""
    ms = {row["variant"]: row["ms"] for row in task.rows("steps") if "ms" in row}
    missing = [name for name in map("{}/full".format, NORMALIZERS) if name not in ms]
    if missing:
        raise RuntimeError(f"section steps, which tells how fast training is, has no {' and no '.join(missing)}")
    steps = int((task.seconds_left - AROUND) / sum(ms[f"{normalizer}/full"] / 1e3 for normalizer in NORMALIZERS))
    if steps < 20:
        raise RuntimeError(f"{task.seconds_left:.0f} seconds are left: too few for {AROUND:.0f} around the training")
    return steps


def command(task: Task, normalizer: str, steps: int, out: Path) -> list[str]:
    changed = {
        "model.normalizer": normalizer,
        "run.name": f"124m_{normalizer}",
        "run.out_dir": out,
        "training.max_steps": steps,
        "training.resume": "never",
        "training.overwrite": "true",
        "training.checkpoint_interval": steps,
        "optimizer.warmup_steps": max(1, steps // 10),
        "optimizer.decay_steps": steps,
        "evaluation.interval": steps,
        "evaluation.batches": 2,
        "tracking.log_interval": max(1, steps // 20),
    }
    return [sys.executable, "train.py", CONFIG, *overrides(task, **changed)]


def together(commands: Iterable[list[str]]) -> None:
    """Run them at the same time; RuntimeError, with the last lines that it printed, for the first that fails."""
    commands = list(commands)
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    printed = [process.communicate()[0] for process in running]
    for command, process, text in zip(commands, running, printed, strict=True):
        print(text, flush=True)
        if process.returncode:
            last = "\n".join(text.splitlines()[-8:])
            raise RuntimeError(f"{' '.join(command[1:3])} ended with status {process.returncode}:\n{last}")


def present(rows: list[dict]) -> list[Table]:
    lines: dict[int, dict[str, str]] = {}
    values: dict[tuple[str, str], dict] = {}
    for row in rows:
        if row["what"] == "curve" and "val/loss" in row:
            line = lines.setdefault(row["step"], {"step": str(row["step"])})
            line |= {f"{row['normalizer']}, {k}": f"{row[k]:.4f}" for k in CURVES if k.startswith("val") and k in row}
        if row["what"] == "summary":
            for name, value in row["summary"].items():
                shown = "–" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
                values.setdefault((row["script"], name), {"value": f"{row['script']}: {name}"})[row["normalizer"]] = (
                    shown
                )
    notes = "".join(f". {row['value']}" for row in rows if row["what"] == "note")
    tables = [Table(f"`{rows[0]['value']}`, and the same for softmax1{notes}", list(lines.values()))]
    return tables + ([Table("On both checkpoints", list(values.values()))] if values else [])


SECTION = Section("124M, softmax and softmax1, trained", 8.0, run, present)
