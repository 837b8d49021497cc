"""(g) Softmax and what is said to keep sinks and outliers away, at 124M, trained at the same time and then diagnosed.

Each is train.py in a process of its own, and the card is shared: the losses are what counts here, not the speed. Beside
them nanoGPT's loop takes the same steps from the same weights, whose curve softmax's should be. As many steps as the
speed of section (d) lets hope for; outliers and quantization by the diagnostics' own scripts.
"""

import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from harness.config_files import load_config
from harness.gpu_report import Section, Table, Task, finished, with_error
from harness.gpu_report.steps import BASELINE, CONFIG, corpus_of, overrides
from harness.stepping import Stepper
from harness.workers import Worker

VARIANTS = {
    "softmax": {},
    "softmax1": {"model.normalizer": "softmax1"},
    "sink": {"model.normalizer": "sink"},
    "gate": {"model.gate": "head"},
}
CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte", "val_full/loss", "val_full/bits_per_byte")
DIAGNOSTICS = {
    "activation_kurtosis": ["--batches", "2", "--batch-size", "4"],
    "quantization": ["--batches", "2", "--batch-size", "4", "--seeds", "1"],
}
AROUND = 130.0  # seconds besides training: starting, compiling, evaluating, diagnosing
STEP_MS = 150.0  # of a step where section (d) has not told it: an H100's takes 140
APART = 0.02
"""In nats a token, the most by which the mean of softmax's curve over the last quarter of the steps may lie beside that
of nanoGPT's loop. Two roundings of one small model on a CPU, float32 and bfloat16, were 0.008 apart after 240 steps,
and 0.13 in a single one."""


def run(task: Task) -> Iterator[dict]:
    """The rows of each variant as soon as it is trained and diagnosed."""
    steps = 4 if task.cpu else planned_steps(task)
    variants = ["softmax", "gate"] if task.cpu else list(VARIANTS)
    yield {"what": "command", "value": " ".join(["python", *command(task, "softmax", steps)[1:]])}
    if corpus_of(task) != task.corpus:
        yield {"what": "note", "value": f"{task.corpus} is not prepared: trained on {corpus_of(task)}"}
    jobs = {BASELINE: functools.partial(baseline, task, steps)}
    jobs |= {name: functools.partial(variant, task, name, steps) for name in variants}
    curves: dict[str, dict[int, float]] = {}
    one_by_one = (row for job in jobs.values() for row in job())
    for row in one_by_one if task.cpu else finished("variant", jobs, ThreadPoolExecutor(len(jobs))):
        yield {"what": "failure"} | row
        if "train/loss" in row:
            curves.setdefault(row["variant"], {})[row["step"]] = row["train/loss"]
    yield {"what": "apart"} | apart(curves.get("softmax", {}), curves.get(BASELINE, {}))


def baseline(task: Task, steps: int) -> list[dict]:
    """The curve of nanoGPT's loop."""
    worker = Worker(Stepper, load_config(command(task, "softmax", steps)[2:]), True)
    losses = worker.ask("losses", steps)
    worker.stop()
    return [
        {"what": "curve", "variant": BASELINE, "step": step, "train/loss": loss}
        for step, loss in enumerate(losses, start=1)
        if math.isfinite(loss)
    ]


def variant(task: Task, name: str, steps: int) -> list[dict]:
    """Train, diagnose, and give the curve and the summaries."""
    folder = Path(task.folder) / f"124m_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    together([command(task, name, steps)])
    where = ["--device", "cpu"] if task.cpu else []
    scripts = {script: folder / "diagnostics" / f"{script}.json" for script in DIAGNOSTICS}
    together(
        [sys.executable, f"scripts/{script}.py", str(folder / "ckpt.pt"), *arguments, *where]
        for script, arguments in DIAGNOSTICS.items()
    )
    rows = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        kept = {key: line[key] for key in ("step", *CURVES) if key in line}
        rows.append({"what": "curve", "variant": name} | kept)
    for script, path in scripts.items():
        summary = json.loads(path.read_text())["summary"]
        rows.append({"what": "summary", "variant": name, "script": script, "summary": summary})
    return rows


