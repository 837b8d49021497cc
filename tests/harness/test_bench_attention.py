"""What the benchmark of attention compares is what it says: the baseline is PyTorch's, the variants are ours."""

import argparse

import torch
from torch.nn import functional as F

from harness.bench_attention import STOCK, forward, inputs, names
from model import attention

ARGUMENTS = argparse.Namespace(B=2, H=3, D=8, dtype="float32", device="cpu")


def test_every_variant_is_the_attention_of_its_name():
    q, k, v = inputs(9, ARGUMENTS, torch.device("cpu"))[:3]
    assert q.shape == (2, 3, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(forward(STOCK, q, k, v), expected)
    assert {f"{n}/{b}" for n in ("softmax", "softmax1", "sink") for b in ("full", "diagonal", "ste")} <= set(names())
    found = forward("softmax1/ste", q, k, v)
    torch.testing.assert_close(found, attention(q, k, v, normalizer="softmax1"))
