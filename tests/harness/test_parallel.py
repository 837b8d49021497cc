"""Several ranks that train one model, each with a copy of it or with a share, do what one process does."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from harness.config import OptimizerConfig
from harness.distributed import Ranks
from harness.optimizers import make_optimizer
from harness.parallel import placed, recompute_activations
from measure.feedback import apply_feedback
from measure.moments import whole
from model import NORMALIZERS
from tests.helpers import BACKWARDS, TODAY, random_ids, tiny_gpt
from tests.processes import TrainingRun, assert_same_run, finished, finished_on_ranks, on_ranks, started_on_ranks

# 20 steps of 6 sequences, which 1, 2 and 3 ranks can share. Every loss is logged, and no outliers: half of the time.
STEPS = ("--training.max_steps", "20", "--training.batch_size", "6", "--training.checkpoint_interval", "8")
STEPS += ("--evaluation.kurtosis", "false")
FSDP = ("--training.parallel", "fsdp")


def losses(run: TrainingRun) -> list[float]:
    return [line["train/loss"] for line in run.metrics() if "train/loss" in line]


def test_one_two_and_three_ranks_copies_and_shares_give_the_same_losses(training_folder):
    alone = finished("one", *STEPS)
    assert len(losses(alone)) == 20
    for number, parallel in product((2, 3), ((), FSDP)):
        run = finished_on_ranks(number, f"on{number}{len(parallel)}", *STEPS, *parallel)
        np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)


def test_three_copies_that_stop_go_on_bit_for_bit(training_folder):
    """Of three numbers the sum depends on the order, and this on where DDP's buckets have a gradient."""
    how = (*STEPS, "--optimizer.decay_steps", "20", "--training.max_steps")
    straight = finished_on_ranks(3, "straight", *how, "4")
    finished_on_ranks(3, "stopped", *how, "2")
    continued = finished_on_ranks(3, "stopped", *how, "4")
    assert losses(continued) == losses(straight)
    one, other = straight.checkpoint()["model"], continued.checkpoint()["model"]
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def watch_gradients() -> None:
    import train

    def on_all_ranks(model, ranks, on_all_ranks=train.on_all_ranks):
        wrapped = on_all_ranks(model, ranks)

        def set_learning_rates(*arguments, set_learning_rates=train.set_learning_rates):
            (bucket,) = {p.grad.untyped_storage().data_ptr() for p in wrapped.parameters()}
            assert bucket, "gradients that are no views of DDP's bucket"
            return set_learning_rates(*arguments)

        train.set_learning_rates = set_learning_rates
        return wrapped

    train.on_all_ranks = on_all_ranks


def test_between_steps_too_copies_have_their_gradients_in_the_bucket_alone(training_folder):
    for rank in started_on_ranks(2, "two", "--training.max_steps", "3", inject=watch_gradients):
        assert rank.wait() == 0, rank.output()


@pytest.mark.parametrize("mode", ["barrier", "distill"])
def test_a_reference_is_sharded_too(training_folder, mode):
    finished("reference", "--training.max_steps", "4", "--run.seed", "2")
    beside = ("--training.max_steps", "6", "--kl.reference", "out/reference/ckpt.pt", "--kl.mode", mode)
    alone, sharded = finished("alone", *beside), finished_on_ranks(2, "sharded", *beside, *FSDP)
    for name in ("train/loss", "kl/mean", "kl/penalty"):
        of_each = [[line[name] for line in run.metrics() if name in line] for run in (sharded, alone)]
        assert len(of_each[0]) == 6
        np.testing.assert_allclose(*of_each, rtol=1e-4, atol=1e-6)  # of small differences of logits


def test_activations_computed_again_change_no_bit(training_folder):
    how = ("--model.dropout", "0.1", "--training.micro_batch_size", "3")
    assert_same_run(finished("kept", *how), finished("again", *how, "--training.checkpoint_activations", "true"))


# Some thousand roundings of a sum, whose size a backward that is not the gradient's may raise a thousandfold.
ROUNDING = 1e3 * 1e3 * torch.finfo(torch.float64).eps


def train(ranks: Ranks | None, model, optimizer: str, dtype, steps: int) -> tuple[list, dict]:
    """Losses, gradient norms and weights of steps on the same sequences, in one process or, sharded, on all."""
    if ranks:
        placed(model, ranks, sharded_in=dtype, use_compile=False)
    stepper = make_optimizer(model, OptimizerConfig(name=optimizer, lr=1e-2))
    found = []
    for step in range(steps):
        x = random_ids(4, 13, seed=step)
        x = x.chunk(ranks.size)[ranks.rank] if ranks else x
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            _, loss = model(x[:, :-1], x[:, 1:], with_logits=False)
        loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        stepper.step()
        stepper.zero_grad()
        found += [ranks.sum(loss.detach()).item() / ranks.size if ranks else loss.item(), norm.item()]
    return found, {name: whole(p.detach()) for name, p in model.named_parameters()}


def compare(
    ranks: Ranks, make, optimizer: str = "sgd", dtype=torch.float64, rounding: float = ROUNDING, steps: int = 3
) -> None:
    alone, sharded = (train(there, make(), optimizer, dtype, steps) for there in (None, ranks))
    np.testing.assert_allclose(sharded[0], alone[0], rtol=rounding)
    for name, weight in alone[1].items():
        torch.testing.assert_close(sharded[1][name], weight, rtol=0, atol=rounding)


def noisy(**config):
    return tiny_gpt(noise=0.1, **config).double()


def recomputed(**config):
    model = noisy(**config)
    recompute_activations(model)
    return model


def every_attention(ranks: Ranks) -> None:
    for normalizer, backward in product(NORMALIZERS, BACKWARDS):
        if backward in ("full", "ste") or getattr(NORMALIZERS[normalizer], backward):
            compare(ranks, partial(noisy, normalizer=normalizer, backward=backward), steps=1)


def every_kind(ranks: Ranks) -> None:
    compare(ranks, partial(noisy, **TODAY, gate="head", normalizer="kvbias"), "adamw")
    compare(ranks, partial(recomputed, **TODAY, parallel_residual=True), "adamw")
    for how in ("fa", "sign_symmetric", "dfa"):
        compare(ranks, lambda how=how: apply_feedback(noisy(tie_embeddings=False), how))
    # Muon makes its steps orthogonal in bfloat16.
    for optimizer in ("muon", "adamw_muon_embeddings"):
        compare(ranks, partial(noisy, **TODAY), optimizer, rounding=2**-8)
    compare(ranks, partial(tiny_gpt, noise=0.1, **TODAY), "sgd", torch.bfloat16, rounding=2**-8)


@pytest.mark.parametrize("work", [every_attention, every_kind])
def test_a_sharded_model_steps_as_a_whole_one(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_ranks(2, work)
