"""Run an experiment: a grid of ordinary training runs, base config × variants × seeds, and diagnostics on each.

    python scripts/run_experiment.py experiments/backcopy.yaml --jobs 2
    python scripts/report.py out/backcopy

What is finished is passed over, what was interrupted goes on: the same command continues. A cell that fails is told,
and the others go on. CONFIG may also be a claim's file, experiments/claims/NAME.yaml: the experiment that decides it.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch

from harness.experiments.claims import load_claims
from harness.experiments.estimate import STEPS, estimate
from harness.experiments.grid import ROOT, Experiment, load_experiment
from harness.experiments.runner import clock, prepare_corpora, run_experiment, threads, trained
from harness.figures import print_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", metavar="CONFIG", type=Path, help="experiments/NAME.yaml")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time; default: one, or one a GPU")
    parser.add_argument("--dry-run", action="store_true", help="only print the cells and what they would take")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="cells go to DIR/NAME; default: out"
    )
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1")
    path, here = Path(os.path.relpath(args.experiment.resolve(), ROOT)), Path.cwd()
    if args.out != Path("out"):  # else in the repository's
        args.out = here / args.out
    os.chdir(ROOT)  # the paths in configs are relative to it
    experiment = load_experiment(path, args.out)
    for claim in load_claims(experiment):  # its mistakes are told before hours of training
        few = f", which needs {claim.seeds} seeds and gets {len(experiment.seeds)}"
        print(f"it decides the claim {claim.name}{few if len(experiment.seeds) < claim.seeds else ''}")
    if args.dry_run:
        return dry_run(experiment, args.jobs or max(1, torch.cuda.device_count()))
    command = shlex.join(["python", "scripts/run_experiment.py", *(sys.argv[1:] if argv is None else argv)])
    status = run_experiment(experiment, args.jobs, command)
    print(f"python scripts/report.py {shlex.quote(str(experiment.folder))}    # the page")
    return status


def dry_run(experiment: Experiment, jobs: int) -> int:
    """Print a line a cell, and the sums."""
    prepare_corpora(experiment)
    torch.set_num_threads(threads(jobs))
    rows = []
    for cell, row in zip(experiment.cells, estimate(experiment), strict=True):
        rows.append(row | {"time": clock(row["seconds"]), "trained": "yes" if trained(cell) else "no"})
    shown = [row | {"tokens": f"{row['tokens']:,}", "FLOPs": f"{row['flops']:.3g}"} for row in rows]
    print_table(shown, ["cell", "steps", "tokens", "FLOPs", "time", "trained"])
    waiting = [row for row in rows if row["trained"] == "no"]
    flops, seconds = (sum(row[key] for row in waiting) for key in ("flops", "seconds"))
    tokens = sum(row["tokens"] for row in waiting)
    print(
        f"\nto train: {len(waiting)} of {len(rows)} cells, {tokens:,} tokens, {flops:.3g} FLOPs, "
        f"{clock(seconds / jobs)} with --jobs {jobs}, by {STEPS} steps of each variant; without starts, "
        "evaluations and diagnostics"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
