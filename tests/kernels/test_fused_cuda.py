"""What is expected of CUDA's kernels, as far as it can be seen without a GPU: shapes, signatures and layouts."""

import pytest
import torch

from kernels import fused
from kernels.backends import use_backend
from kernels.fused import FusedAttention
from model import attention
from tests.helpers import B, H


@pytest.mark.parametrize("backend", ["cuda_flash", "cuda_efficient", "cuda_cudnn"])
@pytest.mark.parametrize("backward", ["full", "diagonal"])
@pytest.mark.parametrize("H_kv", [1, H])
def test_the_kernels_of_cuda_take_and_give_what_is_expected_of_them(backend, backward, H_kv, monkeypatch):
    """Shapes and signatures alone, on tensors without data; the numbers need a GPU."""
    monkeypatch.setenv("OFFBYONE_TRITON", "0")
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.empty(B, heads, 70, 64, **options) for heads in (H, H_kv, H_kv))
    b = torch.empty(H, device="meta", requires_grad=True)
    out = FusedAttention.apply(q, k, v, b, backward, 0.0, 0.125, backend)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    for x, gradient in zip((q, k, v, b), torch.autograd.grad(out.sum(), (q, k, v, b)), strict=True):
        assert (x.shape, x.dtype) == (gradient.shape, gradient.dtype)


LAYOUTS = []


@torch.library.custom_op("offbyone_tests::backward", mutates_args=())
def stand_in(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For cuDNN's backward: the layouts that it is given when it runs."""
    LAYOUTS.append((q.stride(), out.stride(), grad.stride()))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@stand_in.register_fake
def _(grad, q, k, v, out, lse):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.mark.parametrize("variant", ["softmax", "softmax1"])
def test_cudnn_gets_the_gradient_in_one_layout_compiled_or_not(variant, monkeypatch):
    """PyTorch looks up cuDNN's plans by the strides of q, k and v alone, and a compiled graph hands dL/dO over in
    another layout: the second of two layouts would run on the plan of the first."""

    def forward(q, k, v, bias, with_lse, dropout_p, is_causal, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, dropout_p, is_causal, scale=scale)
        return out, lse.unsqueeze(-1), None, None, None, None, torch.zeros(()), torch.zeros(()), None

    def backward(grad, q, k, v, out, lse, *rest, scale):
        return stand_in(grad, q, k, v, out, lse)

    monkeypatch.setattr(fused, "CUDNN", forward)
    monkeypatch.setattr(fused, "CUDNN_BACKWARD", backward)
    LAYOUTS.clear()
    torch.compiler.reset()
    size = 8  # others are padded to a multiple of it, into tensors that lie one after another
    packed = torch.randn(B, 6, 3 * H * size)
    q, k, v = (x.view(B, 6, H, size).transpose(1, 2).detach().requires_grad_() for x in packed.split(H * size, -1))
    grad = torch.randn(B, 6, H, size).transpose(1, 2)
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        for g in (grad, grad.contiguous()):
            with use_backend("cuda_cudnn"):
                out = function(q, k, v, normalizer=variant)
            torch.autograd.grad(out, (q, k, v), g)
    assert len(LAYOUTS) == 4
    assert len(set(LAYOUTS)) == 1
    assert LAYOUTS[0][1] == LAYOUTS[0][2]
