"""What outliers are called, and where: names of tensors, channels, heads."""

import torch

from measure.activations import TensorStatistics
from measure.outliers import constant, where_largest


def test_a_sequence_that_does_not_vary_has_a_note():
    tensor = TensorStatistics().update(torch.stack((torch.zeros(4, 3), torch.arange(12.0).view(4, 3))))
    rows = [{"name": "transformer.h.0"} | tensor.all.row()]
    assert constant(rows) == ["transformer.h.0: all equal within a sequence, so it has no per_sequence_kurtosis"]


def test_the_summarys_maxima_say_which_tensor_they_are_of():
    names = (
        "transformer.h.0",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.1.mlp.gelu",
        "transformer.h.0 [first token]",
    )
    values = ((3.0, 7.0), (4.0, 5.0), (99.0, 99.0), (99.0, 99.0))  # the last two are not among Bondarenko et al.'s
    rows = [
        {"name": name, "per_sequence_kurtosis": kurtosis, "per_sequence_max_abs": largest, "excess_kurtosis": 0.0}
        for name, (kurtosis, largest) in zip(names, values, strict=True)
    ]
    expected = ["max kurtosis: 4, of transformer.h.1.mlp.c_proj", "max infinity norm: 7, of transformer.h.0"]
    assert where_largest(rows) == expected
    rows[0]["per_sequence_kurtosis"] = None
    assert where_largest(rows) == expected[1:]
