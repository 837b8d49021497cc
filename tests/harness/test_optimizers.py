"""The optimizers by their definitions: PyTorch's own, stepped by hand; what decays; the schedules; exact resume."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from harness.checkpoint import read_checkpoint
from harness.config import OptimizerConfig
from harness.config_files import load_config
from harness.errors import UserError
from harness.optimizers import (
    kinds_of,
    learning_rate,
    make_optimizer,
    parameter_groups,
    schedule_note,
    set_learning_rates,
)
from harness.resuming import restore_optimizer
from model import GPT
from tests.helpers import ROOT, TODAY, random_ids, save_model, tiny_gpt, train_by_hand
from tests.processes import assert_same_run, finished, finished_on_ranks, killed

NAMES = ("adamw", "sgd", "muon", "adamw_muon_embeddings")
every_name = pytest.mark.parametrize("name", NAMES)
# Grouped queries, an embedding and a head of their own, a normalizer that learns matrices.
SHAPES = {"gpt2": {}, "today": TODAY | {"normalizer": "kvbias"}}


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_the_configs(fused):
    model = tiny_gpt()
    settings = OptimizerConfig(lr=0.1, weight_decay=0.3, beta1=0.5, beta2=0.6, eps=1e-3)
    optimizer = make_optimizer(model, settings, fused)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.1, (0.5, 0.6), decay, fused)
        assert group["eps"] == 1e-3


def test_it_is_built_in_one_place():
    files = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py"), *ROOT.glob("scripts/*.py")]
    builders = [file.name for file in files if "AdamW(" in file.read_text(encoding="utf-8")]
    assert builders == ["optimizers.py"]


# --- each against PyTorch's own, on the same gradients ----------------------------------------------------------------


def by_hand(model: GPT, c: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """PyTorch's optimizers over leaves that share the memory of the model's parameters, q, k and v each a leaf."""
    learned, to_muon, to_rest = model.normalizer_parameters(), [], []

    def leaf(weight, rows=slice(None)):
        part = torch.nn.Parameter(weight.detach()[rows])
        part.of = (weight, rows)
        return part

    for name, weight in model.named_parameters():
        in_block, vector = ".h." in name, weight.dim() == 1 or name in learned
        if vector or c.name in ("adamw", "sgd") or (c.name == "muon" and not in_block):
            to_rest.append({"params": [leaf(weight)], "weight_decay": 0.0 if vector else 0.3})
        elif "c_attn" in name:
            q, k, _ = model.transformer.h[0].attn.sizes
            parts = (slice(0, q), slice(q, q + k), slice(q + k, None))
            to_muon.append({"params": [leaf(weight, rows) for rows in parts], "weight_decay": 0.3})
        else:
            to_muon.append({"params": [leaf(weight)], "weight_decay": 0.3})
    if c.name == "sgd":
        return [torch.optim.SGD(to_rest, lr=c.lr, momentum=0.9, nesterov=True)]
    optimizers = [torch.optim.AdamW(to_rest, lr=c.lr, betas=(0.9, 0.99), eps=1e-4)]
    if to_muon:
        lr = c.lr if c.muon_lr is None else c.muon_lr
        optimizers += [torch.optim.Muon(to_muon, lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")]
    return optimizers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "muon_lr"), [*((name, None) for name in NAMES), ("muon", 0.5)])
def test_each_steps_as_pytorchs_does_by_hand(name, muon_lr, shape):
    settings = OptimizerConfig(name=name, lr=0.01, muon_lr=muon_lr, weight_decay=0.3, eps=1e-4)
    model = tiny_gpt(noise=0.1, **SHAPES[shape])
    peer = copy.deepcopy(model)
    optimizer, parts = make_optimizer(model, settings, fused=False), by_hand(peer, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        gradients = {theirs: ours.grad for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True)}
        for part in parts:
            for leaf in (leaf for group in part.param_groups for leaf in group["params"]):
                weight, rows = leaf.of
                leaf.grad = gradients[weight][rows].clone()
            part.step()
        optimizer.step()
    peers = dict(peer.named_parameters())
    for key, p in model.named_parameters():
        assert not torch.equal(p, before[key])
        torch.testing.assert_close(p, peers[key], rtol=0, atol=1e-6)  # of 3 roundings of numbers below 5


# --- what decays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", ["matrices_and_embeddings", "matrices", "all"])
@every_name
def test_what_decays_is_chosen_by_name_and_never_changes_the_order(name, decay, shape):
    model = tiny_gpt(**SHAPES[shape])
    optimizer = make_optimizer(model, OptimizerConfig(name=name, decay=decay, weight_decay=0.3))
    names = {p: key for key, p in model.named_parameters()}
    grouped = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(key for key, _ in grouped) == sorted(names.values())  # each once
    free = [key for key, p in model.named_parameters() if p.dim() == 1 or ".null_" in key]
    free += ["transformer.wte.weight", "transformer.wpe.weight"] if decay == "matrices" else []
    for key, weight_decay in grouped:
        assert weight_decay == (0.0 if key in free and decay != "all" else 0.3), key
    usual = make_optimizer(model, OptimizerConfig(name=name)).param_groups
    assert [names[p] for group in usual for p in group["params"]] == [key for key, _ in grouped]
    if name == "adamw" and decay == "matrices_and_embeddings":
        assert len(optimizer.param_groups) == 2


def test_a_state_goes_on_with_the_parameter_that_it_is_of_when_what_decays_has_changed():
    settings = [OptimizerConfig(name="muon", decay=decay) for decay in ("matrices_and_embeddings", "matrices")]
    model = tiny_gpt()
    first, second = (make_optimizer(model, c) for c in settings)
    train_by_hand(model, first, steps=1)
    restore_optimizer(second, {"optimizer": first.state_dict()})
    for p in model.parameters():
        assert all(torch.equal(value, second.state[p][key]) for key, value in first.state[p].items())


def test_parameters_that_are_not_trained_are_in_no_group():
    model = tiny_gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    assert "transformer.wpe.weight" not in kinds_of(model)
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len(list(model.parameters())) - 1


# --- state ------------------------------------------------------------------------------------------------------------


@every_name
def test_a_state_that_was_saved_goes_on_bit_for_bit(name, tmp_path):
    settings = OptimizerConfig(name=name, lr=0.01, muon_lr=0.02 if "muon" in name else None)
    whole, optimizer = tiny_gpt(noise=0.1), None
    optimizer = make_optimizer(whole, settings)
    train_by_hand(whole, optimizer, steps=2)
    path = save_model(whole, tmp_path / "ckpt.pt", optimizer=optimizer.state_dict())
    checkpoint = read_checkpoint(path)
    resumed = tiny_gpt(seed=1)
    resumed.load_state_dict(checkpoint["model"])
    another = make_optimizer(resumed, settings)
    restore_optimizer(another, checkpoint)
    for model, its in ((whole, optimizer), (resumed, another)):
        train_by_hand(model, its, steps=3)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(value, another.state[other][key]) for key, value in optimizer.state[one].items())
        assert all(value.shape in (one.shape, ()) for value in optimizer.state[one].values())  # of a parameter each


@every_name
def test_a_step_whose_gradient_overflows_under_float16_leaves_no_trace(name):
    settings = OptimizerConfig(name=name, lr=0.01)
    models = [tiny_gpt(noise=0.1) for _ in range(2)]
    for model, overflows in zip(models, (True, False), strict=True):
        optimizer, scaler = make_optimizer(model, settings), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            if step == 0 and not overflows:
                continue
            x = random_ids(4, 13, seed=step)
            scaler.scale(model(x[:, :-1], x[:, 1:])[1]).backward()
            if step == 0:
                model.transformer.h[1].attn.c_attn.weight.grad[3, 3] = math.inf
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)  # scales are powers of 2


@pytest.mark.slow
@pytest.mark.usefixtures("training_folder")
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_killed_run_gives_the_losses_and_weights_of_one_never_stopped(name):
    """AdamW's is a test of train.py."""
    how = ("--optimizer.name", name, "--optimizer.schedule", "wsd")
    whole = finished("whole", *how)
    killed("killed", *how, at=13)
    assert_same_run(whole, finished("killed", *how))


