"""What a user's mistakes and a machine's do to a training run: one line, and nothing is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.corpus_writing import write_corpus
from harness.tokenizer import from_name
from tests.helpers import ROOT
from tests.processes import TrainingRun, finished, refused

pytestmark = pytest.mark.usefixtures("training_folder")


@pytest.mark.slow
def test_a_resume_with_another_model_lists_what_differs():
    finished("run", "--training.max_steps", "5")
    error = refused("run", "--model.n_layer", "3", "--model.normalizer", "softmax")
    assert "n_layer is 3 in the config and 2 in the checkpoint" in error
    assert "normalizer is softmax in the config and softmax1 in the checkpoint" in error


@pytest.mark.slow
def test_two_processes_cannot_train_into_one_folder():
    first = TrainingRun("run", "--training.max_steps", "100000")
    first.wait_for_step(1)
    assert f"process {first.process.pid} is training into out/run" in refused("run")
    assert first.process.is_alive()
    first.process.kill()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint():
    run = finished("run", "--training.max_steps", "5")
    good = run.checkpoint()
    error = refused("run", "--training.max_steps", "40", "--optimizer.lr", "1e30", "--optimizer.min_lr", "1e30",
                    "--optimizer.grad_clip", "0", "--tracking.log_interval", "4")  # fmt: skip
    named = int(error.split("error: step ")[1].split(":")[0])
    assert 6 <= named <= 9
    assert "not finite" in error
    assert all(torch.equal(v, good["model"][k]) for k, v in run.checkpoint()["model"].items())


@pytest.mark.slow
def test_a_resume_on_other_text_is_refused():
    finished("run", "--training.max_steps", "5")
    write_corpus("corpus", [("train", b"other " * 99), ("val", b"text " * 99)], from_name("bytes"), source="test")
    assert "was trained on other text" in refused("run")


@pytest.mark.slow
def test_a_full_disk_keeps_the_former_checkpoint():
    run = finished("run", "--training.max_steps", "5")
    size = (run.folder / "ckpt.pt").stat().st_size
    full = f"ulimit -f {size // 1024 // 2}; trap '' XFSZ; exec {sys.executable} {ROOT}/train.py config.yaml"
    done = subprocess.run(
        ["bash", "-c", f"{full} --run.name run --training.max_steps 10"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write out/run/" in done.stderr
    assert "the former checkpoint is intact" in done.stderr
    assert run.checkpoint()["step"] == 5
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model.n_embd", "33"), "n_embd (33) is not divisible by n_head (2)"),
        (("--model.block_size", "5000"), "model.block_size: 5000 is longer than corpus/val.bin, which has 4001 tokens"),
        (("--model.vocab_size", "100"), "model.vocab_size: 100 ids are too few for corpus"),
        (("--training.device", "cuda"), "device 'cuda' is not there"),
        (("--training.device", "gpu"), "no device 'gpu'"),
        (("--training.dtype", "float16"), "float16 needs a GPU"),
        (("--training.feedback", "dfa", "--training.compile", "true"), "feedback dfa cannot be compiled"),
        (("--training.init_from", "scratch", "--evaluation.only", "true"), "no training.init_from to evaluate"),
        (("--training.resume", "must"), "there is no out/run/ckpt.pt to resume"),
        (("--training.init_from", "nowhere.pt"), "no checkpoint nowhere.pt"),
        (("--data.corpus", "nowhere"), "nowhere is not prepared"),
        (("--optimizer.learning_rate", "1"), "unknown key 'learning_rate' in section 'optimizer'"),
        (("--optimizer.lr", "fast"), "optimizer.lr takes a number ≥ 0, not 'fast'"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(arguments, expected):
    if arguments[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert expected in refused("run", *arguments)
    assert not Path("out/run").exists()


def test_a_checkpoint_that_is_none_is_named():
    Path("out/run").mkdir(parents=True)
    Path("out/run/ckpt.pt").write_bytes(b"PK\x03\x04 not really")
    assert "out/run/ckpt.pt is truncated or not a checkpoint" in refused("run")


def test_a_read_only_out_folder_is_named():
    Path("out").write_text("in the way")  # even root cannot make a folder here
    assert "cannot write to the run's folder out/run" in refused("run")
