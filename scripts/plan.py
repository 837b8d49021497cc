"""What a run would take, before it is started: `python scripts/plan.py CONFIG [--section.key value …] --gpus 8`.

Where a device's memory goes at its peak, in GiB; whether that fits into --memory, of which a tenth is left to the CUDA
context, libraries and fragmentation, and what to change if it does not. What a device sends in a step, and how long at
--bandwidth; checkpoints, and how long at --disk; the time of a step at --flops, and of all. No GPU is needed, and none
of that memory. docs/scaling.md says what is counted, and how close it comes to what was measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.checkpoint import load_model
from harness.config import Config
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.errors import UserError, run_cli
from harness.figures import print_table
from harness.planning import Plan, ways_to_fit
from model import GPTConfig

USABLE, GiB = 0.9, 2**30  # of a device's memory: the rest is a guess at what is not counted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1, help="default: %(default)s")
    for name, default, what in (
        ("memory", 80, "of a device, GiB"),
        ("bandwidth", 100, "between devices, GB/s in each direction"),
        ("disk", 1, "what it writes, GB/s"),
        ("flops", 400, "what a device computes in training, TFLOP/s, as an H100 at 40 %% of its data sheet"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what}; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the same as JSON, in bytes and seconds")
    args, rest = parser.parse_known_args(argv)
    for name in ("gpus", "memory", "bandwidth", "disk", "flops"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name):g}: must be positive and finite")
    config = load_config(rest)
    plan = Plan(config, shape_of(config), args.gpus, "cpu" if config.training.device == "cpu" else "cuda")
    found = report(plan, args)
    print(json.dumps(found, indent=1)) if args.json else show(plan, found, args)


def shape_of(config: Config) -> GPTConfig:
    """That of the checkpoint that training starts from, or the config's own."""
    if config.training.init_from != "scratch":
        return load_model(config.training.init_from)[0].config
    try:
        return config.model.gpt_config(config.model.vocab_size or Corpus(config.data.corpus, ()).vocab_size)
    except UserError as error:
        raise UserError(f"{error}; or say how many ids it will have, by --model.vocab_size") from error


def report(plan: Plan, args: argparse.Namespace) -> dict:
    """What --json prints: bytes and seconds."""
    (moment, kinds), c = plan.peak, plan.config.training
    limit, weights, moved = USABLE * args.memory * GiB, 4 * plan.parameters, plan.moved if plan.gpus > 1 else {}
    fits = plan.peak_bytes <= limit
    computing, moving = plan.flops / args.flops / 1e12, sum(moved.values()) / args.bandwidth / 1e9
    return {
        "parameters": plan.parameters,
        "peak": {"moment": moment, "bytes": plan.peak_bytes, "kinds": {k: round(v) for k, v in kinds.items() if v}},
        "fits": fits,
        "would_fit": [] if fits else [how(other) | {"bytes": other.peak_bytes} for other in ways_to_fit(plan, limit)],
        "moved": {kind: {"bytes": round(v), "seconds": v / args.bandwidth / 1e9} for kind, v in moved.items()},
        "checkpoint": {
            "weights_bytes": weights,
            "optimizer_bytes": plan.state_bytes,
            "seconds": (weights + plan.state_bytes) / args.disk / 1e9,
        },
        "steps": c.max_steps,
        "tokens": c.max_steps * c.batch_size * plan.shape.block_size,
        "step_seconds": {"computing": computing, "moving": moving},
    }


def how(plan: Plan) -> dict:
    """The options of a plan's command line that it may change."""
    c = plan.config.training
    keys = {"micro_batch_size": plan.batch, "checkpoint_activations": c.checkpoint_activations, "parallel": c.parallel}
    return {"gpus": plan.gpus} | {f"training.{key}": value for key, value in keys.items()}


def show(plan: Plan, found: dict, args: argparse.Namespace) -> None:
    c, peak, step = plan.config.training, found["peak"], found["step_seconds"]
    print(
        f"{plan.parameters / 1e6:,.1f}M parameters; {plan.gpus} × {plan.device} in {str(plan.dtype).split('.')[1]}, "
        f"{'sharded' if plan.sharded else 'a copy on each'}; a step is {plan.gpus} × {plan.micro_steps} × {plan.batch} "
        f"sequences, {c.batch_size * plan.shape.block_size:,} tokens\n"
    )
    kinds = peak["kinds"] | {f"the peak: {peak['moment']}": peak["bytes"]}
    print_table([{"memory": kind, "GiB": size / GiB} for kind, size in kinds.items()], ["memory", "GiB"])
    print(f"\nIt {'fits' if found['fits'] else 'does NOT fit'} into {USABLE:.0%} of {args.memory:g} GiB")
    for other in found["would_fit"]:
        size = other.pop("bytes") / GiB
        print("This would:", *(f"--{key} {str(value).lower()}" for key, value in other.items()), f"({size:.1f} GiB)")
    if not found["fits"] and not found["would_fit"]:
        print("No number of devices that share training.batch_size makes it fit: a shorter model.block_size would")
    print()
    rows = [{"sent": kind, "GiB": v["bytes"] / GiB, "seconds": v["seconds"]} for kind, v in found["moved"].items()]
    print_table(rows or [{"sent": "nothing"}], ["sent", "GiB", "seconds"])
    checkpoint, days = found["checkpoint"], found["steps"] / 86400
    weights, state = checkpoint["weights_bytes"] / GiB, checkpoint["optimizer_bytes"] / GiB
    print(
        f"\nA checkpoint: weights {weights:.3g} GiB, optimizer {state:.3g} GiB, {checkpoint['seconds']:.3g} s\n"
        f"A step: {step['computing']:.3g} s of computing, {step['moving']:.3g} s of sending, perhaps beside it\n"
        f"{found['steps']:,} steps, {found['tokens']:.4g} tokens: {days * max(step.values()):.3g} to "
        f"{days * sum(step.values()):.3g} days"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
