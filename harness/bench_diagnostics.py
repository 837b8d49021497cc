"""What scripts/bench_diagnostics.py measures: the cost of a diagnostic beside that of the bare forward passes."""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harness.device import choose_device, now, peak_memory
from measure.activations import Activations
from measure.jacobian import backpropagate, take_gradients
from measure.perplexity import score
from measure.weights import pooled_by_kind, weight_moments
from model import GPT, GPTConfig


def bench(name: str, config: GPTConfig, sequences: int, repeat: int, device_name: str) -> dict:
    """One row: the diagnostic and the bare forward passes in turn, `repeat` times after a warm-up."""
    torch.manual_seed(0)
    device = choose_device(device_name)
    model = GPT(config).to(device).eval()
    idx = torch.randint(config.vocab_size, (sequences, config.block_size), device=device)
    diagnostic, compared = DIAGNOSTICS[name]

    def seconds_of(work: Callable[[GPT, Tensor], None]) -> float:
        start = now(device)
        work(model, idx)
        return now(device) - start

    bare = []
    if compared:
        forward_passes(model, idx)
        bare.append(seconds_of(forward_passes))
    before = peak_memory(device)
    measured = []
    for _ in range(repeat):
        measured.append(seconds_of(diagnostic))
        if compared:
            bare.append(seconds_of(forward_passes))
    peak = peak_memory(device)
    seconds = statistics.median(measured)
    forward = statistics.median(bare) if bare else None
    return {
        "diagnostic": name,
        "seconds": seconds,
        "forward passes": forward,
        "ratio": seconds / forward if forward else None,
        "peak MiB": peak / 2**20,
        "added MiB": (peak - before) / 2**20,
    }


@torch.no_grad()
def forward_passes(model: GPT, idx: Tensor) -> None:
    for x in idx.split(1):
        model(x)


def weights(model: GPT, idx: Tensor) -> None:
    pooled_by_kind(weight_moments(model.named_parameters(), model.config))


def activations(model: GPT, idx: Tensor) -> None:
    watched = Activations(model)
    for x in idx.split(1):
        watched.update(x)


@torch.no_grad()
def perplexity(model: GPT, idx: Tensor) -> None:
    T = idx.size(1)
    score(model, ((x, x) for x in idx.split(1)), np.arange(len(idx)) * T, T)


def jacobian(model: GPT, idx: Tensor) -> None:
    backpropagate(model, idx, idx, [[] for _ in model.transformer.h])
    take_gradients(model)


DIAGNOSTICS = {
    "weight_kurtosis": (weights, False),
    "activation_kurtosis": (activations, True),
    "perplexity": (perplexity, True),
    "jacobian_energy": (jacobian, True),
}
"""name → what runs, on a model and idx (sequences, T); whether it is compared with the forward passes."""
