"""What an evaluation logs, as metrics by name, and says in a line."""

import math

from harness.batches import Windows
from measure.moments import whole
from measure.outliers import activation_metrics
from measure.probe import weight_kurtosis
from model import GPT


def outlier_metrics(model: GPT, windows: dict[str, Windows], device) -> dict[str, float | None]:
    """What shows outliers in the weights and, on the same few windows of each split every time, in the activations; and
    what the normalizer has learned: each of its parameters, or of a vector the norm, averaged over heads."""
    metrics = {f"weight_kurtosis/{name}": value for name, value in weight_kurtosis(model).items()}
    for name, p in model.normalizer_parameters().items():
        p = whole(p)
        metrics[f"normalizer/{name}"] = (p if p.dim() == 1 else p.norm(dim=-1)).mean().item()
    model.eval()
    for split, of_split in windows.items():
        full = of_split.shortened()
        x, _ = full.gather(full.whole(8), device)
        for name, value in activation_metrics(model, x).items():  # what/where → what/split/where
            what, _, where = name.partition("/")
            metrics[f"{what}/{split}/{where}".rstrip("/")] = value
    model.train()
    return metrics


def validation_metrics(loss: float, windows: Windows, family: str = "val") -> dict[str, float]:
    metrics = {f"{family}/loss": loss, f"{family}/perplexity": math.exp(min(loss, 700))}
    if bytes_per_target := windows.bytes_per_target:
        metrics[f"{family}/bits_per_byte"] = loss / math.log(2) / bytes_per_target
    return metrics


def describe(metrics: dict[str, float]) -> str:
    names = {"val/loss": "val loss", "val/perplexity": "perplexity", "val/bits_per_byte": "bits per byte"}
    return ", ".join(f"{names[k]} {v:{'.4f' if v < 1e6 else '.4g'}}" for k, v in metrics.items() if k in names)
