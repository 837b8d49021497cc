"""Whole training runs beside a reference: they learn, stop, go on and refuse as any run does."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.checkpoint import load_model
from harness.corpus_writing import write_corpus
from harness.kl_training import fingerprint
from harness.tokenizer import from_name
from measure.divergence import AGGREGATES
from tests.harness.test_kl_training import CLOSE, EPS, new_model, save_model
from tests.processes import TrainingRun, assert_same_run, finished, finished_on_ranks, killed, refused

pytestmark = pytest.mark.usefixtures("training_folder")


BARRIER = ("--kl.reference", "out/base/ckpt.pt", "--kl.aggregate", "rmse", "--kl.tau", "0.05", "--kl.weight", "2")
DISTILL = ("--kl.reference", "out/base/ckpt.pt", "--kl.mode", "distill", "--kl.temperature", "2")
SHORT = ("--training.max_steps", "6", "--model.normalizer", "softmax")
KL_METRICS = [f"kl/{name}" for name in (*AGGREGATES, "penalty")]


@pytest.fixture
def base(training_folder) -> TrainingRun:
    return finished("base")


def columns(lines: list[dict], *names: str) -> list[list[float]]:
    return [[line[name] for line in lines if name in line] for name in names]


@pytest.mark.slow
def test_it_is_off_unless_a_reference_is_named(base):
    assert not any(key.startswith("kl/") for line in base.metrics() for key in line)
    assert base.checkpoint()["reference"] is None


@pytest.mark.slow
def test_the_losses_stay_plain_and_a_weight_of_0_only_looks(base):
    """Dropout draws the same numbers beside a reference, whose config has dropout as well. Beside one the loss is that
    of all the logits, which the KL needs, and without it is by chunks: the same up to rounding."""
    dropout = ("--model.dropout", "0.1")
    finished("base", "--training.resume", "never", "--training.overwrite", "true", *dropout)
    without = finished("without", *SHORT, *dropout)
    beside = finished("beside", *SHORT, *dropout, *BARRIER, "--kl.weight", "0")
    names = ("train/loss", "val/loss", "train/grad_norm")
    for plain, looked_at in zip(columns(without.metrics(), *names), columns(beside.metrics(), *names), strict=True):
        assert looked_at == pytest.approx(plain, rel=1e-5)
    assert all(list(line)[2:7] == KL_METRICS for line in beside.metrics()[1:])
    assert all(line["kl/penalty"] == 0 < line["kl/mean"] < line["kl/rmse"] < line["kl/max"]
               for line in beside.metrics()[1:])  # fmt: skip
    pushed = finished("pushed", *SHORT, *dropout, *BARRIER, "--kl.weight", "100")
    first, pushed_first = without.metrics()[1], pushed.metrics()[1]
    assert pushed_first["kl/penalty"] > 1
    assert first["train/loss"] == pytest.approx(pushed_first["train/loss"], rel=1e-6)
    assert first["train/grad_norm"] != pushed_first["train/grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [BARRIER, (*BARRIER, "--kl.aggregate", "p95"), DISTILL])
def test_the_penalty_is_the_same_for_any_number_of_micro_steps(base, how):
    whole = finished("whole", *SHORT, *how)
    parts = finished("parts", *SHORT, *how, "--training.micro_batch_size", "2")
    names = (*KL_METRICS, "train/loss", "train/grad_norm")
    assert max(columns(whole.metrics(), "kl/penalty")[0]) > 0.01
    for ours, theirs in zip(columns(whole.metrics(), *names), columns(parts.metrics(), *names), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.slow
def test_two_ranks_are_penalised_as_one(base):
    one = finished("one", *SHORT, *BARRIER)
    two = finished_on_ranks(2, "two", *SHORT, *BARRIER, "--training.micro_batch_size", "2")
    names = (*KL_METRICS, "train/loss", "train/grad_norm", "val/loss")
    for ours, theirs in zip(columns(one.metrics(), *names), columns(two.metrics(), *names), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("how", [BARRIER, DISTILL])
def test_a_killed_run_goes_on_bit_for_bit(base, how):
    how = (*how, "--model.dropout", "0.1", "--training.micro_batch_size", "4", "--model.normalizer", "softmax")
    whole = finished("whole", *how)
    killed("killed", *how, at=7)
    resumed = finished("killed", *how)
    assert "resuming out/killed from step" in resumed.output()
    assert_same_run(whole, resumed)


@pytest.fixture
def other_text() -> tuple[str, str]:
    """What makes a run learn something else than the base has learnt."""
    text = b" ".join(b"%d times two makes %d;" % (i, 2 * i) for i in range(3000))
    write_corpus("other", [("train", text[:40000]), ("val", text[40000:44001])], from_name("bytes"), source="test")
    return "--data.corpus", "other"


@pytest.mark.slow
def test_a_barrier_holds(base, other_text):
    how = ("--training.init_from", "out/base/ckpt.pt", *other_text, *BARRIER)
    how += ("--optimizer.lr", "3e-3", "--optimizer.min_lr", "0")
    free, held = (finished(f"weight{weight}", *how, "--kl.weight", weight).metrics() for weight in ("0", "30"))
    assert held[1]["kl/max"] == free[1]["kl/max"] == 0  # step 1 looks at the reference's own weights
    assert held[1]["kl/penalty"] == 0
    assert free[-1]["kl/rmse"] > 1
    # Loss and penalty together have fallen, so the penalty, 30 times what the rmse exceeds 0.05 by, is below the loss
    # at the start.
    assert held[-1]["train/loss"] + held[-1]["kl/penalty"] < held[1]["train/loss"]
    assert held[-1]["kl/rmse"] < 0.05 + held[1]["train/loss"] / 30
    assert free[-1]["val/loss"] < held[-1]["val/loss"]  # what the barrier costs


@pytest.mark.slow
def test_distillation_brings_the_student_to_its_teacher(base, other_text):
    student = ("--model.n_layer", "1", *other_text, *DISTILL)
    taught, alone = (finished(f"weight{weight}", *student, "--kl.weight", weight).metrics() for weight in ("10", "0"))
    assert taught[1]["kl/mean"] == alone[1]["kl/mean"]
    assert taught[-1]["kl/mean"] < 0.5 * taught[1]["kl/mean"]
    assert taught[-1]["kl/mean"] < 0.5 * alone[-1]["kl/mean"]
    np.testing.assert_allclose(taught[-1]["kl/penalty"], 10 * 2**2 * taught[-1]["kl/mean"], rtol=4 * EPS)


@pytest.mark.slow
def test_a_resume_beside_another_reference_is_refused(base):
    finished("run", *SHORT, *BARRIER)
    identity = torch.load("out/run/best.pt", weights_only=True)["reference"]
    assert identity == {"path": "out/base/ckpt.pt", "sha256": fingerprint(load_model("out/base/ckpt.pt")[0])}

    more = ("--model.normalizer", "softmax", "--training.max_steps", "8")
    Path("moved.pt").write_bytes(Path("out/base/best.pt").read_bytes())
    moved = finished("run", *more, *BARRIER, "--kl.reference", "moved.pt", "--kl.weight", "1")  # the same weights
    assert "kl.reference out/base/ckpt.pt → moved.pt" in moved.output()
    assert "kl.weight 2.0 → 1.0" in moved.output()

    save_model(new_model(1), "another.pt")
    more = ("--model.normalizer", "softmax", "--training.max_steps", "9")
    for arguments, here in [((*BARRIER, "--kl.reference", "another.pt"), "another.pt (sha256 "), ((), "no reference")]:
        message = refused("run", *more, *arguments)
        assert "kl.reference: out/run/ckpt.pt was trained beside moved.pt (sha256 " + identity["sha256"][:12] in message
        assert f"not {here}" in message
        assert "--training.init_from" in message
    assert "trained beside no reference, not out/base/ckpt.pt" in refused(
        "base", *BARRIER, "--training.max_steps", "30"
    )


@pytest.mark.slow
def test_a_step_says_which_figure_is_not_finite(base):
    """Here the reference's weights overflow, and the loss stays finite."""
    model, _ = load_model("out/base/ckpt.pt")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e38)
    save_model(model, "overflowing.pt")
    message = refused("run", *SHORT, *BARRIER, "--kl.reference", "overflowing.pt")
    assert message.startswith("error: step 1: train/loss ")
    assert "kl/penalty nan" in message
    assert math.isfinite(float(message.split("train/loss ")[1].split(",")[0]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--kl.tau", "-1"), "command line: kl.tau takes a number ≥ 0, not '-1'"),
        (("--kl.direction", "sideways"), "command line: kl.direction takes forward or reverse or null, not 'sideways'"),
        (("--kl.aggregate", "median"), "command line: kl.aggregate takes mean or rmse or p95 or max, not 'median'"),
        (("--kl.mode", "fence"), "command line: kl.mode takes barrier or distill, not 'fence'"),
        (("--kl.weight", "-1"), "command line: kl.weight takes a number ≥ 0, not '-1'"),
        (("--kl.temperature", "0"), "command line: kl.temperature takes a positive number, not '0'"),
        (("--kl.reference", "nowhere.pt"), "command line: kl.reference: no checkpoint nowhere.pt"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(arguments, expected):
    assert refused("run", *arguments) == f"error: {expected}"
    assert not Path("out/run").exists()