@pytest.mark.slow
@pytest.mark.usefixtures("training_folder")
def test_two_ranks_train_as_one_with_muon():
    how = ("--optimizer.name", "muon", "--training.max_steps", "4")
    one, two = finished("one", *how), finished_on_ranks(2, "two", *how)
    ours, theirs = ([line["train/loss"] for line in run.metrics()[1:]] for run in (one, two))
    # Sums in another order: a few roundings, which Muon's bfloat16 makes some 2^-8 of a step.
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


# --- the schedule -----------------------------------------------------------------------------------------------------


def schedule(*changes: str):
    arguments = ("--optimizer.lr", "1.0", "--optimizer.min_lr", "0.1", "--optimizer.warmup_steps", "10")
    return load_config(["config.yaml", *arguments, "--training.max_steps", "110", *changes])


@pytest.mark.parametrize(
    ("how", "shares"),  # of the way from min_lr up to lr, after so many steps
    [
        (("cosine",), {10: 1, 35: 0.5 + 0.5 * math.sqrt(0.5), 60: 0.5, 85: 0.5 - 0.5 * math.sqrt(0.5), 110: 0}),
        (("linear",), {10: 1, 35: 0.75, 60: 0.5, 85: 0.25, 109: 0.01, 110: 0, 500: 0}),
        (("wsd",), {10: 1, 50: 1, 88: 1, 99: 0.5, 109: 1 / 22, 110: 0}),  # falls over the last 22
        (("wsd", "--optimizer.decay_share", "1"), {10: 1, 35: 0.75, 60: 0.5}),  # the whole, after the warm-up
        (("wsd", "--optimizer.decay_steps", "50"), {10: 1, 40: 1, 45: 0.5, 50: 0, 60: 0}),
    ],
)
@pytest.mark.usefixtures("training_folder")
def test_the_schedules_by_their_closed_forms(how, shares):
    config = schedule("--optimizer.schedule", *how)
    for done in range(10):
        assert learning_rate(done + 1, config) == pytest.approx((done + 1) / 11, rel=1e-15)
    for done, share in shares.items():
        assert learning_rate(done + 1, config) == pytest.approx(0.1 + 0.9 * share, rel=1e-14)
    steps = [learning_rate(step, config) for step in range(1, 130)]
    assert max(abs(a - b) for a, b in itertools.pairwise(steps)) <= 0.1  # no jump


