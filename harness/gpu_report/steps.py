"""(d) A training step of GPT-2's 124M, as train.py takes it, beside the same model stepped as nanoGPT's loop does it.

Each variant is a harness.stepping.Stepper in a process of its own; a few of them compile at the same time, and then
step in turn with the baseline, a burst of steps each. Before that the gradient of the compiled model is compared with
that of the same model run eagerly, with the loss over all of its logits, on one batch: the relative error, a few
thousandths in bfloat16. If time runs short, there are fewer bursts, and the rows say how many.
"""

import functools
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from harness.bench_attention import VARIANTS
from harness.config_files import load_config
from harness.corpus import is_prepared
from harness.corpus_writing import cpu_count
from harness.gpu_report import Section, Table, Task, with_error
from harness.stepping import Stepper
from harness.timing import median, median_ratio
from harness.workers import Worker, WorkerError

CONFIG = "configs/gpt2_124m_softmax.yaml"
BASELINE = "nanoGPT's loop"
MICRO_BATCH, LARGER = 16, 32


class Variant(NamedTuple):
    attention: tuple[str, str] | None
    """normalizer and backward; None for the baseline"""
    at_a_time: int = MICRO_BATCH
    """sequences"""
    mode: str | None = None
    """torch.compile's"""


LARGER_SOFTMAX = f"softmax/full, {LARGER} at a time"
PRODUCTS_TUNED = f"{LARGER_SOFTMAX}, products tuned"
FIRST = {
    f"{BASELINE}, {LARGER} at a time": Variant(None, LARGER),
    "softmax/full": Variant(("softmax", "full")),
    LARGER_SOFTMAX: Variant(("softmax", "full"), LARGER),
    "softmax1/full": Variant(("softmax1", "full")),
}
# All others are timed among the kernels alone.
STEPPED = [f"{n}/{b}" for n in ("softmax", "softmax1", "sink") for b in ("full", "diagonal", "ste")]
OTHERS = {name: Variant(VARIANTS[name]) for name in [*STEPPED, "clipped/full"] if name not in FIRST}
# Inductor times products of its own in Triton, which apply GELU themselves, against cuBLAS's: minutes of compiling.
TUNED = {
    LARGER_SOFTMAX: FIRST[LARGER_SOFTMAX],
    PRODUCTS_TUNED: Variant(("softmax", "full"), LARGER, "max-autotune-no-cudagraphs"),
}
DRY_RUN = ("softmax/full", LARGER_SOFTMAX, PRODUCTS_TUNED, "softmax/diagonal", "clipped/full")
AT_ONCE = 4  # beside the baseline, of 8 to 22 GiB each
ROUNDS, BURST = 6, 4
AT_THE_END = 10.0  # seconds for the rows, and for a round slower than those before
COMPILED_ERROR = 0.02
"""Between gradients of one bfloat16 model whose sums come in another order: some thousandths, and never this much."""
SMALL = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32, "model.vocab_size": "null",
    "training.batch_size": 4, "training.micro_batch_size": 2, "training.device": "cpu", "training.compile": False,
}  # fmt: skip


def overrides(task: Task, **changed) -> list[str]:
    """A command line's: the 124M recipe at 64 sequences a step."""
    values = {"data.corpus": corpus_of(task), "training.batch_size": 64, "training.micro_batch_size": MICRO_BATCH}
    values |= {"training.device": "cuda", "tracking.wandb": "disabled"}
    values |= (SMALL if task.cpu else {}) | changed
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def corpus_of(task: Task) -> str:
    """The corpus asked for, or else any that is prepared, which the report then names: speed does not depend on it."""
    for folder in (task.corpus, *map(str, sorted(Path("data").glob("*")))):
        if is_prepared(Path(folder)):
            return folder
    raise RuntimeError(f"{task.corpus} is not prepared, nor is any other: run python data/stdlib/prepare.py at least")


def run(task: Task, variants=FIRST) -> Iterator[dict]:
    names = [name for name in variants if name in DRY_RUN or not task.cpu]
    for start in range(0, len(names), AT_ONCE):
        yield from group(task, {name: variants[name] for name in names[start : start + AT_ONCE]})


