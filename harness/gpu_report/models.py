"""(f) Small models on the card beside the CPU's readable form, in float32; and runs of train.py that stop and go on.

The first is what attention alone does not show: every part of the model, the loss by chunks, feedback, optimizers. A
wrong gradient of attention hardly changes the loss of a few steps, so the gradient of every parameter is compared, and
the losses tell of the optimizers alone.
"""

import functools
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.config_files import load_config
from harness.corpus_writing import cpu_count
from harness.gpu_report import Section, Table, Task, finished, steps, training
from harness.stepping import Stepper, relative_errors
from kernels.backends import materialized_attention
from model import NORMALIZERS

CONFIG = "configs/stdlib_softmax.yaml"
SHAPE: dict[str, Any] = {
    "model.n_layer": 2, "model.n_head": 4, "model.n_embd": 128, "model.block_size": 128, "training.batch_size": 8,
    "training.micro_batch_size": 4, "tracking.wandb": "disabled", "optimizer.warmup_steps": 0,
}  # fmt: skip
"""of the model and its steps on the card; the dry run's are those of steps.SMALL"""

MODERN: dict[str, Any] = {
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.mlp": "swiglu",
    "model.n_kv_head": 2,
}
OLDER = {"model.parallel_residual": True, "model.bias": True, "model.tie_embeddings": False, "model.activation": "gelu"}
MODELS: dict[str, dict] = {
    **{normalizer: {"model.normalizer": normalizer, "model.softmax_n": 3} for normalizer in NORMALIZERS},
    **{f"softmax, {backward}": {"model.backward": backward} for backward in ("diagonal", "detached", "ste")},
    **{f"a gate by {gate}": {"model.gate": gate} for gate in ("head", "element")},
    "rope, rmsnorm, swiglu, grouped keys, normed queries": MODERN | {"model.qk_norm": True},
    "parallel residual, biases, embeddings not tied, exact gelu": OLDER,
    "activations computed again": {"training.checkpoint_activations": True},
    **{f"feedback {name}": {"training.feedback": name} for name in ("fa", "sign_symmetric", "dfa")},
}
NOISE = 0.1
"""The standard deviation of what is added to each parameter, since a sink starts as softmax1 and a null key at zero.
That of the scores is then near 1."""
ALLOWED = 1e-5
"""Of gradients whose sums come in another order: 1.4e-6 between two forms on one CPU at the most, and 8e-7 of attention
alone on an H100 (benchmarks/)."""

OPTIMIZERS = {"adamw": 1e-5, "muon": 1e-4, "adamw_muon_embeddings": 1e-4}
"""By name the error allowed of the losses. Between two forms on one CPU it was at most 1e-7 with AdamW and 4e-5 with
Muon, which iterates in bfloat16: about as much as between that and iterating in float32."""
STEPS = 4


class Run(NamedTuple):
    """A run of train.py that stops half-way and goes on, beside one that does not."""

    deterministic: bool
    compiled: bool
    dropout: float


RUNS = {
    "not deterministic": Run(deterministic=False, compiled=False, dropout=0.1),
    # Attention by another kernel than with dropout.
    "deterministic, without dropout": Run(deterministic=True, compiled=False, dropout=0.0),
    "deterministic, compiled": Run(deterministic=True, compiled=True, dropout=0.1),
}
STOPPED_AT, ENDS_AT = 6, 12
APART = 0.05
"""In nats a token, the most by which a loss may differ without deterministic algorithms, where only sums take another
order. Two forms in bfloat16 on one CPU were 0.0014 apart in these steps."""


# --- the card beside the CPU ------------------------------------------------------------------------------------------


def run_models(task: Task) -> Iterator[dict]:
    def job(compare: Callable[..., list[dict]], name: str, changed: dict) -> Callable[[], list[dict]]:
        return functools.partial(compare, name, task.device.type, arguments(task, changed))

    jobs = {name: job(compare_gradients, name, changed) for name, changed in MODELS.items()}
    jobs |= {name: job(compare_losses, name, {"optimizer.name": name}) for name in OPTIMIZERS}
    if task.cpu:
        yield from [*jobs["sink"](), *jobs["muon"]()]
    else:  # most of the time goes to starting and to compiling kernels; threads of the many processes would only wait
        spawned = multiprocessing.get_context("spawn")
        yield from finished("model", jobs, ProcessPoolExecutor(cpu_count(), spawned, torch.set_num_threads, (1,)))


def arguments(task: Task, changed: dict) -> list[str]:
    """A command line's, for a small model; for a smaller one in the dry run."""
    values = {"data.corpus": steps.corpus_of(task)} | SHAPE | (steps.SMALL if task.cpu else {}) | changed
    return [CONFIG, *(text for key, value in values.items() for text in (f"--{key}", str(value)))]


