"""What scripts/bench_attention.py measures: time and memory of every attention variant, and of its materialised form.

`args` are the script's: B sequences, H heads that read H_kv heads of keys and values, head size D, dtype, device, and
the seconds to spend on a length.
"""

import argparse
import contextlib
import fnmatch
import functools
import math
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F

from harness.device import choose_device, peak_memory
from harness.errors import UserError
from harness.figures import RUN_STYLES, new_figure, save_figure
from harness.timing import Laps, in_turn, median_ratio
from kernels.backends import materialized_attention
from model import NORMALIZERS, Backward, GPTConfig, attention

VARIANTS: dict[str, tuple[str, Backward]] = {
    f"{normalizer}/{backward}": (normalizer, backward) for normalizer in NORMALIZERS for backward in get_args(Backward)
}
FIRST = ("softmax/*", "softmax1/*", "sink/*", "*/full")
"""Patterns of the variants to look at first."""
STOCK = "scaled_dot_product_attention"


def names(patterns: Iterable[str] = ("*",)) -> list[str]:
    """What is measured: STOCK, and each variant, named normalizer/backward, that one of the patterns fits. UserError
    for a pattern that fits none."""
    for pattern in patterns:
        if not fnmatch.filter(VARIANTS, pattern):
            raise UserError(f"--variants {pattern} is none of them, which are named {next(iter(VARIANTS))} and so on")
    return [STOCK, *(name for name in VARIANTS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))]


def inputs(T: int, args: argparse.Namespace, device) -> list[torch.Tensor]:
    """q (B, H, T, D), k and v (B, H_kv, T, D) as a GPT's projection gives them, views of one tensor; and dL/dO."""
    torch.manual_seed(0)
    dtype, widths = getattr(torch, args.dtype), [heads * args.D for heads in (args.H, args.H_kv, args.H_kv)]
    packed = torch.randn(args.B, T, sum(widths), device=device, dtype=dtype).requires_grad_()
    q, k, v = (x.view(args.B, T, -1, args.D).transpose(1, 2) for x in packed.split(widths, dim=2))
    return [q, k, v, torch.randn(args.B, T, args.H, args.D, device=device, dtype=dtype).transpose(1, 2)]


def forward(name: str, q, k, v) -> torch.Tensor:
    """One of `names`, on q (B, H, T, D), k and v (B, H_kv, T, D)."""
    if name == STOCK:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) < q.size(1))
    normalizer, backward = VARIANTS[name]
    return attention(q, k, v, normalizer=normalizer, backward=backward, **learned(normalizer, q, k))


def learned(normalizer: str, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    """What the normalizer learns, as it starts, under the names that `attention` has for it."""
    entry, config = NORMALIZERS[normalizer], GPTConfig(n_head=q.size(1), n_kv_head=k.size(1), head_dim=q.size(-1))
    return {
        "null_logit" if name == entry.null_logit else name: start(config).to(q.device).requires_grad_()
        for name, start in entry.parameters.items()
    }  # the constants are those of a context of these keys anyway


def step(name: str, form: str, T: int, args: argparse.Namespace, device, laps: Laps) -> None:
    """One forward and backward pass, a lap each, on inputs of its own. As "materialized", or with keys and values
    "repeated" for each head of queries before the kernel."""
    q, k, v, g = inputs(T, args, device)
    laps.end("inputs")
    with materialized_attention() if form == "materialized" else contextlib.nullcontext():
        times = args.H // args.H_kv if form == "repeated" else 1
        out = forward(name, q, *(x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k, v)))
    laps.end("forward")
    torch.autograd.grad(out, (q, k, v), g)
    laps.end("backward")


