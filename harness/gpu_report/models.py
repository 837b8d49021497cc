"""(f) Small models on the card, their losses beside those on the CPU, in float32; and runs of train.py that stop there
and go on.

The first is what attention alone does not show: every part of the model, the loss by chunks, feedback, optimizers. The
variants take their steps by SGD, whose updates are in proportion to the gradient. AdamW's first ones are nearly its
sign, which rounding turns over where a gradient is near 0.
"""

import contextlib
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from harness.config_files import load_config
from harness.corpus_writing import cpu_count
from harness.gpu_report import Section, Table, Task, steps, training
from harness.stepping import Stepper
from kernels.backends import use_backend
from model import NORMALIZERS

CONFIG = "configs/stdlib_softmax.yaml"
SMALL: dict[str, Any] = {
    "model.n_layer": 2, "model.n_head": 4, "model.n_embd": 128, "model.block_size": 128, "training.batch_size": 8,
    "training.micro_batch_size": 4, "tracking.wandb": "disabled", "optimizer.warmup_steps": 0,
}  # fmt: skip
STEPS = 4
MODERN: dict[str, Any] = {
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.mlp": "swiglu",
    "model.n_kv_head": 2,
}
OLDER = {"model.parallel_residual": True, "model.bias": True, "model.tie_embeddings": False, "model.activation": "gelu"}
MODELS: dict[str, dict] = {
    **{normalizer: {"model.normalizer": normalizer} for normalizer in NORMALIZERS},
    **{f"softmax, {backward}": {"model.backward": backward} for backward in ("diagonal", "detached", "ste")},
    **{f"a gate by {gate}": {"model.gate": gate} for gate in ("head", "element")},
    "rope, rmsnorm, swiglu, grouped keys, normed queries": MODERN | {"model.qk_norm": True},
    "parallel residual, biases, embeddings not tied, exact gelu": OLDER,
    "activations computed again": {"training.checkpoint_activations": True},
    **{f"feedback {name}": {"training.feedback": name} for name in ("fa", "sign_symmetric", "dfa")},
}
OPTIMIZERS = {"adamw": 1e-4, "muon": 1e-3, "adamw_muon_embeddings": 1e-3}
"""the error that is allowed: Muon's iterations are in bfloat16"""
ALLOWED = 1e-5
"""of losses that are means of some thousand numbers, each good to some 1e-7, after steps in proportion to gradients"""
STOPPED_AT, ENDS_AT = 6, 12


def cases(cpu: bool) -> dict[str, tuple[dict, float]]:
    """By name what is changed of the small model, and the error that is allowed; two of them for the dry run."""
    sgd = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.min_lr": 0.1}
    found = {name: (sgd | changed, ALLOWED) for name, changed in MODELS.items()}
    found |= {name: ({"optimizer.name": name}, allowed) for name, allowed in OPTIMIZERS.items()}
    return {name: found[name] for name in ("sink", "muon")} if cpu else found


def run(task: Task) -> Iterator[dict]:
    todo = cases(task.cpu)
    if task.cpu:
        for name, case in todo.items():
            yield compare(name, True, arguments(task, case[0]), case[1])
    else:  # most of the time goes to starting and to compiling kernels
        with ProcessPoolExecutor(cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = {n: pool.submit(compare, n, False, arguments(task, how), most) for n, (how, most) in todo.items()}
            for name, row in rows.items():
                try:
                    yield row.result()
                except Exception as error:  # the pool's too, where a process of it has died
                    yield {"model": name, "verdict": "FAILED", "note": f"{type(error).__name__}: {error}"[:200]}
    yield from resumed(task)


def arguments(task: Task, changed: dict) -> list[str]:
    """A command line's, for a small model; for a smaller one in the dry run."""
    values = {"data.corpus": steps.corpus_of(task)} | SMALL | (steps.SMALL if task.cpu else {}) | changed
    return [CONFIG, *(text for key, value in values.items() for text in (f"--{key}", str(value)))]


def compare(name: str, cpu: bool, words: list[str], allowed: float) -> dict:
    """The largest relative difference of the losses. In the dry run the materialized form stands in for the card's."""
    plain = [*words, "--training.dtype", "float32", "--training.compile", "false", "--training.device"]
    expected = Stepper(load_config([*plain, "cpu"])).losses(STEPS)
    with use_backend("materialized") if cpu else contextlib.nullcontext():
        found = Stepper(load_config([*plain, "cpu" if cpu else "cuda"])).losses(STEPS)
    error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    row = {"model": name, "first loss": expected[0], "last loss": expected[-1], "allowed": allowed}
    if not all(map(math.isfinite, [*found, *expected])):
        return {"model": name, "verdict": "WRONG", "note": f"not finite: {found} there, {expected} on the CPU"}
    return row | {"error": error, "verdict": "ok" if error <= allowed else "WRONG"}


def resumed(task: Task) -> Iterator[dict]:
    """A run with dropout that stops half-way and goes on, beside one that does not: without deterministic algorithms,
    and with them, where the losses must be the same to the bit."""
    out, straight, stopped = Path(task.folder), dict[Path, list[str]](), dict[Path, list[str]]()
    for deterministic in (False, True):
        how: dict[str, Any] = {"model.dropout": 0.1, "training.deterministic": deterministic, "training.resume": "auto"}
        how |= {"training.device": "cpu" if task.cpu else "cuda", "run.out_dir": out, "tracking.log_interval": 1}
        how |= {"optimizer.decay_steps": ENDS_AT, "evaluation.interval": ENDS_AT, "evaluation.batches": 2}
        for kind, commands in (("straight", straight), ("stopped", stopped)):
            name = f"small_{kind}_{deterministic}"
            shutil.rmtree(out / name, ignore_errors=True)
            commands[out / name] = [sys.executable, "train.py", *arguments(task, how | {"run.name": name})]
    until = "--training.max_steps"
    training.together([*straight_run, until, str(ENDS_AT)] for straight_run in straight.values())
    training.together([*first_half, until, str(STOPPED_AT)] for first_half in stopped.values())
    training.together([*second_half, until, str(ENDS_AT)] for second_half in stopped.values())
    for deterministic, once, twice in zip((False, True), straight, stopped, strict=True):
        difference = max(abs(a - b) for a, b in zip(losses(once), losses(twice), strict=True))
        row = {"run": "deterministic" if deterministic else "not deterministic", "difference": difference}
        yield row | {"verdict": "WRONG" if difference and deterministic else "ok"}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def present(rows: list[dict]) -> list[Table]:
    models, runs = ([row for row in rows if kind in row] for kind in ("model", "run"))
    tables = [Table(f"{STEPS} steps on the card and on the CPU, relative error of the losses", models)]
    if runs:
        caption = f"A run of {ENDS_AT} steps, stopped after {STOPPED_AT}: by how much its losses differ from another's"
        tables.append(Table(caption, runs))
    return tables


SECTION = Section("Small models, on the card and on the CPU; runs that go on", 1.2, run, present)
