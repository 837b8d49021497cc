"""What the benchmark of attention compares is what it says: the baseline is PyTorch's, the variants are ours."""

import argparse
import sys

import torch
from torch.nn import functional as F

from harness import bench_attention
from harness.bench_attention import STOCK, bench_length, forward, inputs, names
from harness.errors import run_cli
from model import attention
from scripts import bench_attention as script

ARGUMENTS = argparse.Namespace(
    B=2, H=4, H_kv=4, D=8, dtype="float32", device="cpu", seconds=1e-9, variants=["softmax*/*", "sink/full"]
)


def test_every_variant_is_the_attention_of_its_name():
    q, k, v = inputs(9, ARGUMENTS, torch.device("cpu"))[:3]
    assert q.shape == (2, 4, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(forward(STOCK, q, k, v), expected)
    assert {f"{n}/{b}" for n in ("softmax", "softmax1", "sink") for b in ("full", "diagonal", "ste")} <= set(names())
    found = forward("softmax1/ste", q, k, v)
    torch.testing.assert_close(found, attention(q, k, v, normalizer="softmax1"))


def test_grouped_keys_are_compared_with_the_same_keys_repeated(monkeypatch, tmp_path, capsys):
    grouped, taken = argparse.Namespace(**vars(ARGUMENTS) | {"H_kv": 2}), []
    q, k, v = inputs(9, grouped, torch.device("cpu"))[:3]
    assert k.shape == v.shape == (2, 2, 9, 8)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    for name in (STOCK, "softmax1/full"):
        torch.testing.assert_close(forward(name, q, k, v), forward(name, q, *repeated))

    def noted(name, q, k, v):
        taken.append((name, k.size(1)))
        return forward(name, q, k, v)

    monkeypatch.setattr(bench_attention, "forward", noted)
    for row in bench_length(9, grouped, torch.device("cpu")):
        assert (row["repeated"] is None) == (row["variant"] == STOCK)
        read = {heads for name, heads in taken if name == row["variant"]}
        assert read == ({2} if row["variant"] == STOCK else {2, 4})

    words = f"--T 9 --H 4 --D 8 --seconds 1e-9 --memory --device cpu --out {tmp_path}".split()
    for own, said in ((["--H-kv", "2"], "H 4 on 2 of keys"), ([], "H 4, D 8")):
        monkeypatch.setattr(sys, "argv", ["bench_attention.py", *words, *own])
        assert not run_cli(script.main)
        printed = capsys.readouterr().out
        assert said in printed
        assert ("repeated" in printed) == bool(own)
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *words, "--H-kv", "3"])
    assert run_cli(script.main) == 2
    assert "--H-kv 3 does not divide --H 4" in capsys.readouterr().err
