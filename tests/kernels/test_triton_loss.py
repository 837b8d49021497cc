"""The Triton kernel of the loss against PyTorch in float64: on a GPU if there is one, else in the interpreter."""

import pytest
import torch
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as _environment:
    if DEVICE == "cpu":
        _environment.setenv("TRITON_INTERPRET", "1")  # before the first import of triton
    pytest.importorskip("triton", reason="Triton is not installed (requirements-dev.txt)")
    from kernels import triton_loss
    from kernels.loss import IGNORED

# Of slopes below 1: of exp(x − lse), where both are below 80 and rounded, or of a half type. The interpreter has no
# bfloat16 that rounds.
TOLERANCE = {torch.float32: 80 * 2**-24, torch.float16: 2**-11} | ({torch.bfloat16: 2**-8} if DEVICE == "cuda" else {})


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("V", [1, 64, 150])
def test_losses_and_slopes(dtype, V, monkeypatch):
    monkeypatch.setattr(triton_loss, "BLOCK", 64)
    logits = (20 * torch.randn(9, V, generator=torch.Generator().manual_seed(V))).to(DEVICE, dtype)
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[3] = IGNORED
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="none")
    (slopes,) = torch.autograd.grad(expected.sum(), exact)

    before = logits.clone()
    losses = triton_loss.cross_entropy_(logits, targets, IGNORED, slopes=False)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(triton_loss.cross_entropy_(logits, targets, IGNORED, slopes=True), losses)
    torch.testing.assert_close(logits.double(), slopes, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("target", [-100, 64])
def test_a_target_that_is_no_column_is_nan_not_the_memory_beside_the_row(target):
    logits = torch.zeros(9, 64, device=DEVICE)
    targets = torch.full((9,), 3, device=DEVICE)
    targets[4] = target
    losses = triton_loss.cross_entropy_(logits, targets, IGNORED, slopes=False)
    assert losses.isnan().tolist() == (targets == target).tolist()
