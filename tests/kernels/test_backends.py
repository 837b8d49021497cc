"""Which kernel computes attention, how one is forced, and what is refused."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.backends import materialized_attention, native, reads_groups, use_backend
from model import (
    attention,
    attention_backend,
)
from tests.helpers import VARIANTS, B, D, H, both_dtypes, every_variant, qkv


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"'flash'.*cpu_flash"), use_backend("flash"):
        pass


def test_a_backend_refuses_what_it_cannot_do():
    q, k, v = qkv(3, 3)
    for backend, arguments, named in (
        ("stock", {"normalizer": "softmax1"}, "'stock' has neither a null_logit"),
        ("stock", {"backward": "ste"}, "'stock' has .*'ste'"),
        ("cpu_flash", {"dropout_p": 0.1, "backward": "ste"}, "'cpu_flash' has no dropout.*0.1"),
    ):
        with use_backend(backend), pytest.raises(ValueError, match=named):
            attention(q, k, v, **arguments)


@pytest.mark.skipif(not native(), reason="without the CPU's own kernel another is fused")
@pytest.mark.parametrize(("T_q", "T_k"), [(64, 64), (64, 65), (1, 2), (65, 200)])
def test_short_queries_are_materialized_on_a_context_and_not_beside_a_null_key(T_q, T_k):
    q, k = torch.empty(1, 2, T_q, 8), torch.empty(1, 2, T_k, 8)
    assert attention_backend(q, k) == "cpu_native"
    assert attention_backend(q[:, :, -64:], torch.empty(1, 2, T_k + 64, 8)) == "materialized"


@both_dtypes
@every_variant
def test_views_of_one_projection_go_in_without_a_copy(variant, dtype):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            if any(torch.is_tensor(x) and x.dim() == 4 for x in arguments):  # the null logit may be converted
                called.append(str(operator))
                inputs.update(x.data_ptr() for x in arguments[:3] if torch.is_tensor(x))
            return operator(*arguments, **(keywords or {}))

    called, inputs = [], set()
    packed = torch.randn(B, 9, 3 * H * D, dtype=dtype)
    views = [x.view(B, 9, H, D).transpose(1, 2) for x in packed.split(H * D, dim=-1)]
    with Record():
        attention(*views, **VARIANTS[variant][0])
    assert not [name for name in called if "copy" in name or "clone" in name or "pad" in name]
    assert {x.data_ptr() for x in views} <= inputs


def test_the_readable_form_is_left_with_its_context_even_by_an_error():
    q, k, v = qkv(300, 300)

    def largest_saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attention(q, k, v, normalizer="softmax1")
        return max(sizes)

    with materialized_attention():
        assert largest_saved() == B * H * 300 * 300
    with contextlib.suppress(KeyError), materialized_attention():
        raise KeyError
    assert largest_saved() == B * H * 300 * D


@pytest.mark.gpu
def test_cuda_chooses_a_fused_kernel_or_says_that_there_is_none():
    def chosen(dtype, D=64, T_q=128, **arguments):
        q, k = (
            torch.empty(1, 1, T_q, D, device="cuda", dtype=dtype),
            torch.empty(1, 1, 128, D, device="cuda", dtype=dtype),
        )
        return attention_backend(q, k, **arguments)

    fused = "cuda_cudnn" if torch.cuda.get_device_capability()[0] == 9 else "cuda_flash"
    assert chosen(torch.float32) == chosen(torch.bfloat16, D=264) == "cuda_efficient"
    assert chosen(torch.bfloat16) == chosen(torch.bfloat16, T_q=100) == fused
    assert chosen(torch.float16, dropout_p=0.1) == chosen(torch.bfloat16, D=136) == "cuda_flash"
    assert chosen(torch.bfloat16, stock=True) == ("cuda_cudnn" if fused == "cuda_cudnn" else "stock")
    with pytest.warns(UserWarning, match="float64"):
        assert chosen(torch.float64) == "materialized"


@pytest.mark.parametrize(
    ("capability", "D", "dtype", "dropout_p", "expected"),
    [
        ((9, 0), 64, torch.bfloat16, 0.0, "cuda_cudnn"),
        ((9, 0), 64, torch.bfloat16, 0.1, "cuda_flash"),
        ((9, 0), 256, torch.bfloat16, 0.0, "cuda_flash"),
        ((9, 0), 64, torch.float32, 0.0, "cuda_efficient"),
        ((8, 0), 256, torch.float16, 0.0, "cuda_flash"),
        ((8, 9), 192, torch.float16, 0.0, "cuda_flash"),
        ((8, 9), 256, torch.float16, 0.0, "cuda_efficient"),
        ((7, 5), 64, torch.float16, 0.0, "cuda_efficient"),
    ],
)
def test_a_gpu_gets_the_kernel_that_it_can_train_on(capability, D, dtype, dropout_p, expected, monkeypatch):
    """By what a card says of itself; that the kernels then run there needs the card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, size=torch.Size((1, 1, 128, D)).__getitem__)
    assert attention_backend(q, q, dropout_p) == expected
    # Its efficient kernel alone cannot read keys of a group, and its function would leave that one for a T × T matrix.
    assert reads_groups(expected, q) == reads_groups("stock", q) == (expected != "cuda_efficient")
    # PyTorch's own function would choose cuDNN on a Hopper itself, and may run it on another plan than its own.
    assert attention_backend(q, q, dropout_p, stock=True) == ("cuda_cudnn" if expected == "cuda_cudnn" else "stock")


def test_a_deterministic_run_has_no_kernel_that_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    size = torch.Size((1, 1, 128, 64)).__getitem__
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, size=size)
    assert [attention_backend(q, q, stock=stock) for stock in (False, True)] == ["cuda_flash", "stock"]
