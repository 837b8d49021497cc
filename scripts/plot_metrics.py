"""Draw the curves of one or several training runs into one picture, without wandb.

    python scripts/plot_metrics.py out/stdlib_softmax out/stdlib_softmax1

Reads the metrics.jsonl that train.py writes; a run that is still going can be drawn at any moment. Kurtosis has one
value for each parameter or activation, so its panels show the median and the maximum over them (0 is a Gaussian).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the script runs from any folder

from harness.curves import draw, last_values, metrics_files, panels_for, read_run, standard_panels
from harness.errors import UserError, run_cli
from harness.figures import print_table, save_figure


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, out/NAME, or its metrics.jsonl")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the picture; default: RUN/curves.png, or out/plot_metrics/curves.png for several runs",
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
    folder = next(iter(files.values())).parent if len(files) == 1 else Path("out/plot_metrics")
    path = save_figure(draw(runs, panels), args.out or folder / "curves.png")

    print_table(last_values(runs, panels), ["last value", *runs])
    print(f"\ncurves of {', '.join(runs)}: {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
