"""Where a training step's time goes: `python scripts/bench_training.py CONFIG [CONFIG …] [--section.key value …]`.

All configs run side by side, each in a process of its own, a step of each in turn, so that a machine whose speed drifts
is fair to all; medians over the steps. Columns: tokens/s; milliseconds a step, and of them in data (the gather),
forward, kl (the forward pass of `kl.reference` and the penalty; 0 where there is none), backward and optimizer
(clipping included); MFU against the device's peak rate; peak memory; speed, the first row's time over this row's.

--baseline adds, in front, the first config's model as plain PyTorch steps it: eager float32 on its own attention
kernels, and unfused AdamW.
--steps N (default 20) steps a config, after a warm-up; --out FILE writes the numbers as JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from harness.batches import gather, training_offsets
from harness.config import Config, load_config
from harness.corpus import Corpus
from harness.device import (
    choose_compile,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    now,
    peak_flops,
    processor_name,
)
from harness.errors import UserError, run_cli
from harness.kl_training import Reference
from harness.optimizers import make_optimizer
from harness.report import print_table
from harness.runfolder import write_text
from model import GPT, GPTConfig

WARMUP = 3
PHASES = ("data", "forward", "kl", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args, overrides = parser.parse_known_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1")

    configs = [(load_config([path, *overrides]), False) for path in args.configs]
    if args.baseline:
        configs.insert(0, (configs[0][0], True))
    for config, _ in configs:
        Corpus(config.data.corpus, verify=False)  # a mistake shows here, in one line
    benches = [start_bench(config, baseline) for config, baseline in configs]
    for step in range(1, WARMUP + args.steps + 1):
        for bench in benches:
            ask(bench, "step", step)
    rows = [ask(bench, "row") for bench in benches]
    for row in rows:
        row["speed"] = rows[0]["ms"] / row["ms"]
    print(f"{processor_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print_table(rows, list(rows[0]))
    if args.out:
        write_text(args.out, json.dumps({"script": "bench_training", "rows": rows}, indent=1))


def start_bench(config: Config, baseline: bool):
    """A Bench in a new process, which has its memory to itself; `ask` makes it work while the others wait."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, config, baseline), daemon=True).start()
    return here


def ask(bench, method: str, *args):
    bench.send((method, args))
    answer = bench.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve(pipe, config: Config, baseline: bool) -> None:
    bench = None
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:  # the parent is done
            return
        try:
            bench = bench or Bench(config, baseline)
            pipe.send(getattr(bench, method)(*args))
        except (UserError, ValueError, RuntimeError) as e:
            pipe.send(e)


class Bench:
    """One config's model, data and optimizer, stepped by hand with a clock between the phases."""

    def __init__(self, config: Config, baseline: bool):
        self.config, c = config, config.training
        self.name = f"{config.run.name}, eager float32, unfused" if baseline else config.run.name
        if baseline:
            os.environ |= {"OFFBYONE_NATIVE": "0", "OFFBYONE_TRITON": "0"}  # PyTorch's own attention
        else:
            keep_freed_memory()
        self.device = choose_device(c.device)
        self.dtype = torch.float32 if baseline else choose_dtype(c.dtype, self.device)
        self.corpus = Corpus(config.data.corpus, verify=False)
        fields = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(GPTConfig)}
        torch.manual_seed(config.run.seed)
        self.raw_model = GPT(GPTConfig(**fields | {"vocab_size": config.model.vocab_size or self.corpus.vocab_size}))
        self.raw_model.to(self.device)
        use_compile = not baseline and choose_compile(c.compile, self.device)
        self.model = torch.compile(self.raw_model) if use_compile else self.raw_model
        self.reference = None
        if config.kl.reference:
            self.reference = Reference(config, self.raw_model.config, self.corpus, self.device, use_compile)
        self.optimizer = make_optimizer(self.raw_model, config.optimizer, fused=not baseline)
        most = min(c.micro_batch_size or c.batch_size, c.batch_size)
        self.micro_batch_size = next(n for n in range(most, 0, -1) if c.batch_size % n == 0)
        self.seconds = {phase: [] for phase in PHASES}

    def step(self, step: int) -> None:
        c, block_size = self.config, self.raw_model.config.block_size
        seconds = dict.fromkeys(PHASES, 0.0)
        tokens = self.corpus.tokens["train"]
        offsets = training_offsets(c.run.seed, step, len(tokens), block_size, c.training.batch_size)
        for own in offsets.reshape(-1, self.micro_batch_size):
            with self._timed(seconds, "data"):
                x, y = gather(tokens, own, block_size, self.device)
            autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with self._timed(seconds, "forward"), autocast:
                logits, loss = self.model(x, y)
            if self.reference:
                with self._timed(seconds, "kl"), autocast:
                    loss = loss + self.reference.penalty(x, logits)[0]
            with self._timed(seconds, "backward"):
                (loss * len(own) / len(offsets)).backward()
        with self._timed(seconds, "optimizer"):
            torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), c.optimizer.grad_clip or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for phase in PHASES:
            self.seconds[phase].append(seconds[phase])

    @contextlib.contextmanager
    def _timed(self, seconds: dict[str, float], phase: str):
        start = now(self.device)
        yield
        seconds[phase] += now(self.device) - start

    def row(self) -> dict:
        measured = {phase: values[WARMUP:] for phase, values in self.seconds.items()}
        median = statistics.median(map(sum, zip(*measured.values(), strict=True)))
        tokens = self.config.training.batch_size * self.raw_model.config.block_size
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak, _ = peak_flops(self.device, self.dtype)
        return {
            "config": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens/s": tokens / median,
            "ms": 1e3 * median,
            **{phase: 1e3 * statistics.median(measured[phase]) for phase in PHASES},
            "mfu": self.raw_model.flops_per_token() * tokens / median / peak,
            "peak MiB": memory / 2**20,
        }


if __name__ == "__main__":
    sys.exit(run_cli(main))
