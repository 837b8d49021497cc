"""What the diagnostics cost: `python scripts/bench_diagnostics.py [--config FILE] [--model.key value …]`.

On a GPT with random weights: GPT-2's 124M without a config. Each diagnostic runs in a process of its own over the same
sequences of random tokens, one at a time, and in turn with the bare forward passes, so that a machine whose speed
drifts is fair to both; medians over the repetitions.

Columns: seconds of the diagnostic, loading not counted; those of the bare forward passes; ratio, the one over the
other; peak MiB of the process; added MiB, how far that lies above the peak of the model with its forward passes.
jacobian_energy is the full backward pass with the split of every layer; the script itself adds two backward passes.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch
from tqdm import tqdm

from harness.bench_diagnostics import DIAGNOSTICS, bench
from harness.config_files import load_config
from harness.device import choose_device, processor_name
from harness.figures import print_table
from harness.files import check_file, make_folder, write_text
from model import GPTConfig

GPT2_VOCABULARY = 50257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML config, of which `model` counts; default: GPT-2's 124M"
    )
    parser.add_argument("--sequences", type=int, default=8, help="default: 8")
    parser.add_argument("--repeat", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--only", nargs="+", choices=DIAGNOSTICS, default=list(DIAGNOSTICS), help="default: all of them"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args, overrides = parser.parse_known_args()
    for name in ("sequences", "repeat"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    if args.out:
        check_file(args.out)
    choose_device(args.device)
    config = shape(args.config, overrides)

    rows = []
    context = multiprocessing.get_context("spawn")  # a new process for each, which has its memory to itself
    for name in tqdm(args.only, leave=False, disable=None):
        with ProcessPoolExecutor(1, context) as pool:
            rows.append(pool.submit(bench, name, config, args.sequences, args.repeat, args.device).result())
    threads = torch.get_num_threads()
    print(
        f"{processor_name()}, {threads} threads, PyTorch {torch.__version__}; "
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, {args.sequences} sequences of "
        f"{config.block_size} tokens"
    )
    print_table(rows, list(rows[0]))
    if args.out:
        content = {"script": "bench_diagnostics", "config": vars(config), "rows": rows}
        make_folder(args.out.parent)
        write_text(args.out, json.dumps(content, indent=1))


def shape(path: str | None, overrides: list[str]) -> GPTConfig:
    """The model of a config, or GPT-2's 124M, with what the command line changes."""
    default = Path(__file__).resolve().parents[1] / "configs" / "gpt2_124m_softmax.yaml"
    model = load_config([str(path or default), *overrides]).model
    return model.gpt_config(GPT2_VOCABULARY)


if __name__ == "__main__":
    sys.exit(run_cli(main))
