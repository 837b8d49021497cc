"""Draw the curves of one or several training runs into one picture, without wandb.

    python scripts/plot_metrics.py out/stdlib_softmax out/stdlib_softmax1

Reads the metrics.jsonl that train.py writes; a run that is still going can be drawn at any moment. Kurtosis has one
value for each parameter or activation, so its panels show the median and the maximum over them (0 is a Gaussian).
Runs of one config but for the seed are one curve: their mean, in a band from the least to the largest.
"""

import argparse
import os
import re
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script runs from any folder

from harness.curves import (
    config_beside,
    draw,
    last_values,
    metrics_files,
    panels_for,
    read_run,
    standard_panels,
    variants,
)
from harness.errors import ArgumentParser, run_cli
from harness.figures import print_table, save_figure


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, out/NAME, or its metrics.jsonl")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the picture; default: RUN/curves.png; of several runs, or of chosen metrics, out/plot_metrics/NAMES.png",
    )
    parser.add_argument(
        "--metrics",
        metavar="PREFIX",
        nargs="+",
        help="instead: a panel for each metric whose name begins with a PREFIX",
    )
    args = parser.parse_args()

    files = metrics_files(args.runs)
    runs = {name: read_run(file) for name, file in files.items()}
    panels = panels_for(args.metrics, runs) if args.metrics else standard_panels(runs)
    groups = variants({name: config_beside(file) for name, file in files.items()})
    path = save_figure(draw(runs, panels, groups), args.out or picture_of(files, args.metrics))

    print_table(last_values(runs, panels), ["last value", *runs])
    print(f"\ncurves of {', '.join(runs)}: {path}")


def picture_of(files: dict[str, Path], metrics: list[str] | None) -> Path:
    """A name of its own for every choice of runs and metrics."""
    if len(files) == 1 and not metrics:
        return next(iter(files.values())).parent / "curves.png"
    chosen = [*map(os.path.abspath, files.values()), "", *(metrics or [])]
    names = "+".join(re.sub(r"[^\w.-]", "_", name) for name in (*files, *(metrics or [])))
    return Path("out/plot_metrics") / f"{names[:100]}-{sha256(repr(chosen).encode()).hexdigest()[:8]}.png"


if __name__ == "__main__":
    sys.exit(run_cli(main))
