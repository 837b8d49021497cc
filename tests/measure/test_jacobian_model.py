"""The split of a whole model's gradients, sequence by sequence, also against Hugging Face's attention."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness.checkpoint import load_model
from harness.corpus import Corpus
from measure import jacobian
from measure.jacobian import (
    backpropagate,
    backward_mode,
    cosine_and_norm_ratio,
    dot_products,
    jacobian_energy,
    pool,
    take_gradients,
)
from measure.probe import capture_attention
from model import GPT, attention
from tests.helpers import shakespeares_nanogpt, tiny_gpt
from tests.measure.test_jacobian import every_normalizer


def random_gpt(normalizer: str = "softmax", **changes) -> GPT:
    return tiny_gpt(3, noise=0.4, normalizer=normalizer, **changes)


def windows(B=3, T=12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


@every_normalizer
def test_captured_tensors_give_the_gradients_that_autograd_gives(normalizer):
    """dL/dO and q, k, v are right if the gradient of c_attn's output follows from them; and the hooks are gone."""
    model = random_gpt(normalizer).double()
    x, y = windows()
    before = model(x, y)[0]
    grads = []
    handles = [
        block.attn.c_attn.register_full_backward_hook(lambda _m, _i, grad: grads.insert(0, grad[0]))
        for block in model.transformer.h
    ]
    with capture_attention(model) as captured:
        _, loss = model(x, y)
        loss.backward()
    for handle in handles:
        handle.remove()
    assert [attn for attn, *_ in captured] == [block.attn for block in model.transformer.h]
    for (attn, q, k, v, grad_out), expected in zip(captured, grads, strict=True):
        q, k, v = (z.clone().requires_grad_() for z in (q, k, v))
        null_logit = attn.sink if normalizer == "sink" else None
        attention(q, k, v, normalizer=normalizer, null_logit=null_logit).backward(grad_out)
        found = torch.cat([z.grad.transpose(1, 2).flatten(2) for z in (q, k, v)], dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]
    assert hooks == []
    assert torch.equal(model(x, y)[0], before)


@every_normalizer
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_sequence_by_sequence_is_the_gradient_of_the_batch(normalizer, backward):
    model, (x, y) = random_gpt(normalizer).double(), windows()
    with backward_mode(model, backward):
        loss = backpropagate(model, x, y)
        found = take_gradients(model)
    assert all(p.grad is None for p in model.parameters())
    assert [block.attn.backward_mode for block in model.transformer.h] == ["full", "full"]
    other = random_gpt(normalizer, backward=backward).double()
    _, expected = other(x, y)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-14)
    for name, parameter in other.named_parameters():
        scale = parameter.grad.abs().max()  # sums of a few hundred terms, in another order
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-13 * scale.item())


def test_splits_of_a_batch_are_of_the_batchs_mean_loss():
    model, (x, y) = random_gpt("softmax1").double(), windows()
    splits = [[], []]
    backpropagate(model, x, y, splits)
    take_gradients(model)
    with capture_attention(model) as captured:
        model(x, y)[1].backward()
    for layer, (_, *tensors) in enumerate(captured):
        whole = jacobian_energy(*tensors, "softmax1")
        for name, value in pool(splits[layer]).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-20)


def test_cosine_and_norm_ratio_by_numpy(monkeypatch):
    monkeypatch.setattr(jacobian, "BLOCK_ELEMENTS", 7)
    a, b = np.random.default_rng(0).standard_normal((2, 5, 6))
    products = dot_products(torch.from_numpy(a), torch.from_numpy(b))
    cosine, ratio = cosine_and_norm_ratio(products)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert cosine == pytest.approx((a * b).sum() / norms[0] / norms[1], rel=1e-13)
    assert ratio == pytest.approx(norms[0] / norms[1], rel=1e-13)
    zero = torch.zeros(5, 6, dtype=torch.float64)
    assert cosine_and_norm_ratio(dot_products(zero, torch.from_numpy(b))) == (None, 0.0)
    assert cosine_and_norm_ratio(dot_products(torch.from_numpy(a), zero)) == (None, None)


def test_the_split_is_that_of_hugging_faces_attention(nanogpt):
    """From the gradients of the attention weights that their eager attention returns."""
    checkpoint, peer, corpus = nanogpt
    ids, splits = torch.from_numpy(Corpus(corpus).tokens["val"][:65].astype(np.int64)), [[], []]
    x, y = ids[:-1].view(4, 16), ids[1:].view(4, 16)
    loss = backpropagate(load_model(checkpoint)[0].double(), x, y, splits)
    output = peer(x, output_attentions=True)
    for P in output.attentions:
        P.retain_grad()
    expected = F.cross_entropy(output.logits.flatten(0, 1), y.flatten())
    expected.backward()
    peer.zero_grad()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for layer, P in enumerate(output.attentions):
        found, g, P = pool(splits[layer]), P.grad.tril(), P.detach()
        full, diagonal = P * (g - (P * g).sum(-1, keepdim=True)), P * (1 - P) * g
        energies = {"e_full": full, "e_diag": diagonal, "e_lateral": full - diagonal}
        for name, x in energies.items():
            # Their logits are ours up to some hundred roundings, and so are the gradients.
            torch.testing.assert_close(found[name], x.square().sum((0, 2, 3)), rtol=1e-9, atol=0)
        torch.testing.assert_close(found["entropy"], torch.special.entr(P).sum(-1).mean((0, 2)), rtol=1e-9, atol=0)


def test_figures_of_shakespeares_nanogpt():
    checkpoint, ids = shakespeares_nanogpt()
    model = load_model(checkpoint)[0].double()
    ids, splits = torch.from_numpy(ids[: 32 * 64 + 1]), [[], []]
    loss = backpropagate(model, ids[:-1].view(32, 64), ids[1:].view(32, 64), splits)
    assert loss == pytest.approx(2.509927359, abs=5e-10)
    names = ["entropy", "r_diag", "r_lateral", "r_cross", "cos_diag", "cos_ste", "jacobian_diag", "jacobian_offdiag"]
    for (layer, head), expected in {
        (0, 0): (3.094014, 0.942443, 0.075507, -0.017950, 0.972982, 0.740674, 0.047045, 0.007375),
        (0, 1): (2.999989, 0.844221, 0.044521, 0.111258, 0.980240, 0.763348, 0.050588, 0.007976),
        (1, 1): (2.911717, 1.274319, 0.705432, -0.979750, 0.724375, 0.531659, 0.054012, 0.008961),
    }.items():
        columns = pool(splits[layer])
        assert [columns[name][head].item() for name in names] == pytest.approx(expected, abs=5.1e-7, rel=0)
        parts = sum(columns[f"e_{part}"][head] for part in ("diag", "lateral", "cross"))
        assert parts.item() == pytest.approx(columns["e_full"][head].item(), rel=1e-12)
