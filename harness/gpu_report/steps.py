"""(d) A training step of GPT-2's 124M, as train.py takes it, beside the same model stepped as nanoGPT's loop does it.

Each variant is a harness.stepping.Stepper in a process of its own; a few of them compile at the same time, and then
step in turn with the baseline, a burst of steps each. Before that the gradient of the compiled model is compared with
that of the same model run eagerly, on one batch: the relative error, a few thousandths in bfloat16.
"""

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

from harness.config import load_config
from harness.gpu_report import Section, Table, Task, with_error
from harness.gpu_report.exactness import VARIANTS
from harness.stepping import Stepper
from harness.timing import median, median_ratio
from harness.workers import Worker, WorkerError

CONFIG = "configs/gpt2_124m_softmax.yaml"
BASELINE = "nanoGPT's loop"
FIRST = [("softmax", "full"), ("softmax1", "full")]
OTHERS = [variant for variant in VARIANTS if variant not in FIRST]
AT_ONCE = 5  # of 12 GiB each
ROUNDS, BURST = 6, 4
SMALL = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32, "model.vocab_size": "null",
    "training.batch_size": 4, "training.micro_batch_size": 2, "training.device": "cpu", "training.compile": False,
}  # fmt: skip


def overrides(task: Task, **changed) -> list[str]:
    """A command line's: the 124M recipe at 64 sequences a step."""
    values = {"data.corpus": corpus_of(task), "training.batch_size": 64, "training.micro_batch_size": 16}
    values |= {"training.device": "cuda", "tracking.wandb": "disabled"}
    values |= (SMALL if task.cpu else {}) | changed
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def corpus_of(task: Task) -> str:
    """The corpus asked for, or else one that is there: what takes no account of the text needs no other."""
    prepared = [str(path.parent) for path in sorted(Path("data").glob("*/val.bin"))]
    for folder in (task.corpus, *prepared):
        if (Path(folder) / "val.bin").exists():
            return folder
    raise RuntimeError(f"{task.corpus} is not prepared, nor is any other: run python data/stdlib/prepare.py at least")


def run(task: Task, variants=FIRST) -> Iterator[dict]:
    for start in range(0, len(variants), AT_ONCE - 1):
        yield from group(task, variants[start : start + AT_ONCE - 1])


def group(task: Task, variants) -> Iterator[dict]:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of the processes
    workers = {BASELINE: Worker(Stepper, load_config([CONFIG, *overrides(task)]), True)}
    for normalizer, backward in variants:
        changed = [*overrides(task), "--model.normalizer", normalizer, "--model.backward", backward]
        workers[f"{normalizer}/{backward}"] = Worker(Stepper, load_config([CONFIG, *changed]))
    bursts: dict[str, list] = {name: [] for name in workers}
    checks = {}
    for worker in workers.values():
        worker.start("run", 2)  # which compiles
    for name, worker in list(workers.items()):
        try:
            worker.result()
            error = worker.ask("compiled_error")
            checks[name] = error if error is None or math.isfinite(error) else "gradient not finite"
            worker.ask("release")
        except WorkerError as error:
            yield {"variant": name, "note": str(error)[:200]}
            del workers[name], bursts[name]
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffled.sample(list(workers), len(workers)):
            workers[name].ask("run", 1)  # takes the memory again
            bursts[name].append([sum(step.values()) for step in workers[name].ask("run", BURST)])
            workers[name].ask("release")
    for name, worker in workers.items():
        about, own = worker.ask("describe"), median([step for burst in bursts[name] for step in burst])
        row = {"variant": name, "dtype": about["dtype"], "tokens": about["tokens"], "compiled_error": checks[name]}
        row |= {"ms": 1e3 * own.value, "error, ms": 1e3 * own.error, "tokens/s": about["tokens"] / own.value}
        row |= {"mfu": about["flops"] / own.value / about["peak_flops"], "peak GiB": about["peak_bytes"] / 2**30}
        if BASELINE in workers:
            means = {who: [sum(burst) for burst in bursts[who]] for who in (name, BASELINE)}
            ratio = median_ratio(means[BASELINE], means[name])
            row |= {"speed": ratio.value, "error of the speed": ratio.error}
        yield row
    for worker in workers.values():
        worker.stop()


def present(rows: list[dict]) -> list[Table]:
    shown = [
        {"variant": row["variant"], "note": row["note"]}
        if "note" in row
        else {
            "variant": row["variant"],
            "a step, ms": with_error(row["ms"], row["error, ms"], 1),
            "tokens/s": f"{row['tokens/s']:,.0f}",
            "speed": with_error(row["speed"], row["error of the speed"]) if "speed" in row else "–",
            "MFU": f"{row['mfu']:.1%}",
            "peak GiB": f"{row['peak GiB']:.1f}",
            "compiled against eager": compiled_error(row["compiled_error"]),
        }
        for row in rows
    ]
    measured = [row for row in rows if "note" not in row]
    what = f"{measured[0]['tokens']:,} tokens a step, {measured[0]['dtype']}; " if measured else ""
    return [Table(f"{what}speed is the baseline's time over the variant's", shown)]


def compiled_error(error: float | str | None) -> str:
    return "–" if error is None else f"{error:.1e}" if isinstance(error, float) else error


def other_variants(task: Task) -> Iterator[dict]:
    return run(task, OTHERS[:2] if task.cpu else OTHERS)


SECTION = Section("A training step of 124M: softmax, softmax1", 1.4, run, present)
OTHER_VARIANTS = Section("A training step of 124M: the other variants", 3.0, other_variants, present)
