"""What a run starts from: its own checkpoint, another's weights, or nothing, and never by mistake."""

from pathlib import Path

import pytest
import torch

from harness.checkpoint import read_checkpoint
from harness.config import load_config
from harness.corpus import Corpus
from harness.errors import UserError
from harness.optimizers import make_optimizer
from harness.resuming import checkpoint_to_resume, initial_model, restore_optimizer
from tests.helpers import random_ids, save_model, tiny_corpus, tiny_gpt

pytestmark = pytest.mark.usefixtures("training_folder")
SHAPE = {"block_size": 16, "n_embd": 32, "bias": False, "normalizer": "softmax1"}  # of the folder's config


def config(*changes: str):
    return load_config(["config.yaml", "--run.name", "run", *changes])


def whole(path: str, **more) -> None:
    """A checkpoint that has what a resume needs."""
    needed = {key: {} for key in ("optimizer", "scaler", "config", "corpus", "machine")} | {"best_val_loss": 1.0}
    save_model(tiny_gpt(**SHAPE), path, **needed | more)


def test_nothing_to_resume_is_nothing_or_an_error():
    assert checkpoint_to_resume(config()) is None
    with pytest.raises(UserError, match=r"training\.resume: there is no out/run/ckpt\.pt to resume"):
        checkpoint_to_resume(config("--training.resume", "must"))


def test_what_is_there_is_resumed_unless_told_not_to_and_never_replaced_unasked():
    whole("out/run/ckpt.pt")
    assert checkpoint_to_resume(config())["step"] == 7
    with pytest.raises(UserError, match=r"already holds a run \(ckpt\.pt\)"):
        checkpoint_to_resume(config("--training.resume", "never"))
    never = ("--training.resume", "never", "--training.overwrite", "true")
    assert checkpoint_to_resume(config(*never)) is None


def test_a_checkpoint_without_what_a_resume_needs_says_what_it_lacks():
    save_model(tiny_gpt(**SHAPE), "out/run/ckpt.pt")
    with pytest.raises(UserError, match=r"has no optimizer, scaler, best_val_loss, config, corpus, machine.*init_from"):
        checkpoint_to_resume(config())


def test_a_best_checkpoint_alone_is_nothing_to_go_on_from():
    whole("out/run/best.pt")
    with pytest.raises(UserError, match=r"holds a best\.pt but no ckpt\.pt"):
        checkpoint_to_resume(config())


def test_weights_of_another_run_are_taken_and_a_shorter_context_crops_them():
    other = tiny_gpt(5, **SHAPE)
    path = str(save_model(other, "other.pt"))
    model = initial_model(config("--training.init_from", path, "--model.block_size", "8"), Corpus("corpus"), None)
    idx = random_ids(2, 8)
    assert model.config.block_size == 8
    assert torch.equal(model.eval()(idx)[0], other(idx)[0])
    path = str(save_model(tiny_gpt(**SHAPE, n_layer=3), "deeper.pt"))
    with pytest.raises(UserError, match=r"n_layer is 2 in the config and 3 in the checkpoint"):
        initial_model(config("--training.init_from", path), Corpus("corpus"), None)


def test_weights_of_a_run_on_other_tokens_are_refused():
    """Bytes here; the same ids stood for other text there."""
    path = str(save_model(tiny_gpt(**SHAPE), "other.pt", tiny_corpus(Path("letters"))))
    with pytest.raises(UserError, match=r"init_from: other\.pt was trained with tokenizer chars, corpus has bytes"):
        initial_model(config("--training.init_from", path), Corpus("corpus"), None)


def test_the_optimizer_goes_on_with_its_state_and_the_configs_rate():
    model, x = tiny_gpt(), random_ids(2, 12)
    settings = config("--optimizer.lr", "0.5").optimizer
    first = make_optimizer(model, settings)
    model(x, x)[1].backward()
    first.step()
    path = save_model(model, Path("ckpt.pt"), optimizer=first.state_dict())
    second = make_optimizer(tiny_gpt(), config("--optimizer.lr", "0.25").optimizer)
    restore_optimizer(second, read_checkpoint(path))
    assert [group["lr"] for group in second.param_groups] == [0.25, 0.25]
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
