"""What a run by feedback starts from: a head of its own, and the matrices that its checkpoint has."""

import math

import pytest
import torch

from harness.checkpoint import feedback_of, load_model, read_checkpoint
from harness.corpus import Corpus
from harness.errors import UserError
from harness.resuming import initial_model
from measure.feedback import feedback_layers, feedback_matrices
from model import GPT
from tests.harness.test_resuming import SHAPE, config, whole
from tests.helpers import random_ids, save_model, tiny_gpt

pytestmark = pytest.mark.usefixtures("training_folder")


def with_feedback(how: str, checkpoint: str | None = None, *changes: str) -> tuple[GPT, list[str]]:
    """The model that a run with this feedback starts from, and what is said."""
    said: list[str] = []
    read = read_checkpoint(checkpoint) if checkpoint else None
    model = initial_model(config("--training.feedback", how, *changes), Corpus("corpus"), read, said.append)
    return model, said


def save_trained(model: GPT, how: str, path: str = "out/run/ckpt.pt") -> str:
    more = {"config": {"training": {"feedback": how}}, "feedback": feedback_matrices(model)}
    return str(save_model(model, path, None, **more))


def test_a_feedback_takes_a_head_of_its_own_and_says_so():
    for how in ("fa", "sign_symmetric", "dfa"):
        model, said = with_feedback(how)
        assert said == [f"tie_embeddings true → false: with feedback {how} the head has weights of its own"]
        assert not model.config.tie_embeddings
        assert {layer.how for layer in feedback_layers(model).values()} == {how}
    assert with_feedback("fa", None, "--model.tie_embeddings", "false")[1] == []
    plain, said = with_feedback("backprop")
    assert plain.config.tie_embeddings
    assert not said
    assert not feedback_layers(plain)


def test_a_fine_tuning_by_feedback_starts_with_a_copy_of_the_embedding_as_its_head():
    tied = tiny_gpt(5, **SHAPE)
    save_model(tied, "other.pt")
    model, said = with_feedback("fa", None, "--training.init_from", "other.pt")
    assert said[1:] == ["the head begins as a copy of the embedding, which it is in other.pt"]
    idx = random_ids(2, 16)
    assert torch.equal(model.eval()(idx)[0], tied(idx)[0])
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    fresh = feedback_matrices(with_feedback("fa")[0])
    assert all(torch.equal(matrix, fresh[name]) for name, matrix in feedback_matrices(model).items())


@pytest.mark.parametrize("how", ["fa", "dfa"])
def test_a_resume_goes_on_with_the_checkpoints_matrices_and_draws_new_ones_for_another_feedback(how):
    model = with_feedback(how)[0]
    path = save_trained(model, how)
    resumed, _ = with_feedback(how, path, "--run.seed", "5")
    for name, matrix in feedback_matrices(resumed).items():
        assert torch.equal(matrix, feedback_matrices(model)[name]), name
    other = {"fa": "dfa", "dfa": "fa"}[how]
    changed, said = with_feedback(other, path)
    assert said[1:] == [f"feedback {how} → {other}: its matrices are drawn anew"]
    assert feedback_matrices(changed).keys() == feedback_matrices(with_feedback(other)[0]).keys()
    plain, said = with_feedback("backprop", path)  # with the head that it was trained with
    assert said[1:] == [f"feedback {how} → backprop"]
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert not plain.config.tie_embeddings
    assert not feedback_layers(plain)


def test_a_resume_by_feedback_needs_a_checkpoint_whose_head_is_its_own_and_whose_matrices_are_whole():
    whole("out/run/ckpt.pt")
    with pytest.raises(UserError, match=r"training\.feedback: fa takes a head of its own, .* as init_from"):
        with_feedback("fa", "out/run/ckpt.pt")
    model = with_feedback("fa")[0]
    more = {"config": {"training": {"feedback": "fa"}}, "feedback": {}}
    save_model(model, "out/run/ckpt.pt", None, **more)
    with pytest.raises(UserError, match=r"out/run/ckpt\.pt is not whole: the feedback matrices are not those of fa"):
        with_feedback("fa", "out/run/ckpt.pt")


def test_what_a_feedback_has_trained_is_a_plain_model_to_all_that_loads_it():
    model = with_feedback("fa")[0].eval()
    loaded, info = load_model(save_trained(model, "fa"))
    assert {type(m) for m in loaded.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    idx = random_ids(2, 16)
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    how, matrices = feedback_of(info, "out/run/ckpt.pt")
    assert how == "fa"
    assert all(torch.equal(matrices[name], matrix) for name, matrix in feedback_matrices(model).items())
    assert feedback_of({"config": {"dataset": "nanoGPT's"}}, "") == feedback_of({}, "") == ("backprop", {})


@pytest.mark.parametrize("matrices", [[1], None, {"lm_head.weight": "x"}, {"lm_head.weight": torch.tensor([math.nan])}])
def test_matrices_that_are_none_are_named(matrices):
    with pytest.raises(UserError, match=r"^out/run/ckpt\.pt: its feedback matrices are not whole"):
        feedback_of({"config": {"training": {"feedback": "fa"}}, "feedback": matrices}, "out/run/ckpt.pt")
