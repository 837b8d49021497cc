"""Training runs: exact resume, interruption, accumulation, ranks."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from tests import processes
from tests.helpers import write_documents
from tests.processes import TrainingRun, assert_same_run, finished, finished_on_ranks, killed, refused

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.parametrize(
    ("micro_batch_size", "dropout", "dtype"),  # every pair of values of two of them
    [
        ("2", "0.1", "float32"),
        pytest.param("8", "0.0", "float32", marks=pytest.mark.slow),
        pytest.param("2", "0.0", "bfloat16", marks=pytest.mark.slow),
        pytest.param("8", "0.1", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_gives_the_losses_and_weights_of_one_never_stopped(dtype, dropout, micro_batch_size):
    how = ("--training.dtype", dtype, "--model.dropout", dropout, "--training.micro_batch_size", micro_batch_size)
    whole = finished("whole", *how)
    for step in (0, 7, 15):  # before the first checkpoint, between two, and once more after a resume
        killed("killed", *how, at=step)
    resumed = finished("killed", *how)
    assert re.search("resuming out/killed from step 1[0-4]", resumed.output())  # the 15th was not saved yet
    assert [line["step"] for line in resumed.metrics()] == list(range(25))
    assert_same_run(whole, resumed)


def squares_apart() -> None:
    """The squares of squares_corpus, each a document of its own: of 16 to 27 bytes, longer than a window or shorter."""
    texts = [f"{i} squared is {i * i}{'.' * (i % 8)}" for i in range(1500)]
    write_documents("apart", [("train" if i % 8 else "val", text) for i, text in enumerate(texts)])


APART = ("--data.corpus", "apart", "--data.windows", "documents", "--model.block_size", "20")


def test_windows_of_documents_resume_exactly_and_their_parts_add_up():
    squares_apart()
    whole = finished("whole", *APART)
    assert "windows of 1,312 documents: their starts, 79.0% of the text" in whole.output()
    killed("killed", *APART, at=15)
    assert_same_run(whole, finished("killed", *APART))
    parts = finished("parts", *APART, "--training.micro_batch_size", "2")
    losses = [[line["train/loss"] for line in run.metrics()[1:]] for run in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-4)  # as below: unequal parts of padding change sums alone
    changed = TrainingRun("whole", *APART, "--data.windows", "stream", "--training.max_steps", "26")
    assert changed.wait() == 0
    assert "changed since the checkpoint: data.windows documents → stream" in changed.output()
    assert "best.pt starts anew with the next evaluation" in changed.output()


def test_documents_that_no_window_fills_are_trained_on_all_the_same():
    squares_apart()
    run = finished("short", *APART, "--model.block_size", "64", "--training.max_steps", "2")
    assert 0 < run.metrics()[-1]["row_mass/val"] < 1  # of the longest document, since no other is as long
    one = refused("one", "--data.windows", "documents")
    assert "data.windows documents: corpus/train.bin has no two" in one


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fa", "sign_symmetric", "dfa"])
def test_a_killed_run_goes_on_with_its_feedback(how):
    """Matrices and all, bit for bit; micro-steps add up, and what is logged of a feedback is there."""
    changes = ("--training.feedback", how, "--training.micro_batch_size", "2")
    whole = finished("whole", *changes)
    killed("killed", *changes, at=15)
    resumed = finished("killed", *changes)
    assert_same_run(whole, resumed)
    assert f" kernel, feedback {how}\n" in whole.output()
    matrices = [run.checkpoint()["feedback"] for run in (whole, resumed)]
    assert all(torch.equal(matrix, matrices[1][name]) for name, matrix in matrices[0].items())
    assert len(matrices[0]) == {"fa": 9, "sign_symmetric": 0, "dfa": 8}[how]
    assert [len(run.checkpoint("best.pt")["feedback"]) for run in (whole,)] == [len(matrices[0])]
    logged = {name.rpartition("/")[0] for name in whole.metrics()[-1] if name.startswith("feedback/")}
    assert logged == {"fa": {"feedback/angle", "feedback/norm_ratio"}, "sign_symmetric": {"feedback/angle"}}.get(
        how, set()
    )
    at_once = finished("at_once", "--training.feedback", how)
    losses = [[line["train/loss"] for line in run.metrics()[1:7]] for run in (whole, at_once)]
    np.testing.assert_allclose(*losses, rtol=1e-4)  # as below
    finished("whole", *changes, "--evaluation.only", "true")


@pytest.mark.slow
def test_micro_steps_add_up_to_the_whole_batch():
    whole = finished("whole", "--training.max_steps", "6")
    parts = finished("parts", "--training.max_steps", "6", "--training.micro_batch_size", "2")
    losses = [[line["train/loss"] for line in run.metrics()[1:]] for run in (whole, parts)]
    # The same sums in another order: a few roundings of float32 a step, which Adam's normalised steps carry along.
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert " kernel\n" in whole.output()
    assert "micro_batch_size" not in whole.output() + parts.output()


def test_an_uneven_micro_batch_is_told():
    output = finished("run", "--training.max_steps", "1", "--training.micro_batch_size", "3").output()
    assert "training.micro_batch_size: 3 does not divide the 8 sequences of a rank: it takes 2 at a time" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalizer", "backward", "feedback"),
    [("softmax1", "full", "backprop"), ("sink", "ste", "fa"), ("softmax1", "full", "dfa")],
)
def test_two_ranks_train_as_one(normalizer, backward, feedback):
    changes = ["--training.max_steps", "6", "--model.normalizer", normalizer, "--model.backward", backward]
    changes += ["--training.feedback", feedback]
    one = finished("one", *changes)
    two = finished_on_ranks(2, "two", *changes)
    assert [line["step"] for line in two.metrics()] == list(range(7))
    for key in ("train/loss", "val/loss", "train/grad_norm", "activation_kurtosis/val/attention_probabilities"):
        ours, theirs = ([line[key] for line in run.metrics() if key in line] for run in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def witness() -> None:
    """Before a rank's run: what it calls is noted, and is in seen_<rank>.json in the end."""
    import train

    seen, writes = [], []

    def noted(name, function):
        def call(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        return call

    def watched(self, idx, targets=None, forward=GPT.forward, **how):
        if not self.training and not torch.is_grad_enabled():
            seen.append(["forward", list(idx.shape)])
        return forward(self, idx, targets, **how)

    def saving(path, checkpoint, save=train.save_checkpoint):
        writes.append(path.name)
        return save(path, checkpoint)

    def main(main=train.main):
        status = main()
        Path(f"seen_{os.environ['RANK']}.json").write_text(json.dumps({"seen": seen, "writes": writes}))
        return status

    GPT.forward = watched
    GPT.state_dict = noted("state of the model", GPT.state_dict)
    torch.optim.AdamW.state_dict = noted("state of the optimizer", torch.optim.AdamW.state_dict)
    train.outlier_metrics = noted("outliers", train.outlier_metrics)
    train.save_checkpoint, train.main = saving, main


@pytest.mark.slow
def test_every_rank_does_the_same_and_rank_0_alone_writes():
    """What a sharded model needs: its parts are only whole where all ranks run it, measure it or save it together. The
    last evaluation is of 63 batches, an odd number, for two ranks."""
    arguments = ("--training.max_steps", "2", "--evaluation.interval", "1", "--training.checkpoint_interval", "1")
    with pytest.MonkeyPatch.context() as patch:  # on both ranks
        patch.setattr(processes, "TrainingRun", lambda *how, **more: TrainingRun(*how, **more | {"inject": witness}))
        finished_on_ranks(2, "two", *arguments)
    first, second = (json.loads(Path(f"seen_{rank}.json").read_text()) for rank in (0, 1))
    assert first["seen"] == second["seen"]
    assert first["seen"].count("outliers") == first["seen"].count("state of the model") == 3
    assert first["seen"].count(["forward", [4, 16]]) == 3 * 4 + 32  # 32 windows, thrice, and all 251 in the end
    assert first["writes"][:2] == ["best.pt", "ckpt.pt"]  # a kill in between leaves no best.pt that is behind
    assert second["writes"] == []
    one = finished("one", "--training.max_steps", "2", "--evaluation.interval", "1")
    lines = [json.loads(line) for line in Path("out/two/metrics.jsonl").read_text().splitlines()]
    ours, theirs = ([line["val/loss"] for line in run] for run in (one.metrics(), lines))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(number):
    whole = finished("whole")
    run = TrainingRun("stopped", signal_at=(8, number))
    assert run.wait() == 128 + number
    assert run.checkpoint()["step"] == 9  # what came after the end of step 8 ends the next
    assert "stopped at step 9 of 24" in run.output()
    assert "the same command continues" in run.output()
    assert_same_run(whole, finished("stopped"))


def test_ctrl_c_twice_stops_at_once_with_the_checkpoint_intact():
    run = TrainingRun("twice", "--training.max_steps", "100000")
    run.wait_for_step(6)
    os.kill(run.process.pid, signal.SIGINT)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() in (130, 128 + signal.SIGINT)
    assert run.checkpoint()["step"] >= 5
    assert not list(run.folder.glob("*.tmp"))


def test_a_finished_run_says_so_and_does_nothing():
    finished("run")
    before = {p: p.read_bytes() for p in Path("out/run").glob("[!.]*.*")}
    again = finished("run")
    assert "out/run is finished: step 24 of 24" in again.output()
    assert "run.seed 1337 → 2" in refused("run", "--run.seed", "2")  # it does not answer for another run
    assert {p: p.read_bytes() for p in Path("out/run").glob("[!.]*.*")} == before


@pytest.mark.slow
def test_a_finished_run_goes_on_when_it_is_given_more_steps():
    finished("run")
    more = finished("run", "--training.max_steps", "30")
    assert "resuming out/run from step 24" in more.output()
    assert "changed since the checkpoint: training.max_steps 24 → 30" in more.output()
    assert [line["step"] for line in more.metrics()] == list(range(31))
    assert [line["step"] for line in more.metrics() if "val_full/loss" in line] == [24, 30]


@pytest.mark.slow
def test_starting_afresh_never_destroys_a_run_unasked():
    first = finished("run")
    before, before_loss = first.checkpoint(), first.metrics()[0]["val/loss"]
    error = refused("run", "--training.resume", "never")
    assert "out/run already holds a run" in error
    assert "training.overwrite" in error
    assert torch.equal(first.checkpoint()["model"]["lm_head.weight"], before["model"]["lm_head.weight"])
    other = ("--training.resume", "never", "--training.overwrite", "true", "--run.seed", "7")
    fresh = finished("run", *other)
    assert [line["step"] for line in fresh.metrics()] == list(range(25))
    assert fresh.metrics()[0]["val/loss"] != before_loss


@pytest.mark.slow
def test_the_last_evaluation_is_of_the_whole_validation_set():
    sampled = finished("sampled", "--evaluation.batches", "1")
    whole = finished("whole", "--evaluation.batches", "full")
    for metric in ("loss", "perplexity", "bits_per_byte"):
        expected = whole.metrics()[-1][f"val/{metric}"]
        assert sampled.metrics()[-1][f"val_full/{metric}"] == whole.metrics()[-1][f"val_full/{metric}"] == expected
        assert sampled.metrics()[-1][f"val/{metric}"] != expected  # of the same windows as before
    only = finished("sampled", "--evaluation.only", "true")
    assert f"val loss {whole.metrics()[-1]['val/loss']:.4f}" in only.output()


def test_the_validation_loss_is_that_of_every_target_once():
    run = finished("run", "--training.max_steps", "6")
    from harness.checkpoint import load_model
    from harness.corpus import Corpus

    model, _ = load_model(run.folder / "ckpt.pt")
    tokens = torch.from_numpy(Corpus("corpus").tokens["val"].astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        x, y = tokens[start : start + 16][None], tokens[start + 1 : start + 17][None]
        with torch.no_grad():
            total += model(x[:, : y.size(1)], y)[1].item() * y.numel()
    last = run.metrics()[-1]
    np.testing.assert_allclose(last["val_full/loss"], total / (len(tokens) - 1), rtol=1e-6)
    bits = last["val_full/loss"] / np.log(2)
    np.testing.assert_allclose(last["val_full/bits_per_byte"], bits, rtol=1e-12)  # a byte a token
    np.testing.assert_allclose(last["val_full/perplexity"], np.exp(last["val_full/loss"]), rtol=1e-12)


def test_ids_whose_text_is_not_known_train_without_bits_per_byte():
    Path("foreign").mkdir()
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 300, 400).astype(np.uint16).tofile(f"foreign/{split}.bin")
    run = finished("run", "--data.corpus", "foreign", "--model.vocab_size", "300", "--training.max_steps", "2")
    assert "note: what text the 300 token ids in foreign stand for is not known: no bits per byte" in run.output()
    assert "val/bits_per_byte" not in run.metrics()[-1]
    assert run.metrics()[-1]["val/loss"] < np.log(300) + 1
    assert run.checkpoint()["corpus"]["vocab_size"] == 300


def test_the_best_checkpoint_is_the_best_evaluation():
    run = finished("run", "--optimizer.lr", "0.3", "--optimizer.min_lr", "0.3", "--evaluation.batches", "full")
    evaluated = [(line["val/loss"], line["step"]) for line in run.metrics() if "val/loss" in line and line["step"]]
    best = run.checkpoint("best.pt")
    assert (best["best_val_loss"], best["step"]) == min(evaluated)


@pytest.mark.slow
def test_checkpoints_along_training_are_kept_and_a_run_goes_on_from_one():
    whole = finished("whole", "--training.keep_interval", "9")
    assert sorted(path.name for path in (whole.folder / "steps").iterdir()) == ["18.pt", "9.pt"]
    Path("out/branch").mkdir()
    shutil.copy(whole.folder / "steps" / "9.pt", "out/branch/ckpt.pt")
    branch = finished("branch")
    assert branch.metrics()[0]["step"] == 10
    for key, tensor in whole.checkpoint()["model"].items():
        assert torch.equal(tensor, branch.checkpoint()["model"][key]), key


def test_best_starts_anew_on_other_windows_and_where_it_is_behind():
    run = finished("run", "--training.max_steps", "6")
    torch.save(run.checkpoint("best.pt") | {"best_val_loss": math.inf, "step": 0}, run.folder / "best.pt")
    worse = ("--optimizer.lr", "30", "--optimizer.min_lr", "30", "--optimizer.grad_clip", "0")
    finished("run", *worse, "--training.max_steps", "12")
    assert run.checkpoint("best.pt")["step"] == 12  # not the one of a ckpt.pt that speaks of a better one
    other = finished("run", *worse, "--evaluation.batches", "2", "--training.max_steps", "18")
    assert "best.pt starts anew with the next evaluation: it is of 32 validation windows, not of 16" in other.output()
    best, last = other.checkpoint("best.pt"), other.metrics()[-1]
    assert (best["step"], best["best_val_loss"]) == (18, last["val/loss"])


def test_what_shows_outliers_is_logged_at_every_evaluation():
    run = finished("run", "--model.normalizer", "sink")
    evaluations = [line for line in run.metrics() if "val/loss" in line]
    for split in ("train", "val"):
        kurtosis = f"activation_kurtosis/{split}"
        for name in (
            f"{kurtosis}/attention_probabilities",
            f"{kurtosis}/attention_probabilities_late",
            f"{kurtosis}/residual_stream",
            f"activation_max_abs/{split}/residual_stream",
            f"sink_rate/{split}",
            f"row_mass/{split}",
            "weight_kurtosis/transformer.h.0.attn.c_attn.weight",
            "normalizer/transformer.h.0.attn.sink",
        ):
            assert all(isinstance(line[name], float) for line in evaluations), name
    sink = run.checkpoint()["model"]["transformer.h.0.attn.sink"].mean().item()
    assert evaluations[-1]["normalizer/transformer.h.0.attn.sink"] == pytest.approx(sink)


@pytest.mark.slow
def test_fine_tuning_takes_the_weights_and_may_change_the_attention():
    base = finished("base")
    tuned = finished("tuned", "--training.init_from", "out/base/ckpt.pt", "--model.normalizer", "softmax",
                     "--optimizer.lr", "0", "--optimizer.min_lr", "0", "--training.max_steps", "1")  # fmt: skip
    for key, tensor in base.checkpoint()["model"].items():
        assert torch.equal(tensor, tuned.checkpoint()["model"][key]), key
    assert tuned.checkpoint()["model_args"]["normalizer"] == "softmax"


@pytest.mark.slow
def test_what_a_fine_tuning_may_choose_anew_is_what_the_config_says():
    finished("base", "--training.max_steps", "1")
    arguments = ("--training.init_from", "out/base/ckpt.pt", "--training.max_steps", "1", "--model.activation", "gelu")
    assert "activation is gelu in the config and gelu_tanh in the checkpoint" in refused("tuned", *arguments)
    free = {f.name for f in dataclasses.fields(GPTConfig) if f.metadata.get("free")}
    others = {"dropout": 0.2, "normalizer": "sink", "sink_init": 3.0, "backward": "ste", "ssmax_init": 0.5}
    others |= {"softmax_n": 3.0, "clipped_alpha": 2.0, "clipped_by": "row", "sigmoid_bias": -1.0}
    assert free == others.keys()
    options = (f"--model.{key}={value}" for key, value in others.items())
    chosen = finished("tuned", *arguments[:-2], *options).checkpoint()
    assert others.items() <= chosen["model_args"].items()
    sink = chosen["model"]["transformer.h.1.attn.sink"]
    assert sink.sub(3).abs().max() < 0.1  # where it starts, but for one step


@pytest.mark.slow
def test_a_resume_of_a_newer_format_is_refused():
    run = finished("run", "--training.max_steps", "1")
    torch.save(run.checkpoint() | {"format": 2}, run.folder / "ckpt.pt")
    assert "out/run/ckpt.pt is a checkpoint of format 2, and this version reads up to 1" in refused("run")


@pytest.mark.slow
def test_a_sink_is_trained_resumed_and_may_replace_softmax1():
    finished("base")
    tuned = finished("tuned", "--training.init_from", "out/base/ckpt.pt", "--model.normalizer", "sink",
                     "--training.max_steps", "2")  # fmt: skip
    before = tuned.checkpoint()["model"]["transformer.h.1.attn.sink"]
    assert before.abs().min() > 0  # it started at 0
    resumed = finished("tuned", "--training.init_from", "out/base/ckpt.pt", "--model.normalizer", "sink",
                       "--training.max_steps", "3")  # fmt: skip
    assert not torch.equal(before, resumed.checkpoint()["model"]["transformer.h.1.attn.sink"])