def group(task: Task, variants: dict[str, Variant]) -> Iterator[dict]:
    variants = {BASELINE: Variant(None)} | variants
    workers: dict[str, Worker] = {}
    # What times products as it compiles does so before the others start, while card and processors are quiet.
    tuned = [name for name in variants if variants[name].mode]
    for names in (tuned, [name for name in variants if name not in tuned]):
        for name in names:
            workers[name] = worker_of(task, variants[name])
            workers[name].start("run", 2)  # which compiles
        for name in names:
            try:
                workers[name].result()
                workers[name].ask("release")
            except WorkerError as error:
                yield lost(name, workers, error)
    checks = {}
    for name, worker in list(workers.items()):
        try:
            # Of a larger micro-batch the plain loss would take too much memory beside the others; tuned, there are few.
            wanted = variants[name].mode or variants[name].at_a_time == MICRO_BATCH
            checks[name] = judged(worker.ask("compiled_error") if wanted else None)
            worker.ask("release")
        except WorkerError as error:
            yield lost(name, workers, error)
    bursts: dict[str, list] = {name: [] for name in workers}
    shuffled, start = random.Random(0), task.seconds_left
    for done in range(ROUNDS):
        if done >= 2 and task.seconds_left < AT_THE_END + (start - task.seconds_left) / done:
            break  # a median needs two; another round may not end in time
        for name in shuffled.sample(list(workers), len(workers)):
            try:
                workers[name].ask("run", 1)  # takes the memory again
                steps = workers[name].ask("run", BURST)
                bursts[name].append(sum(sum(step.values()) for step in steps) / BURST)
                workers[name].ask("release")
            except WorkerError as error:
                yield lost(name, workers, error)
    for name in (name for name in variants if name in workers):
        # The steps of a burst come one after another and are alike: the error is that of so many bursts.
        about, own = workers[name].ask("describe"), median(bursts[name])
        row = {"variant": name, "dtype": about["dtype"], "tokens": about["tokens"], **checks[name]}
        row |= {"ms": 1e3 * own.value, "error, ms": 1e3 * own.error, "bursts": len(bursts[name])}
        row |= {"tokens/s": about["tokens"] / own.value, "mfu": about["flops"] / own.value / about["peak_flops"]}
        row |= {"peak GiB": about["peak_bytes"] / 2**30}
        if BASELINE in workers:
            ratio = median_ratio(bursts[BASELINE], bursts[name])
            row |= {"speed": ratio.value, "error of the speed": ratio.error}
        yield row
    for worker in workers.values():
        worker.stop()


def worker_of(task: Task, variant: Variant) -> Worker:
    changed: dict = {} if task.cpu else {"training.micro_batch_size": variant.at_a_time}
    if variant.attention:
        changed |= dict(zip(("model.normalizer", "model.backward"), variant.attention, strict=True))
    config = load_config([CONFIG, *overrides(task, **changed)])
    threads = cpu_count() if variant.mode else 4  # alone, or beside the others
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}):  # the process takes it along
        return Worker(Stepper, config, variant.attention is None, variant.mode)


def judged(error: float | None) -> dict:
    """A row's `compiled_error`, None where nothing is compiled, and its verdict."""
    if error is None:
        return {"compiled_error": None}
    if math.isnan(error):  # compiled or not: STE's overflows in a deep model with a long context
        return {"compiled_error": "gradient not finite"}
    if math.isinf(error):
        return {"compiled_error": "one gradient not finite", "verdict": "WRONG"}
    return {"compiled_error": error, "verdict": "ok" if error < COMPILED_ERROR else "WRONG"}


def lost(name: str, workers: dict[str, Worker], error: WorkerError) -> dict:
    """The row of a variant that failed, which the others go on without."""
    print(f"{name}: {error}\n{error.log}", flush=True)
    workers.pop(name).stop()
    return {"variant": name, "note": str(error)[:200], "verdict": "FAILED"}


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
            "bursts": row["bursts"],
            "compiled against eager": compiled_error(row),
        }
        for row in rows
    ]
    measured = [row for row in rows if "note" not in row]
    what = f"{measured[0]['tokens']:,} tokens a step, {measured[0]['dtype']}; " if measured else ""
    return [Table(f"{what}speed is the baseline's time over the variant's", shown)]


def compiled_error(row: dict) -> str:
    error, wrong = row["compiled_error"], row.get("verdict", "ok") != "ok"
    shown = "–" if error is None else f"{error:.1e}" if isinstance(error, float) else error
    return f"{shown}, {row['verdict']}" if wrong else shown


SECTION = Section("A training step of 124M: softmax, softmax1", 2.2, run, present)
OTHER_VARIANTS = Section(
    "A training step of 124M: the other variants", 3.0, functools.partial(run, variants=OTHERS), present
)
TUNED_PRODUCTS = Section(
    "A training step of 124M: its matrix products tuned", 4.0, functools.partial(run, variants=TUNED), present
)
