"""Slopes of the attention logits against finite differences, and directions against the optimizer itself."""

import copy
import math
from dataclasses import asdict

import pytest
import torch

from harness.config import OptimizerConfig
from harness.errors import UserError
from harness.optimizers import make_optimizer, parameter_groups, saved_optimizer
from measure.divergence import kl_divergence
from measure.probe import capture_qk
from measure.slopes import (
    adamw_direction,
    attention_slopes,
    float64_copy,
    gradient_direction,
    length,
    random_direction,
)
from model import GPT
from tests.helpers import every_normalizer, optimizer_of, random_ids, tiny_gpt, train_by_hand


def moved(model: GPT, direction: dict, tau: float) -> GPT:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += tau * direction[name]
    return other


@torch.no_grad()
def logits_of(model: GPT, idx: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer, (H, T, T + 1), the null slot last (−inf without one), from one ordinary forward pass."""
    with capture_qk(model) as captured:
        model(idx[None])
    found = []
    for attn, q, k in captured:
        logits = q[0] @ k[0].mT / math.sqrt(q.size(-1))
        nulls = {"softmax": -math.inf, "softmax1": 0.0}
        null = attn.sink if attn.normalizer == "sink" else torch.full((q.size(1),), nulls[attn.normalizer])
        found.append(torch.cat((logits, null.to(logits).view(-1, 1, 1).expand(-1, len(idx), 1)), -1))
    return found


@every_normalizer
@pytest.mark.parametrize("backward", ["full", "diagonal", "ste"])
def test_slopes_are_the_total_derivative_of_the_logits(normalizer, backward):
    model = float64_copy(tiny_gpt(noise=0.3, normalizer=normalizer, backward=backward))
    idx, direction, h = random_ids(12), random_direction(model, lr=1.0, seed=1), 1e-6
    plus, minus = (logits_of(moved(model, direction, t), idx) for t in (h, -h))
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    for (alpha0, slopes), here, up, down in zip(
        attention_slopes(model, direction, idx), logits_of(model, idx), plus, minus, strict=True
    ):
        null = normalizer != "softmax"
        assert alpha0.shape == slopes.shape == (2, 12, 13 if null else 12)
        seen = torch.cat((visible, torch.ones(12, 1, dtype=torch.bool)), -1)[:, : 12 + null]
        differences = ((up - down) / (2 * h))[..., : 12 + null]
        # off by h² of the third derivatives, some 1e4 here, and by ε/h of the logits, up to 100
        torch.testing.assert_close(slopes[:, seen], differences[:, seen], rtol=1e-7, atol=1e-7)
        # what a query cannot see has no weight, and does not widen the spread
        assert (alpha0[:, ~seen] == 0).all()
        assert (slopes.amax(-1) <= slopes.masked_fill(~seen, -math.inf).amax(-1)).all()
        assert (slopes.amin(-1) >= slopes.masked_fill(~seen, math.inf).amin(-1)).all()
        expected = here[..., : 12 + null].masked_fill(~seen, -math.inf).softmax(-1)
        torch.testing.assert_close(alpha0, expected, rtol=1e-12, atol=1e-15)
        if normalizer == "softmax1":
            assert (slopes[..., -1] == 0).all()
    assert [block.attn.backward_mode for block in model.transformer.h] == [backward] * 2


def test_a_small_real_step_moves_the_attention_by_half_the_variance():
    model = float64_copy(tiny_gpt(noise=0.3, normalizer="softmax1"))
    idx, direction, h = random_ids(12), random_direction(model, lr=1.0, seed=1), 1e-4
    after = list(attention_slopes(moved(model, direction, h), direction, idx))
    for (alpha0, slopes), (alpha_h, _) in zip(attention_slopes(model, direction, idx), after, strict=True):
        mean = (alpha0 * slopes).sum(-1, keepdim=True)
        variance = (alpha0 * (slopes - mean) ** 2).sum(-1)
        for kl in (kl_divergence(alpha0.log(), alpha_h.log()), kl_divergence(alpha_h.log(), alpha0.log())):
            # the next order is h, times derivatives of the size of the slopes, up to some 10
            torch.testing.assert_close(kl, h**2 * variance / 2, rtol=1e-2, atol=1e-13)


def info_of(optimizer) -> dict:
    return {"optimizer": copy.deepcopy(optimizer.state_dict()), "config": {"optimizer": {"grad_clip": 0.5, "lr": 7.0}}}


def next_update(model, batches, info: dict) -> dict:
    clip = info.get("config", {}).get("optimizer", {}).get("grad_clip")
    return adamw_direction(model, saved_optimizer(model, info, "ckpt.pt"), batches, clip)


@pytest.mark.parametrize("backward", ["full", "ste"])
def test_adamw_is_the_next_update_of_the_run(backward):
    model = tiny_gpt(noise=0.3, normalizer="sink", backward=backward).double()
    optimizer = optimizer_of(model)
    train_by_hand(model, optimizer, steps=3)
    info, copied = info_of(optimizer), float64_copy(model)
    batch = random_ids(4, 13, seed=0)
    halves = [(half[:, :-1], half[:, 1:]) for half in batch.split(2)]  # the mean over two is that of the whole
    direction = next_update(copied, halves, info)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_by_hand(model, optimizer, steps=1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(direction[name], p.detach() - before[name], rtol=1e-9, atol=1e-15)
        # the copy is where it was, up to nothing
        assert torch.equal(dict(copied.named_parameters())[name], before[name])


@pytest.mark.parametrize("name", ["sgd", "muon", "adamw_muon_embeddings"])
@pytest.mark.parametrize("momentum", [None, 0.0])
def test_it_is_that_of_the_runs_own_optimizer(name, momentum):
    settings = OptimizerConfig(name=name, lr=0.02, decay="matrices", momentum=momentum)
    model = tiny_gpt(noise=0.3).double()
    optimizer = make_optimizer(model, settings, fused=False)
    train_by_hand(model, optimizer, steps=3)
    info = info_of(optimizer) | {"config": {"optimizer": asdict(settings) | {"grad_clip": 0.5}}}
    batch = random_ids(4, 13, seed=0)
    direction = next_update(copied := float64_copy(model), [(batch[:, :-1], batch[:, 1:])], info)
    train_by_hand(model, optimizer, steps=1)
    for (key, after), before in zip(model.named_parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(direction[key], (after - before).detach(), rtol=1e-9, atol=1e-15)


def test_adamw_by_hand():
    model = tiny_gpt(noise=0.3).double()
    optimizer = optimizer_of(model)
    train_by_hand(model, optimizer, steps=2)
    x = random_ids(4, 13, seed=9)
    batch = [(x[:, :-1], x[:, 1:])]
    direction = next_update(float64_copy(model), batch, info_of(optimizer) | {"config": {}})
    model(*batch[0])[1].backward()
    for name, decay in (("transformer.h.1.mlp.c_fc.weight", 0.1), ("transformer.h.0.ln_1.weight", 0.0)):
        p = dict(model.named_parameters())[name]
        state, g = optimizer.state[p], p.grad
        m = (0.9 * state["exp_avg"] + 0.1 * g) / (1 - 0.9**3)
        v = (0.99 * state["exp_avg_sq"] + 0.01 * g * g) / (1 - 0.99**3)
        torch.testing.assert_close(
            direction[name], -3e-3 * (decay * p + m / (v.sqrt() + 1e-8)).detach(), rtol=1e-8, atol=1e-12
        )


def test_gradient_and_random_have_the_learning_rate_as_root_mean_square():
    model = float64_copy(tiny_gpt(noise=0.3))
    x = random_ids(4, 13)
    down, at_random = gradient_direction(model, [(x[:, :-1], x[:, 1:])], 1e-3), random_direction(model, 1e-3, 0)
    count = sum(p.numel() for p in model.parameters())
    for direction in (down, at_random):
        assert list(direction) == [name for name, _ in model.named_parameters()]
        assert length(direction) == pytest.approx(1e-3 * math.sqrt(count), rel=1e-12)
    model(x[:, :-1], x[:, 1:])[1].backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    along = sum((down[name] * g).sum() for name, g in gradient.items())
    assert along.item() == pytest.approx(-length(down) * length(gradient), rel=1e-12)
    assert length(random_direction(model, 1e-3, 0)) == length(at_random)
    assert not torch.equal(
        random_direction(model, 1e-3, 1)["transformer.wte.weight"], at_random["transformer.wte.weight"]
    )


def test_an_optimizer_state_that_is_not_there_or_does_not_fit():
    model = tiny_gpt(noise=0.3)
    optimizer = optimizer_of(model)
    train_by_hand(model, optimizer, steps=1)
    info, x = info_of(optimizer), random_ids(4, 13)
    batch = [(x[:, :-1], x[:, 1:])]
    fresh = {"optimizer": optimizer_of(tiny_gpt(noise=0.3)).state_dict()}
    for nothing in ({}, {"source": "hf:gpt2"}, fresh):
        with pytest.raises(UserError, match=r"ckpt\.pt holds no optimizer state.*--direction gradient"):
            next_update(float64_copy(model), batch, nothing)
    for changes in ({"n_layer": 3}, {"n_embd": 16}):
        with pytest.raises(UserError, match=r"does not fit its model.*--direction gradient"):
            next_update(float64_copy(tiny_gpt(noise=0.3, **changes)), batch, info)
    momentum = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1, momentum=0.9)
    train_by_hand(model, momentum, steps=1)
    with pytest.raises(UserError, match="--direction gradient"):
        next_update(float64_copy(model), batch, info_of(momentum))
    with pytest.raises(UserError, match=r"is not sgd's: take --direction gradient"):
        next_update(float64_copy(model), batch, info | {"config": {"optimizer": {"name": "sgd"}}})
