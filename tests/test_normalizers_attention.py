"""Attention by an entry of the table alone, without a model: its backward passes, its null slot, what it refuses."""

import math

import numpy as np
import pytest
import torch

from kernels.backends import use_backend
from measure.jacobian import jacobian_energy
from model import NORMALIZERS, GPTConfig, Normalizer, attention, attention_rows, softmax_weights
from tests.test_normalizers import ENTRIES, GAMMA, ZETA, clipped, own_weights


@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_the_backward_passes_are_those_of_the_definition(backward, monkeypatch):
    monkeypatch.setitem(NORMALIZERS, "own_clipped", ENTRIES["own_clipped"])
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    q.requires_grad_()
    out = attention(q, k, v, normalizer="own_clipped", backward=backward, scale=1.0)
    np.testing.assert_allclose(out.detach(), own_weights("own_clipped", q.detach(), 3**0.5 * k) @ v.numpy(), rtol=1e-12)
    (found,) = torch.autograd.grad(out, q, grad)
    for h, i in np.ndindex(2, 5):
        g = (v[0, h, : i + 1] @ grad[0, h, i]).numpy()
        p = torch.softmax(k[0, h, : i + 1] @ q.detach()[0, h, i], 0).numpy()
        P = (ZETA - GAMMA) * p + GAMMA
        inside = (P > 0) & (P < 1)
        jacobian = (ZETA - GAMMA) * inside[:, None] * (np.diag(p) - np.outer(p, p))
        dS = {"full": jacobian.T @ g, "diagonal": np.diag(jacobian) * g, "ste": g}[backward]
        np.testing.assert_allclose(found[0, h, i], dS @ k[0, h, : i + 1].numpy(), rtol=1e-11, atol=1e-14)


def test_what_an_entry_cannot_do_is_refused(monkeypatch):
    for name, entry in ENTRIES.items():
        monkeypatch.setitem(NORMALIZERS, name, entry)
    q = torch.zeros(1, 2, 3, 4)
    for arguments, named in (
        (
            {"normalizer": "own_sigmoid", "backward": "diagonal", "bias": torch.zeros(2)},
            "'own_sigmoid' has no backward 'diag",
        ),
        ({"normalizer": "own_clipped", "backward": "detached"}, "'own_clipped' has no backward 'detached'"),
        ({"normalizer": "own_sigmoid"}, "takes the parameters bias, and not none"),
        ({"normalizer": "own_clipped", "bias": torch.zeros(2)}, "takes no parameters, and not bias"),
        ({"normalizer": "own_clipped", "null_logit": torch.zeros(2)}, "'own_clipped' has no null slot"),
    ):
        with pytest.raises(ValueError, match=named):
            attention(q, q, q, **arguments)
    with pytest.raises(ValueError, match="'own_sigmoid' has no backward 'diagonal'"):
        GPTConfig(normalizer="own_sigmoid", backward="diagonal")
    with use_backend("cpu_flash"), pytest.raises(ValueError, match="'cpu_flash' has no normalizer 'own_clipped'"):
        attention(q, q, q, normalizer="own_clipped")
    with pytest.raises(ValueError, match="null_logit or queries go with softmax_weights"):
        Normalizer(clipped, null_logit=0.0)
    with pytest.raises(ValueError, match="takes no parameter"):
        Normalizer(softmax_weights, parameters={"bias": lambda config: torch.zeros(1)})


def test_a_key_before_its_time_has_no_weight_whatever_the_entry_returns(monkeypatch):
    monkeypatch.setitem(NORMALIZERS, "even", Normalizer(torch.ones_like))
    q = torch.zeros(1, 1, 3, 2)
    P, null = attention_rows(q, q, normalizer="even")
    assert null is None
    assert torch.equal(P[0, 0], torch.ones(3, 3).tril())
    v = torch.tensor([1.0, 10, 100]).view(1, 1, 3, 1).expand(1, 1, 3, 2)
    assert attention(q, q, v, normalizer="even")[0, 0, :, 0].tolist() == [1, 11, 111]


def test_a_null_logit_of_another_number_is_a_softmax_n(monkeypatch):
    """softmax_n, log n as null logit: a number in the table, and fused like softmax1."""
    monkeypatch.setitem(NORMALIZERS, "softmax_4", Normalizer(softmax_weights, null_logit=math.log(4)))
    q, k, v = torch.randn(3, 1, 3, 9, 4, generator=torch.Generator().manual_seed(5))
    P, null = attention_rows(q.double(), k.double(), normalizer="softmax_4")
    first = math.exp((q[0, 0, 0].double() @ k[0, 0, 0].double()).item() / 2)
    assert P[0, 0, 0, 0].item() == pytest.approx(first / (4 + first), rel=1e-14)
    assert null[0, 0, 0, 0].item() == pytest.approx(4 / (4 + first), rel=1e-14)
    fused = attention(q, k, v, normalizer="softmax_4")
    torch.testing.assert_close(fused, (P @ v.double()).float())


@pytest.mark.parametrize("null_logit", [None, torch.tensor([0.5, -2.0])])
def test_the_general_split_of_a_softmax_is_its_closed_form(null_logit, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 2, 7, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    name, closed_takes, general_takes = "softmax", {}, {}
    if null_logit is not None:
        name, closed_takes, general_takes = "sink", {"null_logit": null_logit.double()}, {"b": null_logit.double()}
    general = Normalizer(
        lambda scores, b=None: softmax_weights(scores, b),
        parameters=dict.fromkeys(general_takes, lambda _config: torch.zeros(2)),
        diagonal=lambda scores, weights, b=None: weights * (1 - weights),
        detached=lambda scores, weights, b=None: weights,
    )
    monkeypatch.setitem(NORMALIZERS, "general", general)
    closed = jacobian_energy(q, k, v, grad, name, **closed_takes)
    found = jacobian_energy(q, k, v, grad, "general", **general_takes)
    for column, values in closed.items():
        if column not in ("jacobian_offdiag", "entropy"):  # which are of a softmax, and of a row over its own mass
            torch.testing.assert_close(found[column], values, rtol=1e-11, atol=1e-13)
