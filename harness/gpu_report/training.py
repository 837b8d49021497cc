"""(g) Softmax and what is said to keep sinks and outliers away, at 124M, trained at the same time and then diagnosed.

Each is train.py in a process of its own, and the card is shared: the losses are what counts here, not the speed. Beside
them nanoGPT's loop takes the same steps from the same weights, whose curve softmax's should be. As many steps as the
speed of section (d) lets hope for; outliers and quantization by the diagnostics' own scripts.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from harness.config_files import load_config
from harness.gpu_report import Section, Table, Task, with_error
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
APART = 0.02
"""In nats a token, the most by which the mean of softmax's curve over the last quarter of the steps may lie beside that
of nanoGPT's loop. Two roundings of one small model on a CPU, float32 and bfloat16, were 0.008 apart after 240 steps,
and 0.13 in a single one."""


def run(task: Task) -> Iterator[dict]:
    steps = 4 if task.cpu else planned_steps(task)
    out, variants = Path(task.folder), ["softmax", "gate"] if task.cpu else list(VARIANTS)
    commands = {variant: command(task, variant, steps, out) for variant in variants}
    for variant in variants:
        shutil.rmtree(out / f"124m_{variant}", ignore_errors=True)
    yield {"what": "command", "value": " ".join(["python", *commands["softmax"][1:]])}
    if corpus_of(task) != task.corpus:
        yield {"what": "note", "value": f"{task.corpus} is not prepared: trained on {corpus_of(task)}"}
    nanogpt = Worker(Stepper, load_config(commands["softmax"][2:]), True)
    nanogpt.start("losses", steps)
    together(commands.values())
    losses = {BASELINE: dict(enumerate(nanogpt.result(), start=1))}
    nanogpt.stop()
    for variant in variants:
        lines = [json.loads(line) for line in (out / f"124m_{variant}" / "metrics.jsonl").read_text().splitlines()]
        losses[variant] = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
        for line in lines:
            kept = {name: line[name] for name in CURVES if name in line}
            yield {"what": "curve", "variant": variant, "step": line["step"]} | kept
    for step, loss in losses[BASELINE].items():
        yield {"what": "curve", "variant": BASELINE, "step": step, "train/loss": loss}
    yield {"what": "apart"} | apart(losses["softmax"], losses[BASELINE])
    where = ["--device", "cpu"] if task.cpu else []
    together(
        [sys.executable, f"scripts/{script}.py", str(out / f"124m_{variant}" / "ckpt.pt"), *arguments, *where]
        for variant in variants
        for script, arguments in DIAGNOSTICS.items()
    )
    for variant in variants:
        for script in DIAGNOSTICS:
            path = out / f"124m_{variant}" / "diagnostics" / f"{script}.json"
            summary = json.loads(path.read_text())["summary"]
            yield {"what": "summary", "variant": variant, "script": script, "summary": summary}


def planned_steps(task: Task) -> int:
    """As many as fit into the time left, all trainings together."""
    ms = {row["variant"]: row["ms"] for row in task.rows("steps") if "ms" in row}
    if missing := [name for name in (BASELINE, "softmax1/full") if name not in ms]:
        raise RuntimeError(f"section steps, which tells how fast training is, has no {' and no '.join(missing)}")
    seconds = (ms[BASELINE] + len(VARIANTS) * ms["softmax1/full"]) / 1e3
    steps = int((task.seconds_left - AROUND) / seconds)
    if steps < 20:
        raise RuntimeError(f"{task.seconds_left:.0f} seconds are left: too few for {AROUND:.0f} around the training")
    return steps


def apart(ours: dict[int, float], theirs: dict[int, float]) -> dict:
    """By how much the first curve, a loss for each step, lies above the other: the mean over the last quarter of their
    common steps, its standard error, and the largest distance of all; and the verdict."""
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[step] - theirs[step] for step in common]
    last = torch.tensor(differences[-max(2, len(common) // 4) :], dtype=torch.float64)
    row = {"mean": last.mean().item(), "error": (last.std() / len(last) ** 0.5).item()}
    row |= {"largest": max(map(abs, differences)), "steps": len(common)}
    return row | {"verdict": "ok" if abs(row["mean"]) <= APART else "WRONG"}


def command(task: Task, variant: str, steps: int, out: Path) -> list[str]:
    changed = VARIANTS[variant] | {
        "run.name": f"124m_{variant}",
        "run.out_dir": out,
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
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    printed = [process.communicate()[0] for process in running]
    for command, process, text in zip(commands, running, printed, strict=True):
        print(text, flush=True)
        if process.returncode:
            last = "\n".join(text.splitlines()[-8:])
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
    for row in (row for row in rows if row["what"] == "apart"):
        what = {"the training loss of softmax less that of nanoGPT's loop, nats a token": f"{row['steps']} steps"}
        what |= {"mean over the last quarter": with_error(row["mean"], row["error"], 4)}
        tables.append(Table("", [what | {"largest": f"{row['largest']:.4f}", "verdict": row["verdict"]}]))
    return tables + ([Table("On the checkpoints", [*values.values()])] if values else [])


SECTION = Section("124M, trained: softmax, softmax1, a sink and a gate", 8.0, run, present)
