"""Where a training step's time goes: `python scripts/bench_training.py CONFIG [CONFIG …] [--section.key value …]`.

All configs run side by side, each in a process of its own, a step of each in turn, so that a machine whose speed drifts
is fair to all; medians over the steps. Columns: tokens/s; milliseconds a step, and of them in data (the gather),
forward, kl (the forward pass of `kl.reference` and the penalty; 0 where there is none), backward and optimizer
(clipping included), and the latter's share of the step; MFU against the device's peak rate; peak memory; speed, the
first row's time over this row's.

--baseline adds, in front, the first config's model as nanoGPT's loop steps it (see harness/stepping.py).
--optimizers steps each config by every optimizer that there is, a row each.
--steps N (default 20) steps a config, after a warm-up; --out FILE writes the numbers as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch

from harness.config import OptimizerConfig
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.device import processor_name
from harness.figures import print_table
from harness.files import check_file, make_folder, write_text
from harness.stepping import PHASES, Stepper
from harness.timing import median
from harness.workers import Worker

WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--optimizers", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args, overrides = parser.parse_known_args()
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: at least 2")
    if args.out:
        check_file(args.out)

    configs = [(load_config([path, *overrides]), False) for path in args.configs]
    if args.optimizers:
        names = get_args(get_type_hints(OptimizerConfig)["name"])
        configs = [(replace(c, optimizer=replace(c.optimizer, name=name)), False) for c, _ in configs for name in names]
    if args.baseline:
        configs.insert(0, (configs[0][0], True))
    for config, _ in configs:
        Corpus(config.data.corpus, (), config.model.vocab_size)  # a mistake shows here, in one line
    workers = [Worker(Stepper, config, nanogpt) for config, nanogpt in configs]
    steps = [[seconds for worker in workers for seconds in worker.ask("run", 1)] for _ in range(WARMUP + args.steps)]
    rows = [
        {"config": config.folder.name + (", as nanoGPT steps it" if nanogpt else f", {config.optimizer.name}")}
        | row(worker, seconds)
        for (config, nanogpt), worker, seconds in zip(configs, workers, zip(*steps[WARMUP:], strict=True), strict=True)
    ]
    for each in rows:
        each["speed"] = rows[0]["ms"] / each["ms"]
    print(f"{processor_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print_table(rows, list(rows[0]))
    if args.out:
        make_folder(args.out.parent)
        write_text(args.out, json.dumps({"script": "bench_training", "rows": rows}, indent=1))


def row(worker: Worker, steps: Sequence[dict[str, float]]) -> dict:
    seconds, about = median([sum(step.values()) for step in steps]).value, worker.ask("describe")
    return {
        "dtype": about["dtype"],
        "tokens/s": about["tokens"] / seconds,
        "ms": 1e3 * seconds,
        **{phase: 1e3 * median([step[phase] for step in steps]).value for phase in PHASES},
        "optimizer share": median([step["optimizer"] / sum(step.values()) for step in steps]).value,
        "mfu": about["flops"] / seconds / about["peak_flops"],
        "peak MiB": about["peak_bytes"] / 2**20,
    }


if __name__ == "__main__":
    sys.exit(run_cli(main))
