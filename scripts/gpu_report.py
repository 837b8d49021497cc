"""Everything that only a GPU can prove, in one call: `python scripts/gpu_report.py [--minutes 18] [--out DIR]`.

Sections in the order of what is lost if the time runs out: the card and its ceilings; every attention variant, backend
and dtype against float64; a training step of GPT-2's 124M beside nanoGPT's; small models on the card and on the CPU,
and runs that stop and go on; attention alone beside PyTorch's kernels and FlexAttention; further shapes and variants;
and, for the minutes left, softmax, softmax1, a sink and a gate trained at 124M beside nanoGPT's loop, with their
outliers and quantization. steps_tuned (matrix products tuned by Inductor) and blocks (those of the Triton kernels,
over a grid) run only if asked for. Each has a process and a time limit of its own, prints its table when done, and is
written at once to <date>_<card>.json and .md in --out: a crash loses nothing. Logs and checkpoints go to
out/gpu_report/.

It needs torch, triton, numpy, scipy, matplotlib and tqdm, and as wheels jsonargparse, docstring-parser and pyyaml. The
corpus that it trains on is prepared beforehand, 24 million tokens (48 MB), by
    python data/pysource/prepare.py --max-tokens 24000000
A dry run without it takes another that is there.
"""

import argparse
import datetime
import itertools
import json
import math
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch

from harness.corpus import is_prepared
from harness.device import commit
from harness.files import make_folder, write_text
from harness.gpu_report.document import markdown, print_section, wrong_rows
from harness.gpu_report.plan import BY_NAME, SECTIONS
from harness.gpu_report.process import ROOT, run_section

MINUTES = 18.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it; default: {MINUTES:g}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks; of a dry run out/gpu_report")
    default = [name for name in SECTIONS if name not in BY_NAME]
    of = f"of {', '.join(SECTIONS)}; default: all but {', '.join(BY_NAME)}"
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=default, help=of, metavar="NAME")
    parser.add_argument("--corpus", metavar="DIR", help="the one to train on; default: data/pysource")
    parser.add_argument("--seed", type=int, help="of everything random; default: a fresh one, which the report names")
    parser.add_argument("--commit", help="what the report calls the code; default: what git says")
    parser.add_argument("--cpu", action="store_true", help="a dry run: the same code without a GPU, on small shapes")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes {args.minutes:g}: must be positive and finite")
    if not args.cpu and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device: --cpu is a dry run of the same code on small shapes")
    corpus = Path(args.corpus).resolve() if args.corpus else ROOT / "data/pysource"
    if not args.cpu and not is_prepared(corpus):
        raise UserError(f"{from_root(corpus)} is not prepared: run its prepare.py, or give another by --corpus DIR")
    own = args.out.resolve() if args.out else None
    work = own if own and args.cpu else ROOT / "out/gpu_report"
    out = own or (work if args.cpu else ROOT / "benchmarks")
    for folder in (out, work):
        make_folder(folder)

    start, card = time.monotonic(), "cpu" if args.cpu else torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "script": "gpu_report",
        "date": datetime.date.today().isoformat(),
        "card": card,
        "commit": args.commit or commit(),
        "command": " ".join(["python", *sys.argv]),
        "seed": secrets.randbits(32) if args.seed is None else args.seed,
        "seconds": 0.0,
        "sections": [],
    }
    stem = unused(out / f"{report['date']}_{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}")
    for name in args.sections:
        left = 60 * args.minutes - (time.monotonic() - start)
        limit = min(left, 60 * SECTIONS[name].minutes)
        options = {"cpu": args.cpu, "seed": report["seed"], "corpus": from_root(corpus), "folder": from_root(work)}
        report["sections"].append(run_section(name, options | {"report": report["sections"]}, limit, work))
        report["seconds"] = time.monotonic() - start
        print_section(report["sections"][-1])
        write_text(stem.with_suffix(".json"), json.dumps(report, indent=1, ensure_ascii=False))
        write_text(stem.with_suffix(".md"), markdown(report))
    print(f"\nwritten: {stem}.json, {stem}.md; the logs are in {work}/")
    if cut := [section["section"] for section in report["sections"] if section["error"]]:
        print(f"NOT finished: {', '.join(cut)}")
    if wrong := wrong_rows(report):
        print(f"{len(wrong)} results are NOT as they should be: see the tables")
    return 1 if wrong or any(section["error"] for section in report["sections"]) else 0


def from_root(path: Path) -> str:
    """As the sections see it, which run in the repository's root: relative where it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def unused(stem: Path) -> Path:
    """The name without a suffix, or with -2, -3 …: an earlier report is never overwritten."""
    others = (stem.with_name(f"{stem.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([stem], others) if not name.with_suffix(".json").exists())


if __name__ == "__main__":
    sys.exit(run_cli(main))
