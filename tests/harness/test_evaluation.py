"""What an evaluation logs and says."""

import math

import pytest
import torch

from harness.batches import Windows
from harness.corpus import Corpus
from harness.evaluation import describe, outlier_metrics, validation_metrics
from tests.helpers import tiny_corpus, tiny_gpt


def test_a_model_that_diverges_does_not_print_hundreds_of_digits():
    said = describe({"val/loss": 700.25, "val/perplexity": math.exp(700), "val/bits_per_byte": math.nan, "other": 1.0})
    assert said == "val loss 700.2500, perplexity 1.014e+304, bits per byte nan"


def test_the_metrics_of_an_evaluation_are_numbers_by_name_and_leave_the_model_training(tmp_path):
    corpus = Corpus(tiny_corpus(tmp_path, letters=None))
    windows = {split: Windows(corpus, split, 12) for split in ("train", "val")}
    model = tiny_gpt(normalizer="sink", sink_init=0.5).train()
    found = outlier_metrics(model, windows, torch.device("cpu"))
    assert model.training
    assert found["normalizer/transformer.h.1.attn.sink"] == 0.5
    assert {name for name in found if name.startswith("sink_rate")} == {"sink_rate/train", "sink_rate/val"}
    assert found["weight_kurtosis/transformer.wte.weight"] == pytest.approx(0, abs=0.3)
    values = validation_metrics(math.log(8), windows["val"], "val_full")
    assert values == pytest.approx(
        {"val_full/loss": math.log(8), "val_full/perplexity": 8, "val_full/bits_per_byte": 3}
    )
