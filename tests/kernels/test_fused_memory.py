"""The memory that fused attention takes at its peak, against PyTorch's own kernel."""

import argparse
import itertools
import os

import pytest
import torch

from harness.bench_attention import STOCK, peak_of, send_peak
from kernels.backends import native
from tests.processes import CONTEXT, forked, started

T, ARGUMENTS = 8192, argparse.Namespace(B=1, H=2, H_kv=2, D=64, dtype="float32", device="cpu")
CASES = [  # variant, and whether by our own kernel; else on PyTorch's, as where there is no compiler
    *itertools.product(["sink/full", "sink/diagonal", "sink/ste"], [True, False]),  # the null logit's own gradient
    ("sink/detached", False),
    ("clipped/full", True),  # all scores of some rows
]


def send_peaks(pipe, cases) -> None:
    """The MiB of each case by `send_peak`, each in a fork of a process that has imported everything and computed
    nothing: `peak_of` takes longer to start a fresh one than the case takes."""
    torch.set_num_threads(1)  # each adds a part to what our own kernel sums
    for variant, own in cases:
        os.environ["OFFBYONE_NATIVE"] = "1" if own else "0"
        assert forked(lambda variant=variant: send_peak(pipe, variant, T, ARGUMENTS), 1, 2) == 0


@pytest.mark.slow
def test_memory_stays_within_one_and_a_half_times_the_stock_kernels():
    cases = [(variant, own) for variant, own in CASES if native() or not own]
    here, there = CONTEXT.Pipe(duplex=False)
    process = started(send_peaks, there, cases)
    there.close()
    peaks = {case: here.recv() for case in cases}
    process.join()
    stock = peak_of(STOCK, T, ARGUMENTS)
    assert {case: peak / stock for case, peak in peaks.items() if peak > 1.5 * stock} == {}