def bench_length(T: int, args: argparse.Namespace, device) -> list[dict]:
    """The rows of one context length: the script's columns without MiB."""
    matrix = 4 * args.B * args.H * T * T  # bytes in float32; a materialised step holds several
    measured = names(args.variants)
    slow = [name for name in measured[1:] if 8 * matrix < 2**31]
    grouped = measured[1:] if args.H_kv < args.H else []
    forms = [(name, "") for name in measured]
    forms += [(name, "materialized") for name in slow] + [(name, "repeated") for name in grouped]
    runs = {f"{n}, {form}" if form else n: functools.partial(step, n, form, T, args, device) for n, form in forms}

    def seconds_of(rounds: int) -> dict[str, list[float]]:
        """Of forward and backward together; those of the forward alone under the name and ", forward"."""
        laps = in_turn(runs, device, rounds)
        both = {name: [each["forward"] + each["backward"] for each in own] for name, own in laps.items()}
        return both | {f"{name}, forward": [each["forward"] for each in own] for name, own in laps.items()}

    warm_up = seconds_of(1)
    typical = statistics.median(warm_up[name][0] for name in runs)
    seconds = seconds_of(max(3, min(200, math.ceil(args.seconds / max(typical, 1e-9)))))
    ratio = {name: median_ratio(seconds[name], seconds[STOCK]).value for name in runs}
    return [
        {
            "T": T,
            "variant": name,
            "forward": 1e3 * statistics.median(seconds[f"{name}, forward"]),
            "forward+backward": 1e3 * statistics.median(seconds[name]),
            "ratio": ratio[name],
            "materialized": ratio[f"{name}, materialized"] / ratio[name] if name in slow else None,
            "repeated": ratio[f"{name}, repeated"] / ratio[name] if name in grouped else None,
        }
        for name in measured
    ]


def peak_of(name: str, T: int, args: argparse.Namespace) -> float:
    """MiB that a forward and backward pass takes at its peak, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send_peak, args=(there, name, T, args))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise UserError(f"{name} at T = {T}: its process ended before it could report, out of memory perhaps") from None
    finally:
        process.join()


def send_peak(pipe, name: str, T: int, args: argparse.Namespace) -> None:
    """What the process of `peak_of` runs: measures, and sends the MiB."""
    device = choose_device(args.device)
    step(name, "", 64, args, device, Laps(device))  # threads, libraries, kernels
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(name, "", T, args, device, Laps(device))
        return pipe.send((peak_memory(device) - before) / 2**20)
    before, peak, done = resident(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(name, "", T, args, device, Laps(device))
    done.set()
    watcher.join()
    return pipe.send((peak - before) / 2**20)


def resident() -> int:
    """Bytes of this process in memory: on Linux those of now, elsewhere the most there have been so far."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(torch.device("cpu"))


def style(name: str) -> dict:
    """How a variant's line is drawn: colour and marker tell its backward, the dashes its normalizer."""
    if name == STOCK:
        return {"color": "#000000", "linewidth": 2.5}
    normalizer, backward = VARIANTS[name]
    own = {"full": RUN_STYLES[0], "diagonal": RUN_STYLES[1], "ste": RUN_STYLES[3], "detached": RUN_STYLES[2]}[backward]
    return own | {"linestyle": ("-", "--", ":", "-.")[[*NORMALIZERS].index(normalizer) % 4]}


def draw(rows: list[dict], title: str, path: Path) -> Path:
    figure, (times, ratios) = new_figure(1, 2)
    figure.set_figheight(4.2)  # taller than usual, for the legend
    timed = [row for row in rows if "ratio" in row]
    for name in dict.fromkeys(row["variant"] for row in timed):
        own = [row for row in timed if row["variant"] == name]
        slow = [row for row in own if row["materialized"] is not None and row["variant"].startswith("softmax1/")]
        for panel, column in ((times, "forward+backward"), (ratios, "ratio")):
            panel.plot([row["T"] for row in own], [row[column] for row in own], label=name, **style(name))
            if slow:
                panel.plot(
                    [row["T"] for row in slow],
                    [row[column] * row["materialized"] for row in slow],
                    label=f"{name}, materialised",
                    alpha=0.35,
                    **style(name),
                )
    times.set(ylabel="forward + backward, ms", title="Time", yscale="log")
    ratios.set(ylabel="time over the stock kernel's", title="Ratio")
    ratios.set_yscale("log", base=2)
    for panel in (times, ratios):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("context length T")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
    figure.legend(*ratios.get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside lower center")
    figure.suptitle(title, fontsize=8, color="#555555")
    return save_figure(figure, path)