@pytest.mark.usefixtures("training_folder")
def test_muon_keeps_its_own_peak_and_the_schedule_of_all():
    config = schedule("--optimizer.name", "muon", "--optimizer.muon_lr", "0.02")
    optimizer = make_optimizer(tiny_gpt(), config.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert sorted(set(peaks)) == pytest.approx([0.02, 1.0])
    for step in (1, 10, 11, 60, 200):
        assert set_learning_rates(optimizer, step, config) == (lr := learning_rate(step, config))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * peak for peak in peaks])


@pytest.mark.usefixtures("training_folder")
def test_a_warm_up_that_ends_after_the_decay_is_refused():
    """The rate jumped, from the height of the warm-up down to min_lr."""
    with pytest.raises(UserError, match=r"optimizer\.decay_steps: 10, where min_lr.*warmup_steps is 10\. Raise"):
        schedule_note(schedule("--optimizer.decay_steps", "10"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--optimizer.decay_steps", "24"), None),
        (("--optimizer.decay_steps", "5"), None),
        (("--optimizer.decay_steps", "5000"), "ends at 0.01 and not at min_lr, 0.001: training.max_steps is 24, "
         "optimizer.decay_steps 5000 and warmup_steps 2"),
        (("--optimizer.warmup_steps", "47"), "ends at 0.005 and not at min_lr, 0.001: training.max_steps is 24, "
         "optimizer.decay_steps 24 and warmup_steps 47"),
        (("--optimizer.decay_steps", "5000", "--optimizer.min_lr", "1e-2"), None),  # a constant rate
        (("--optimizer.min_lr", "1"), "rises after the warm-up, from lr, 0.01, towards min_lr, 1"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("training_folder")
def test_a_schedule_that_does_not_come_to_its_end_is_said(arguments, expected):
    note = schedule_note(load_config(["config.yaml", *arguments]))
    assert note == (expected and f"note: the learning rate {expected}")
