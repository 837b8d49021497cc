"""What outliers are called, and where: names of tensors, channels, heads."""

import torch

from measure.activations import TensorStatistics
from measure.outliers import constant


def test_a_sequence_that_does_not_vary_has_a_note():
    tensor = TensorStatistics().update(torch.stack((torch.zeros(4, 3), torch.arange(12.0).view(4, 3))))
    rows = [{"name": "transformer.h.0"} | tensor.all.row()]
    assert constant(rows) == ["transformer.h.0: all equal within a sequence, so it has no per_sequence_kurtosis"]
