"""Sections of the GPU report, blocks, steps and exactness: what they start and when, and what they make of failures."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from harness.corpus_writing import cpu_count, write_corpus
from harness.gpu_report import Task, blocks, exactness, steps
from harness.stepping import PHASES
from harness.timing import Laps
from harness.tokenizer import Bytes
from harness.workers import WorkerError
from model import NORMALIZERS


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the Triton kernels; `kernels.launched` says which were launched, with which blocks and stages."""
    pytest.importorskip("triton", reason="Triton is not installed (requirements-dev.txt)")
    from kernels import triton, triton_tiles

    found = SimpleNamespace(launched=[], warmup=lambda *_, **__: None)

    class Kernel:
        def __init__(self, name):
            self.__name__ = f"_{name}_kernel"

        def __getitem__(self, grid):
            return lambda *_, **how: found.launched.append((self.__name__, how.get("num_stages"), sizes(how)))

        def warmup(self, *arguments, grid, **how):
            return found.warmup(self.__name__, how.get("num_stages"), sizes(how))

    def sizes(how) -> set:
        return {how.get("KEYS"), how.get("QUERIES")}

    monkeypatch.setattr(triton, "_row_products_kernel", Kernel("row_products"))
    for name in blocks.KERNELS:
        monkeypatch.setattr(triton_tiles if name == "forward" else triton, f"_{name}_kernel", Kernel(name))
    return found


def tile_inputs(tile: str = "relu") -> blocks.Inputs:
    x = torch.zeros(1, 1, 8, 16)
    return blocks.Inputs(tile, x, x, x, x, x, x[..., 0])


def test_each_kernel_is_timed_with_the_blocks_asked_for(kernels):
    for name in blocks.KERNELS:
        kernels.launched.clear()
        blocks.call(tile_inputs(), name, (16, 128, 2, 5))(Laps(torch.device("cpu")))
        assert {own for own, *options in kernels.launched if options == [5, {16, 128}]} == {f"_{name}_kernel"}
    assert len(kernels.launched) == 2  # both kernels of the backward


def test_a_kernel_is_compiled_and_loaded_and_not_run(kernels):
    compiled, loaded = [], []

    class Compiled:
        def __getitem__(self, grid):
            loaded.append(grid)

    def warmup(*how) -> Compiled:
        compiled.append(how)
        return Compiled()

    kernels.warmup = warmup
    for name in blocks.KERNELS:
        assert blocks.refusal(blocks.Job("relu", 16, name, (16, 128, 2, 5)), torch.float32) == {}
    assert compiled == [(f"_{name}_kernel", 5, {16, 128}) for name in blocks.KERNELS]
    assert len(loaded) == 3
    assert kernels.launched == []


def test_only_the_compiler_and_the_card_refuse_blocks_all_else_is_a_failure(kernels):
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    def refused_by(error) -> dict:
        def warmup(*_):
            raise error

        kernels.warmup = warmup
        return blocks.refusal(blocks.Job("relu", 16, "keys", (16, 128, 2, 5)), torch.float32)

    note = refused_by(OutOfResources(300000, 232448, "shared memory"))
    assert note.keys() == {"note"}
    assert note["note"].startswith("OutOfResources: out of resource: shared memory, Required: 300000")
    assert refused_by(CompilationError("a\nb", None, "no such product")) == {
        "note": "CompilationError: no such product"
    }
    memory = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert refused_by(memory) == {"note": "OutOfMemoryError: CUDA out of memory", "verdict": "FAILED"}


def measured(monkeypatch, results: dict, refused: dict) -> dict:
    """The rows by their blocks; `results` has what the blocks compute or an exception, `refused` what is not run."""

    def launched(inputs, kernel, own):
        if isinstance(results[own], Exception):
            raise results[own]
        return results[own]

    monkeypatch.setattr(blocks, "launched", launched)
    task = SimpleNamespace(device=torch.device("cpu"))
    rows = blocks.measure(task, tile_inputs(), "keys", {own: refused.get(own, {}) for own in results}, 2)
    return {row["blocks"]: row for row in rows}


def test_blocks_that_are_fast_and_wrong_do_not_win(monkeypatch):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    eps, empty = torch.finfo(torch.float32).eps, x[:0]
    results = {
        None: (x, empty),
        (1,): (x * (1 + eps), empty),
        (2,): (x, empty),
        (3,): (x * (1 + 3 * eps), empty),
        (4,): (torch.full_like(x, torch.nan), empty),
        (5,): RuntimeError("an illegal memory access"),
        (6,): (x, empty),
    }
    rows = measured(monkeypatch, results, {(6,): {"note": "too large"}})
    assert {name: row.get("verdict") for name, row in rows.items()} == {
        **{"(3,)": "WRONG", "(4,)": "WRONG", "(5,)": "FAILED", "(6,)": None},
        **{blocks.IN_USE: "ok", "(1,)": "ok", "(2,)": "ok"},
    }
    assert {name for name, row in rows.items() if "ms" in row} == {blocks.IN_USE, "(1,)", "(2,)"}
    assert "nan" in rows["(4,)"]["note"]
    named = [{"tile": "relu", "T": 8, "D": 16, "kernel": "keys"} | row for row in rows.values()]
    (shown,) = blocks.present(named)[0].rows
    assert shown["(5,)"] == "FAILED: RuntimeError: an illegal memory access"
    assert shown["(6,)"] == "too large"


