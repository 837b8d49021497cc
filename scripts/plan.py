"""What a run would take, before it is started: `python scripts/plan.py CONFIG [--section.key value …] --gpus 8`.

A device's memory at its peak, in GiB; whether it fits into --memory, of which a tenth is left to the CUDA context,
libraries and fragmentation, and what to change if not, the fastest first. What a device sends in a step; checkpoints;
times, at the rates that are given. No GPU is needed: CUDA is assumed, or with --training.device cpu this machine.
docs/scaling.md says what is counted, and how close it comes to what was measured.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.config_files import load_config
from harness.device import choose_device, peak_flops
from harness.errors import ArgumentParser, UserError, run_cli
from harness.figures import duration, print_table
from harness.planning import Plan, ways_to_fit
from harness.resuming import first_shape, free_memory

USABLE, GiB = 0.9, 2**30  # of a device's memory: the rest is a guess at what is not counted


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("gpus", 1, "or processes on a CPU; default: 1"),
        ("memory", None, "of a device, GiB; default: 80, or what is free on this machine for each of its processes"),
        ("bandwidth", 100, "between devices, GB/s in each direction; default: 100"),
        ("disk", 1, "what it writes, GB/s; default: 1"),
        ("flops", None, "of a device, TFLOP/s; default: 400, 40 %% of an H100, or of a product timed on this CPU"),
    ):
        parser.add_argument(f"--{name}", type=int if name == "gpus" else float, default=default, help=what)
    parser.add_argument("--json", action="store_true", help="the same as JSON, in bytes and seconds")
    args, rest = parser.parse_known_args(argv)
    unknown = [f"{word}: no option of this script" for word in rest if re.fullmatch(r"--[\w-]+(=.*)?", word)]
    if unknown or not rest or rest[0].startswith("--"):
        usage = "python scripts/plan.py CONFIG [--section.key value …] [--gpus N …]; --help lists the options"
        raise UserError(f"{(unknown or ['no config given'])[0]}: {usage}, python train.py --help the keys")
    for name in ("gpus", "memory", "bandwidth", "disk", "flops"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g}: must be positive and finite")
    plan = Plan(config := load_config(rest), first_shape(config), args.gpus)
    if plan.device == "cpu":  # this machine's, which its processes share
        there = free_memory() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        args.memory = args.memory or there / GiB / args.gpus
        args.flops = args.flops or 0.4 * peak_flops(choose_device("cpu"), plan.dtype)[0] / 1e12 / args.gpus
    args.memory, args.flops = args.memory or 80, args.flops or 400
    found = report(plan, args)
    print(json.dumps(found, indent=1)) if args.json else show(plan, found)


def report(plan: Plan, args: argparse.Namespace) -> dict:
    """What --json prints: bytes and seconds."""
    (moment, kinds), c, limit = plan.peak, plan.config.training, USABLE * args.memory * GiB
    size, state, rates = 4 * plan.parameters, plan.state_bytes, (args.flops * 1e12, args.bandwidth * 1e9)
    fits = plan.peak_bytes <= limit
    ways = [] if fits else [how(way) | {"step_seconds": way.seconds(*rates)} for way in ways_to_fit(plan, limit)]
    return {
        "assumed": {"device": plan.device, **{k: vars(args)[k] for k in ("memory", "flops", "bandwidth", "disk")}},
        "parameters": plan.parameters,
        "peak": {"moment": moment, "bytes": plan.peak_bytes, "kinds": {k: round(v) for k, v in kinds.items() if v}},
        "fits": fits,
        "would_fit": sorted(ways, key=lambda way: sum(way["step_seconds"].values())),
        "moved": {kind: {"bytes": round(v), "seconds": v / args.bandwidth / 1e9} for kind, v in plan.moved.items()},
        "checkpoint": {"weights_bytes": size, "optimizer_bytes": state, "seconds": (size + state) / args.disk / 1e9},
        "steps": c.max_steps,
        "tokens": c.max_steps * c.batch_size * plan.shape.block_size,
        "step_seconds": plan.seconds(*rates),
    }


def how(plan: Plan) -> dict:
    """The options of a plan's command line that it may change, and its bytes."""
    c = plan.config.training
    keys = {"micro_batch_size": plan.batch, "checkpoint_activations": c.checkpoint_activations, "parallel": c.parallel}
    return {"gpus": plan.gpus, **{f"training.{key}": value for key, value in keys.items()}, "bytes": plan.peak_bytes}


def show(plan: Plan, found: dict) -> None:
    def times(step: dict[str, float]) -> str:
        return ", ".join(f"{duration(seconds)} of {what}" for what, seconds in step.items() if seconds)

    c, peak, step, assumed = plan.config.training, found["peak"], found["step_seconds"], found["assumed"]
    print(
        f"{plan.parameters / 1e6:,.1f}M parameters; {plan.gpus} × {plan.device} in {str(plan.dtype).split('.')[1]}, "
        f"{'sharded' if plan.sharded else 'a copy on each'}; a step is {plan.gpus} × {plan.micro_steps} × {plan.batch} "
        f"sequences, {c.batch_size * plan.shape.block_size:,} tokens\nAssumed of each {plan.device}: "
        "{memory:.3g} GiB, {flops:.3g} TFLOP/s, {bandwidth:g} GB/s to others, {disk:g} GB/s to disk".format(**assumed)
        + " (with --training.device cpu: this machine's)" * (c.device == "auto"),
        end="\n\n",
    )
    kinds = peak["kinds"] | {f"the peak: {peak['moment']}": peak["bytes"]}
    print_table([{"memory": kind, "GiB": size / GiB} for kind, size in kinds.items()], ["memory", "GiB"])
    print(f"\nIt {'fits' if found['fits'] else 'does NOT fit'} into {USABLE:.0%} of {assumed['memory']:.3g} GiB")
    for way in found["would_fit"]:
        size, time = way.pop("bytes") / GiB, times(way.pop("step_seconds"))
        print("This would:", *(f"--{k} {str(v).lower()}" for k, v in way.items()), f"({size:.1f} GiB): a step {time}")
    if not found["fits"] and not found["would_fit"]:
        print("No number of devices that share training.batch_size makes it fit: a shorter model.block_size would")
    rows = [{"sent": kind, "GiB": v["bytes"] / GiB, "seconds": v["seconds"]} for kind, v in found["moved"].items()]
    print()
    print_table(rows or [{"sent": "nothing"}], ["sent", "GiB", "seconds"])
    checkpoint, total = found["checkpoint"], [duration(found["steps"] * of(step.values())) for of in (max, sum)]
    weights, state = checkpoint["weights_bytes"] / GiB, checkpoint["optimizer_bytes"] / GiB
    print(
        f"\nA checkpoint: weights {weights:.3g} GiB, optimizer {state:.3g} GiB, {duration(checkpoint['seconds'])}\n"
        f"A step: {times(step)}{', perhaps beside it' * (step['sending'] > 0)}\n"
        f"{found['steps']:,} steps, {found['tokens']:.4g} tokens: {' to '.join(dict.fromkeys(total))}"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
