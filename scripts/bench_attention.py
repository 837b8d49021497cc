"""Time and memory of every attention variant: `python scripts/bench_attention.py [--device D] [--dtype T] …`.

For each context length, all variants run side by side in one process, one call of each in every round, in random order,
so that a machine whose speed drifts is fair to all; medians over the rounds. Beside them run (a) PyTorch's own
scaled_dot_product_attention, to which every ratio is taken, and (b) each variant's materialised form, where eight T × T
matrices in float32 take less than 2 GiB. The peak memory of a forward and backward pass is measured in a process of its
own: on a CPU the resident memory over that of a warm-up, inputs and gradients included; on a GPU the allocated memory.

Columns: forward and forward+backward in milliseconds, medians; ratio, forward+backward over (a), the median of the
rounds' own ratios; materialized, forward+backward of (b) over the variant's own; with --H-kv repeated, that with keys
and values repeated for each head of queries before the kernel over the variant's own, which reads them as they are;
MiB, the peak.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.errors import UserError, run_cli  # before torch, which takes seconds: a Ctrl-C meanwhile ends quietly

# isort: split
import torch

from harness.bench_attention import FIRST, bench_length, draw, names, peak_of
from harness.device import choose_device, keep_freed_memory, processor_name
from harness.diagnostics import write_json
from harness.figures import print_table
from harness.files import check_folder
from model import attention_backend

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", type=int, nargs="+", default=[2**n for n in range(6, 15)], help="default: 64 … 16384")
    parser.add_argument("--B", type=int, default=1, help="sequences; default: 1")
    parser.add_argument("--H", type=int, default=4, help="heads; default: 4")
    parser.add_argument("--H-kv", type=int, help="heads of keys and values, each read by H / H-kv heads; default: H")
    parser.add_argument("--D", type=int, default=64, help="head size; default: 64")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=FIRST,
        help=f"patterns of normalizer/backward; default: {' '.join(FIRST)}",
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="about so long for each variant and length; default: 3"
    )
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[8192],
        help="lengths T of which to take the peak memory; none for none",
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench_attention"), help="folder of the JSON and the PNG")
    args = parser.parse_args()
    args.H_kv = args.H if args.H_kv is None else args.H_kv
    if min(args.T + args.memory + [args.B, args.H, args.H_kv, args.D]) < 1 or args.seconds <= 0:
        raise UserError("--T, --B, --H, --H-kv, --D, --memory and --seconds must be positive")
    if args.H % args.H_kv:
        raise UserError(f"--H-kv {args.H_kv} does not divide --H {args.H}: each of its heads is read by as many others")
    measured = names(args.variants)
    check_folder(args.out)
    device = choose_device(args.device)
    keep_freed_memory()  # as train.py does
    rows = [row for T in args.T for row in bench_length(T, args, device)]
    peaks = {(name, T): peak_of(name, T, args) for T in args.memory for name in measured}
    for row in rows:
        row["MiB"] = peaks.pop((row["variant"], row["T"]), None)
    rows += [{"T": T, "variant": name, "MiB": peak} for (name, T), peak in peaks.items()]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    threads = torch.get_num_threads()
    title = f"{where}, {threads} thread{'s' * (threads > 1)}, PyTorch {torch.__version__}, {args.dtype}, "
    grouped = args.H_kv < args.H
    title += f"B {args.B}, H {args.H}{f' on {args.H_kv} of keys' if grouped else ''}, D {args.D}; by "
    shapes = [torch.empty(args.B, args.H, T, args.D, device=device, dtype=getattr(torch, args.dtype)) for T in args.T]
    title += " and ".join(sorted({attention_backend(q, q, stock=stock) for q in shapes for stock in (False, True)}))
    print(title)
    columns = ["T", "variant", "forward", "forward+backward", "ratio", "materialized", "repeated", "MiB"]
    print_table(rows, [name for name in columns if grouped or name != "repeated"])
    stem = args.out / f"bench_attention_{device.type}_{args.dtype}"
    arguments = {name: value for name, value in vars(args).items() if name != "out"} | {"title": title}
    found = {"script": "bench_attention", "title": title, "arguments": arguments, "rows": rows}
    written = write_json(stem.with_suffix(".json"), [found])
    print(f"\nwritten: {written}, {draw(rows, title, stem.with_suffix('.png'))}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