def test_where_the_blocks_in_use_fail_no_others_are_timed(monkeypatch):
    rows = measured(monkeypatch, {None: RuntimeError("a crash"), (1,): (torch.ones(1),)}, {})
    assert rows == {blocks.IN_USE: {"blocks": blocks.IN_USE, "note": "RuntimeError: a crash", "verdict": "FAILED"}}


def test_a_compiler_that_dies_takes_its_own_kernel_alone(monkeypatch):
    def refusal(job, dtype) -> dict:
        if job.kernel == "keys":
            raise RuntimeError("a process of the pool has died")
        return {}

    monkeypatch.setattr(blocks, "refusal", refusal)
    monkeypatch.setattr(blocks, "draw", lambda *_: tile_inputs())
    monkeypatch.setattr(blocks, "launched", lambda *_: (torch.ones(2),))
    rows = blocks.run(SimpleNamespace(cpu=True, device=torch.device("cpu")))
    verdicts = [(row["kernel"], row["verdict"]) for row in rows]
    assert verdicts == [*2 * [("forward", "ok")], ("keys", "FAILED"), *2 * [("queries", "ok")]]


class Here:
    """In place of a worker: the object in this process. What is asked, and with which threads it began, is noted."""

    asked: list[tuple[str, str]]
    threads: dict[str, str]

    def __init__(self, make, config, nanogpt, mode):
        self.name = mode or ("baseline" if nanogpt else f"{config.model.normalizer}/{config.model.backward}")
        self.make = lambda: make(config, nanogpt, mode)
        self.made = None
        Here.threads[self.name] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"]

    def start(self, method, *arguments):
        self.made = self.made or self.make()
        Here.asked.append((self.name, method))
        try:
            self.answer = getattr(self.made, method)(*arguments)
        except WorkerError as error:
            self.answer = error

    def result(self):
        Here.asked.append((self.name, "result"))
        if isinstance(self.answer, WorkerError):
            raise self.answer
        return self.answer

    def ask(self, method, *arguments):
        self.start(method, *arguments)
        return self.result()

    def stop(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(Here, "asked", [], raising=False)
    monkeypatch.setattr(Here, "threads", {}, raising=False)
    monkeypatch.setattr(steps, "Worker", Here)


@pytest.fixture
def task(tmp_path) -> Task:
    write_corpus(tmp_path, [("train", "abcdefgh" * 99), ("val", "abcdefgh" * 9)], Bytes(), source="a test")
    return Task(cpu=True, seed=0, seconds=1e6, corpus=str(tmp_path), folder=str(tmp_path))


def test_tuned_products_are_tuned_alone_with_all_processors_and_checked(here, task, monkeypatch):
    """The mode reaches torch.compile."""
    modes = []

    def compiled(model, mode=None):
        modes.append(mode)
        return lambda *arguments, **how: model(*arguments, **how)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setitem(steps.SMALL, "training.compile", True)
    monkeypatch.setattr(steps, "ROUNDS", 2)
    monkeypatch.setattr(steps, "BURST", 1)
    rows = list(steps.run(task, steps.TUNED))
    mode = steps.TUNED[steps.PRODUCTS_TUNED].mode
    assert [row["variant"] for row in rows] == [steps.BASELINE, *steps.TUNED]
    assert modes == [mode, None]  # on a CPU nanoGPT's loop is not compiled
    assert Here.asked[:2] == [(mode, "run"), (mode, "result")]  # before the others begin
    assert Here.threads == {mode: str(cpu_count()), "baseline": "4", "softmax/full": "4"}
    checks = {row["variant"]: row["compiled_error"] for row in rows}
    assert checks == {steps.BASELINE: None, steps.LARGER_SOFTMAX: None, steps.PRODUCTS_TUNED: 0.0}


class Clock:
    """In place of a Stepper, whose steps take a second each of the time that its section has left."""

    left: float

    def __init__(self, config, nanogpt, mode):
        self.mode = mode

    def run(self, count):
        Clock.left -= count
        return [dict.fromkeys(PHASES, 1 / len(PHASES))] * count

    def release(self):
        pass

    def compiled_error(self):
        return None

    def describe(self):
        return {"dtype": "float32", "tokens": 8, "flops": 1.0, "peak_flops": 1.0, "peak_bytes": 0}


# Two processes warm up by two steps each; a round has five steps of each.
@pytest.mark.parametrize(("seconds", "bursts"), [(10.0, 2), (4 + 20 + 10 + 10, 3), (4 + 6 * 10 + 10, 6), (1e3, 6)])
def test_a_section_of_steps_gives_its_rows_before_its_time_is_up(here, task, monkeypatch, seconds, bursts):
    monkeypatch.setattr(steps, "Stepper", Clock)
    monkeypatch.setattr(Clock, "left", seconds, raising=False)
    monkeypatch.setattr(Task, "seconds_left", property(lambda _: Clock.left))
    rows = list(steps.group(task, {"softmax/full": steps.FIRST["softmax/full"]}))
    assert [(row["bursts"], row["ms"]) for row in rows] == 2 * [(bursts, 1000)]
    assert [row["bursts"] for row in steps.present(rows)[0].rows] == [bursts, bursts]
    assert Clock.left >= steps.AT_THE_END or bursts == 2


def test_of_larger_micro_batches_no_loss_over_all_logits_is_computed_beside_the_others(here, task, monkeypatch):
    monkeypatch.setattr(steps, "Stepper", Clock)
    monkeypatch.setattr(Clock, "left", 1e3, raising=False)
    variants = {"one": steps.Variant(("softmax1", "full")), "another": steps.Variant(("sink", "full"), steps.LARGER)}
    assert len(list(steps.group(task, variants))) == 3
    assert {name for name, method in Here.asked if method == "compiled_error"} == {"baseline", "softmax1/full"}


def test_a_process_that_ends_leaves_the_rows_of_the_others(here, task, monkeypatch):
    class Lost(Clock):
        def run(self, count):
            if self.mode:
                raise WorkerError("its process ended with status -9")
            return super().run(count)

    monkeypatch.setattr(steps, "Stepper", Lost)
    monkeypatch.setattr(Clock, "left", 1e3, raising=False)
    failed, *rows = steps.group(task, steps.TUNED)
    assert (failed["variant"], failed["verdict"]) == (steps.PRODUCTS_TUNED, "FAILED")
    assert [row["variant"] for row in rows] == [steps.BASELINE, steps.LARGER_SOFTMAX]


def test_rows_come_as_soon_as_a_job_is_done_whose_seed_is_its_own(monkeypatch):
    """The first job lasts until another's rows are there; a job that fails leaves a row."""
    seeds, go_on = {}, threading.Event()

    def check(cpu, seed, *job):
        seeds[job[:3]] = seed
        if seed == 7:
            assert go_on.wait(60)
        if seed == 9:
            raise RuntimeError("no kernel")
        return [{"seed": seed}]

    monkeypatch.setattr(exactness, "check", check)
    monkeypatch.setattr(exactness, "executor", lambda cpu: ThreadPoolExecutor(2))
    rows = exactness.main_shape(SimpleNamespace(cpu=True, seed=7))
    first = next(rows)
    go_on.set()
    found = [first, *rows]
    jobs = list(itertools.product(NORMALIZERS, exactness.SMALL_MAIN, ("float16", "bfloat16", "float32")))
    assert seeds == {job: 7 + i for i, job in enumerate(jobs)}
    assert {row["seed"] for row in found if "seed" in row} == set(seeds.values()) - {9}
    (failed,) = (row for row in found if "seed" not in row)
    assert (failed["variant"], failed["dtype"], failed["verdict"]) == ("softmax/all", "float32", "FAILED")
    assert failed["note"] == "RuntimeError: no kernel"


def test_on_a_card_the_main_shape_leaves_no_variant_to_nobody(monkeypatch):
    """What it leaves out, the other shapes have; what is compiled, and float16, it alone."""
    monkeypatch.setattr(exactness, "draw", lambda *_: [])
    monkeypatch.setattr(exactness, "values", lambda *_: {})
    monkeypatch.setattr(exactness, "compare", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def checked(dtype, shape, main) -> set:
        rows = [row for name in NORMALIZERS for row in exactness.check(False, 0, name, shape, dtype, main)]
        return {(row["variant"], row["backend"]) for row in rows}

    def variants(found) -> set:
        return {variant for variant, _ in found}

    unlike = {f"{name}/detached" for name in NORMALIZERS if name != "softmax"}
    unlike |= {f"softmax_n/{backward}" for backward in ("full", "diagonal", "ste")}
    for dtype in exactness.OTHER_DTYPES:
        main, others = checked(dtype, exactness.MAIN[0], True), checked(dtype, exactness.OTHERS[5], False)
        assert variants(others) == set(exactness.VARIANTS)
        assert variants(others) - variants(main) == unlike
        assert {backend for _, backend in others} == {
            b for b, taken in exactness.BACKENDS.items() if dtype in taken
        } - {name for name in exactness.BACKENDS if "compiled" in name}
        assert others - main == {(variant, backend) for variant, backend in others if variant in unlike}
        assert all("compiled" in backend for _, backend in main - others)
    assert variants(checked("float16", exactness.MAIN[0], True)) == set(exactness.VARIANTS)