def compare_gradients(name: str, device: str, words: list[str]) -> list[dict]:
    """The largest relative error of a parameter's gradient from the first micro-batch."""
    with materialized_attention():
        expected_loss, expected = first_gradients(noisy_stepper(words, "cpu"), with_logits=True)
    loss, found = first_gradients(noisy_stepper(words, device), with_logits=False)
    errors = relative_errors(expected, found) | {"the loss": abs(loss - expected_loss) / expected_loss}
    return [judged({"model": name, "loss": loss}, errors, ALLOWED)]


def compare_losses(name: str, device: str, words: list[str]) -> list[dict]:
    """The largest relative error of the losses of some steps by this optimizer."""
    with materialized_attention():
        expected = noisy_stepper(words, "cpu").losses(STEPS)
    found = noisy_stepper(words, device).losses(STEPS)
    errors = {f"loss {step}": abs(b - a) / a for step, (a, b) in enumerate(zip(expected, found, strict=True), start=1)}
    return [judged({"model": name, "loss": found[-1]}, errors, OPTIMIZERS[name])]


def judged(row: dict, errors: dict[str, float], allowed: float) -> dict:
    """The row with the largest of these errors, whose it is, and the verdict; what is not finite in words, for JSON."""
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    verdict = "ok" if errors[worst] <= allowed else "WRONG"
    row = row | {"error": errors[worst], "of": worst, "allowed": allowed, "verdict": verdict}
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}


def noisy_stepper(words: list[str], device: str) -> Stepper:
    """In float32, with noise on its parameters: the same numbers on every device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # some images switch it on
    own = Stepper(
        load_config([*words, "--training.device", device, "--training.dtype", "float32", "--training.compile", "false"])
    )
    generator = torch.Generator().manual_seed(own.config.run.seed)
    with torch.no_grad():
        for parameter in own.raw_model.parameters():
            parameter.add_((NOISE * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
    return own


def first_gradients(own: Stepper, with_logits: bool) -> tuple[float, dict[str, torch.Tensor]]:
    loss, gradients = own.gradients(own.model, next(own.batches), with_logits)
    return loss.item(), {name: gradient.cpu() for name, gradient in gradients.items()}


def present_models(rows: list[dict]) -> list[Table]:
    caption = f"The gradient of every parameter, and {STEPS} losses by each optimizer: the largest relative error"
    return [Table(f"{caption} beside the CPU's readable form", rows)]


# --- runs that go on --------------------------------------------------------------------------------------------------


def run_resumed(task: Task) -> Iterator[dict]:
    jobs = {name: functools.partial(compare_resumed, task, name, run) for name, run in RUNS.items()}
    if task.cpu:  # without what is compiled
        yield from (row for name, run in RUNS.items() if not run.compiled for row in jobs[name]())
    else:
        yield from finished("run", jobs, ThreadPoolExecutor())


def compare_resumed(task: Task, name: str, run: Run) -> list[dict]:
    """The largest difference of the losses between a run that stopped and went on, and one that did not."""
    changed: dict[str, Any] = {
        "model.dropout": run.dropout,
        "training.deterministic": run.deterministic,
        "training.compile": run.compiled,
        "training.device": task.device.type,
        "training.micro_batch_size": "null",  # all of a batch at once
        "training.resume": "auto",
        "optimizer.decay_steps": ENDS_AT,
        "evaluation.interval": ENDS_AT,
        "evaluation.batches": 2,
        "evaluation.kurtosis": False,
        "tracking.log_interval": 1,
        "run.out_dir": task.folder,
    }
    label = name.replace(", ", "_").replace(" ", "_")
    straight, stopped = (Path(task.folder) / f"small_{label}_{kind}" for kind in ("straight", "stopped"))

    def command(folder: Path, until: int) -> list[str]:
        words = arguments(task, changed | {"run.name": folder.name, "training.max_steps": until})
        return [sys.executable, "train.py", *words]

    for folder in (straight, stopped):
        shutil.rmtree(folder, ignore_errors=True)
    training.together([command(straight, ENDS_AT), command(stopped, STOPPED_AT)])
    metrics = stopped / "metrics.jsonl"
    first_half = metrics.read_text()
    training.together([command(stopped, ENDS_AT)])
    if not metrics.read_text().startswith(first_half):  # with its clock times, no two runs' are alike
        raise RuntimeError(f"{stopped} did not go on after step {STOPPED_AT}, but began anew")
    expected, found = losses(straight), losses(stopped)
    differences = {f"step {n}": abs(b - a) for n, (a, b) in enumerate(zip(expected, found, strict=True), start=1)}
    return [judged({"run": name, "loss": found[-1]}, differences, 0.0 if run.deterministic else APART)]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def present_resumed(rows: list[dict]) -> list[Table]:
    caption = f"A run of {ENDS_AT} steps, stopped after {STOPPED_AT}: by how much its losses differ from another's"
    return [Table(f"{caption} that never stopped, in nats a token", rows)]


SECTION = Section("Small models, on the card and on the CPU", 1.2, run_models, present_models)
RESUMED = Section("Runs that stop and go on", 2.0, run_resumed, present_resumed)