def planned_steps(task: Task) -> int:
    """As many as fit into the time left, all trainings together."""
    ms = {row["variant"]: row["ms"] for row in task.rows("steps") if "ms" in row}
    each = ms.get("softmax1/full", STEP_MS)
    seconds = (ms.get(BASELINE, each) + len(VARIANTS) * each) / 1e3
    steps = int((task.seconds_left - AROUND) / seconds)
    if steps < 20:
        raise RuntimeError(f"{task.seconds_left:.0f} seconds are left: too few for {AROUND:.0f} around the training")
    return steps


def apart(ours: dict[int, float], theirs: dict[int, float]) -> dict:
    """By how much the first curve, a loss for each step, lies above the other: the mean over the last quarter of their
    common steps, its standard error, and the largest distance of all; and the verdict."""
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2 or max(ours) > max(theirs):
        return {"steps": len(common), "verdict": "WRONG", "note": "no two curves, or an infinite loss"}
    differences = [ours[step] - theirs[step] for step in common]
    last = torch.tensor(differences[-max(2, len(common) // 4) :], dtype=torch.float64)
    row = {"mean": last.mean().item(), "error": (last.std() / len(last) ** 0.5).item()}
    row |= {"largest": max(map(abs, differences)), "steps": len(common)}
    return row | {"verdict": "ok" if abs(row["mean"]) <= APART else "WRONG"}


def command(task: Task, variant: str, steps: int) -> list[str]:
    changed = VARIANTS[variant] | {
        "run.name": f"124m_{variant}",
        "run.out_dir": task.folder,
        "training.max_steps": steps,
        "training.resume": "never",
        "training.overwrite": "true",
        "training.checkpoint_interval": steps,
        "optimizer.warmup_steps": max(1, steps // 10),
        "optimizer.decay_steps": steps,
        "evaluation.interval": steps,
        "evaluation.batches": 2,
        "tracking.log_interval": max(1, steps // 50),
    }
    return [sys.executable, "train.py", CONFIG, *overrides(task, **changed)]


def together(commands: Iterable[list[str]]) -> None:
    """Run them at the same time; RuntimeError, with the last lines that it printed, for the first that fails."""
    commands = list(commands)
    with ThreadPoolExecutor(len(commands)) as pool:
        run_one = functools.partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ended = list(pool.map(run_one, commands))
    for command, process in zip(commands, ended, strict=True):
        print(process.stdout, flush=True)
        if process.returncode:
            last = "\n".join(process.stdout.splitlines()[-8:])
            raise RuntimeError(f"{' '.join(command[1:3])} ended with status {process.returncode}:\n{last}")


def present(rows: list[dict]) -> list[Table]:
    lines: dict[tuple[int, str], dict] = {}
    values: dict[tuple[str, str], dict] = {}
    for row in rows:
        if row["what"] == "curve" and "val/loss" in row:
            for name in (name for name in CURVES if name.startswith("val") and name in row):
                line = lines.setdefault((row["step"], name), {"step": str(row["step"]), "metric": name})
                line[row["variant"]] = f"{row[name]:.4f}"
        if row["what"] == "summary":
            for name, value in row["summary"].items():
                line = values.setdefault((row["script"], name), {"value": f"{row['script']}: {name}"})
                line[row["variant"]] = value
    notes = "".join(f". {row['value']}" for row in rows if row["what"] == "note")
    tables = [Table(f"`{rows[0]['value']}`, and so with {', '.join(list(VARIANTS)[1:])}{notes}", [*lines.values()])]
    if failures := [row for row in rows if "verdict" in row and "note" in row]:
        tables.append(
            Table("What failed", [{k: row.get(k) for k in ("variant", "note", "verdict")} for row in failures])
        )
    for row in (row for row in rows if "mean" in row):
        what = {"the training loss of softmax less that of nanoGPT's loop, nats a token": f"{row['steps']} steps"}
        what |= {"mean over the last quarter": with_error(row["mean"], row["error"], 4)}
        tables.append(Table("", [what | {"largest": f"{row['largest']:.4f}", "verdict": row["verdict"]}]))
    return tables + ([Table("On the checkpoints", [*values.values()])] if values else [])


SECTION = Section("124M, trained: softmax, softmax1, a sink and a gate", 8.0, run, present)
