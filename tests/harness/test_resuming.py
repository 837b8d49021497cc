"""What a run starts from: its own checkpoint, another's weights, or nothing, and never by mistake."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import resuming
from harness.checkpoint import read_checkpoint
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.errors import UserError
from harness.optimizers import make_optimizer
from harness.resuming import best_so_far, check_resume, checkpoint_to_resume, initial_model, restore_optimizer
from model import GPT, NORMALIZERS, Normalizer
from tests.helpers import random_ids, save_model, tiny_corpus, tiny_gpt

pytestmark = pytest.mark.usefixtures("training_folder")
SHAPE = {"block_size": 16, "n_embd": 32, "bias": False, "normalizer": "softmax1"}  # of the folder's config


def config(*changes: str):
    return load_config(["config.yaml", "--run.name", "run", *changes])


def whole(path: str, **more) -> None:
    """A checkpoint that has what a resume needs."""
    needed = {key: {} for key in ("optimizer", "scaler", "config", "machine")} | {"best_val_loss": 1.0}
    needed["corpus"] = {"folder": "corpus", "sha256": "of it"}
    save_model(tiny_gpt(**SHAPE), path, **needed | more)


def test_nothing_to_resume_is_nothing_or_an_error():
    assert checkpoint_to_resume(config()) is None
    with pytest.raises(UserError, match=r"training\.resume: there is no out/run/ckpt\.pt to resume"):
        checkpoint_to_resume(config("--training.resume", "must"))


def test_an_evaluation_is_of_the_weights_that_are_asked_for_by_name():
    """It was of the run's own checkpoint, whatever init_from said."""
    whole("out/run/ckpt.pt", config={"training": {"init_from": "first.pt"}})
    for init_from, own in (("scratch", True), ("first.pt", True), ("other.pt", False)):
        only = config("--evaluation.only", "true", "--training.init_from", init_from)
        assert (checkpoint_to_resume(only) is not None) == own
    assert checkpoint_to_resume(config("--training.init_from", "other.pt")) is not None  # a resume goes on


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


LLAMA = {"position": "rope", "norm": "rmsnorm", "n_head": 4, "n_kv_head": 4, "head_dim": 8, "qkv_bias": False}


def test_a_null_is_what_it_stands_for_whoever_spells_it_out():
    model = tiny_gpt(5, **SHAPE | LLAMA)
    path = str(save_model(model, "other.pt"))
    spelled = ("--model.n_head", "4", "--model.position", "rope", "--model.norm", "rmsnorm")
    assert initial_model(config(*spelled), Corpus("corpus"), read_checkpoint(path)).config == model.config
    save_model(tiny_gpt(5, **SHAPE | LLAMA | {"n_kv_head": None, "head_dim": None, "qkv_bias": None}), path)
    others = ("--model.n_kv_head", "4", "--model.head_dim", "8", "--model.n_inner", "128")
    initial_model(config(*spelled, *others), Corpus("corpus"), read_checkpoint(path))
    initial_model(config("--training.init_from", path, *spelled, *others), Corpus("corpus"), None)
    with pytest.raises(UserError) as error:  # and what follows from another key is not listed beside it
        initial_model(config("--model.n_head", "2", *spelled[2:]), Corpus("corpus"), read_checkpoint(path))
    assert str(error.value).endswith(": n_head is 2 in the config and 4 in the checkpoint")


def test_rotary_positions_may_reach_further_in_a_fine_tuning_and_learned_ones_may_not():
    longer = ("--training.init_from", "other.pt", "--model.block_size", "24", "--model.n_head")
    rotary = tiny_gpt(5, **SHAPE | LLAMA)
    save_model(rotary, "other.pt")
    model = initial_model(config(*longer, "4"), Corpus("corpus"), None).eval()
    assert model(random_ids(1, 24))[0].shape == (1, 24, 256)
    assert torch.equal(model(random_ids(2, 16))[0], rotary(random_ids(2, 16))[0])
    save_model(tiny_gpt(5, **SHAPE), "other.pt")
    with pytest.raises(UserError, match="block_size is 24 in the config and 16 in the checkpoint"):
        initial_model(config(*longer, "2"), Corpus("corpus"), None)


# What a normalizer learns may have any shape, and start with what a look at values tells.
POWER = Normalizer(
    lambda scores, power: scores.softmax(-1) ** power.mean(),
    parameters={"power": lambda config: torch.full((config.n_layer, 3), torch.tensor(2.0).item())},
)


@pytest.mark.parametrize(
    ("changes", "learned"),
    [
        ({}, {"sink": 0.5}),
        ({"dropout": 0.5, "backward": "diagonal"}, {"sink": 0.5}),
        ({"normalizer": "power"}, {"power": 2.0}),
        ({"normalizer": "softmax1", "block_size": 8}, {}),
        ({"normalizer": "softmax1", "block_size": 24}, {}),
    ],
)
def test_a_fine_tuning_takes_the_weights_as_they_lie_in_memory_into_the_model_that_is_asked_for(
    changes, learned, monkeypatch
):
    """A second model was made and filled beside the first, which took the time and the memory of both."""
    monkeypatch.setitem(NORMALIZERS, "power", POWER)
    shape, read, load = SHAPE | {"normalizer": "sink", "position": "rope"}, [], resuming.load_model
    other = tiny_gpt(5, **shape, noise=0.1)
    for parameter in other.normalizer_parameters().values():
        parameter.data.fill_(0.5)
    save_model(other, "other.pt")
    monkeypatch.setattr(resuming, "load_model", lambda path: read.append(load(path)) or read[0])
    keys = [word for key, value in (shape | changes).items() for word in (f"--model.{key}", str(value).lower())]
    model = initial_model(config("--training.init_from", "other.pt", *keys), Corpus("corpus"), None)
    assert {name.rpartition(".")[2]: x.unique().tolist() for name, x in model.normalizer_parameters().items()} == {
        name: [value] for name, value in learned.items()
    }
    for name, weight in read[0][0].named_parameters():
        if "sink" in learned or not name.endswith("sink"):
            assert model.get_parameter(name).data_ptr() == weight.data_ptr(), name

    wanted, results = GPT(replace(other.config, **changes)), []
    wanted.load_state_dict(other.state_dict() | model.normalizer_parameters(), strict=False)
    assert (model.config, repr(model)) == (wanted.config, repr(wanted))
    names = [name for name, _ in wanted.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())  # the tied head is one of them once
    for each in (model, wanted):
        torch.manual_seed(0)  # of the dropout
        loss = each(random_ids(2, 8), random_ids(2, 8, seed=1))[1]
        results.append([loss, *torch.autograd.grad(loss, [each.get_parameter(name) for name in names])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("block_size", [8, 24])
@pytest.mark.parametrize("own", [{"normalizer": "sigmoid"}, {"normalizer": "clipped", "clipped_alpha": 3.0}])
def test_what_a_normalizer_takes_from_the_context_stays_in_another_one(own, block_size, capsys):
    """σ(x − log T) and γ = −α/T: of the T that the weights were trained with."""
    model = tiny_gpt(5, **SHAPE | own | {"position": "rope"}, noise=0.3)
    save_model(model, "other.pt")
    shape = SHAPE | {"position": "rope", "block_size": block_size} | {"normalizer": own["normalizer"]}
    keys = [word for key, value in shape.items() for word in (f"--model.{key}", str(value).lower())]
    start = ("--training.init_from", "other.pt", *keys)
    moved = initial_model(config(*start), Corpus("corpus"), None).eval()
    assert moved.config.block_size == block_size
    torch.testing.assert_close(moved(random_ids(2, 8))[0], model(random_ids(2, 8))[0])
    key = {"sigmoid": "sigmoid_bias", "clipped": "clipped_alpha"}[own["normalizer"]]
    assert f"model.{key} is " in capsys.readouterr().out
    asked = initial_model(config(*start, f"--model.{key}=0.5"), Corpus("corpus"), None)
    assert getattr(asked.config, key) == 0.5


def test_what_a_normalizer_has_learned_stays_or_is_said_to_go(capsys):
    learned = tiny_gpt(5, **SHAPE | {"normalizer": "sink", "sink_init": -20.0})
    save_model(learned, "other.pt")
    keys = [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value).lower())]
    start = ("--training.init_from", "other.pt", *keys)
    with pytest.raises(UserError, match=r"sink_init is 2\.0 in the config and -20\.0 in the checkpoint"):
        initial_model(config(*start, "--model.normalizer", "sink", "--model.sink_init", "2"), Corpus("corpus"), None)
    capsys.readouterr()
    initial_model(config(*start, "--model.normalizer", "sink"), Corpus("corpus"), None)
    assert not capsys.readouterr().out
    initial_model(config(*start, "--model.normalizer", "kvbias"), Corpus("corpus"), None)
    assert capsys.readouterr().out == "what other.pt has learned for its normalizer, sink, is left out\n"


def test_a_resumed_model_has_the_tensors_of_its_checkpoint():
    save_model(tiny_gpt(5, **SHAPE), "other.pt")
    checkpoint = read_checkpoint("other.pt")
    model = initial_model(config(), Corpus("corpus"), checkpoint)
    assert model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == checkpoint["model"][name].data_ptr()


def finished_run(step: int = 24, *changes: str) -> tuple[dict, Corpus]:
    """A checkpoint at that step of 24, and its corpus."""
    corpus = Corpus("corpus")
    entry = {"folder": "corpus", "sha256": corpus.sha256}
    whole("out/run/ckpt.pt", step=step, config=config(*changes).to_dict(), corpus=entry, best_val_loss=2.5)
    return read_checkpoint("out/run/ckpt.pt"), corpus


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ((), None),
        (("--evaluation.interval", "3", "--tracking.project", "mine", "--training.checkpoint_interval", "9"), None),
        (("--training.micro_batch_size", "2", "--training.compile", "false"), None),
        (("--training.max_steps", "9"), "training.max_steps 24 → 9"),  # decay_steps follows: another schedule
        (("--run.seed", "2"), "run.seed 1337 → 2"),
        (("--optimizer.lr", "3e-3", "--tracking.project", "mine", "--training.batch_size", "4"),
         "optimizer.lr 0.01 → 0.003, training.batch_size 8 → 4"),
        (("--kl.mode", "distill"), "kl.mode barrier → distill"),
    ],
)  # fmt: skip
def test_a_finished_run_answers_for_its_own_config_alone(changes, keys):
    said, (checkpoint, corpus) = [], finished_run()
    if keys is None:
        check_resume(config(*changes), checkpoint, corpus, None, {}, said.append)
        assert "out/run is finished: step 24 of " in said[0]
        return
    with pytest.raises(UserError) as error:
        check_resume(config(*changes), checkpoint, corpus, None, {}, said.append)
    assert f"out/run is finished, at step 24, and is of another config: {keys}. Give another run.name" in str(
        error.value
    )
    assert str(error.value).startswith(f"command line: {keys.split()[0]}: ")
    assert not said


def test_a_longer_run_whose_schedule_has_its_own_end_is_finished():
    own, said = ("--optimizer.decay_steps", "9"), []
    checkpoint, corpus = finished_run(24, *own)
    check_resume(config(*own, "--training.max_steps", "9"), checkpoint, corpus, None, {}, said.append)
    assert "out/run is finished: at step 24, training.max_steps is 9" in said[0]


@pytest.mark.parametrize("step", [20, 24])
def test_the_state_of_another_optimizer_is_refused(step):
    """Of a checkpoint from before there was a choice, too: it was AdamW's."""
    checkpoint, corpus = finished_run(step)
    for then, now in (("adamw", "muon"), (None, "sgd"), ("muon", "adamw_muon_embeddings")):
        checkpoint["config"]["optimizer"] |= {"name": then}
        if then is None:
            del checkpoint["config"]["optimizer"]["name"]
        with pytest.raises(UserError, match=rf"line: optimizer\.name: out/run.* {then or 'adamw'} → {now}.*init_from"):
            check_resume(config("--optimizer.name", now), checkpoint, corpus, None, {}, print)


def test_an_unfinished_run_goes_on_with_what_has_changed():
    said, (checkpoint, corpus) = [], finished_run(step=20)
    check_resume(config("--run.seed", "2"), checkpoint, corpus, None, {}, said.append)
    assert said == ["resuming out/run from step 20", "changed since the checkpoint: run.seed 1337 → 2"]


def test_the_best_so_far_is_what_best_says_of_the_same_windows():
    said, (checkpoint, _) = [], finished_run()
    assert best_so_far(config(), checkpoint, 251, said.append) == math.inf
    assert "best.pt starts anew with the next evaluation: no checkpoint out/run/best.pt" in said.pop()
    whole("out/run/best.pt", best_val_loss=3.0, config=config().to_dict())  # behind ckpt.pt, which speaks of 2.5
    assert best_so_far(config(), checkpoint, 251, said.append) == 3.0
    assert best_so_far(config("--training.batch_size", "4", "--evaluation.batches", "8"), checkpoint, 251, print) == 3.0
    assert best_so_far(config("--evaluation.batches", "full"), checkpoint, 32, said.append) == 3.0  # there are no more
    assert not said
    for batches in ("5", "full"):
        assert best_so_far(config("--evaluation.batches", batches), checkpoint, 251, said.append) == math.inf
        assert f"it is of 32 validation windows, not of {40 if batches == '5' else 251}" in said.pop()


@pytest.mark.parametrize("only", ["false", "true"])
def test_weights_that_are_not_finite_start_nothing(only):
    model = tiny_gpt(**SHAPE)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = math.nan
    path = str(save_model(model, "nan.pt"))
    with pytest.raises(UserError, match=r"nan\.pt holds NaN or infinite weights, in transformer\.h\.1\.mlp\.c_fc"):
        initial_model(config("--training.init_from", path, "--evaluation.only", only), Corpus("corpus"), None)


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


def moments(settings):
    """A model that has made a step, and its optimizer's state, by the numbers of the parameters."""
    model, x = tiny_gpt(), random_ids(2, 12)
    optimizer = make_optimizer(model, settings)
    model(x, x)[1].backward()
    optimizer.step()
    return model, optimizer.state_dict()


def unlike(state: dict, change) -> None:
    first = next(iter(state["state"].values()))
    name = "exp_avg" if "exp_avg" in first else "momentum_buffer"
    match change:
        case "shape":
            first[name] = torch.zeros(3)
        case "count":
            state["state"].popitem()
        case "more":
            state["state"][99] = first
        case "names":
            del first[name]
        case "dtype":
            first[name] = first[name].int()
        case "nan":
            first[name] = first[name] * math.nan
        case "list":
            state["state"] = [1]
        case "none":
            state["state"] = {}
        case "step":
            first["step"] = torch.tensor(-5.0)
        case "steps":
            first["step"] = torch.ones(3)


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in ("adamw", "muon", "sgd") for change in ("shape", "count", "more", "names", "dtype")]
    + [("adamw", change) for change in ("nan", "list", "none", "step", "steps")],
)
def test_an_optimizers_state_that_is_not_of_its_parameters_is_refused(name, change):
    """The fused step of AdamW read beyond moments of another shape, and crashed; others went on with what there was."""
    settings = config("--optimizer.name", name).optimizer
    model, state = moments(settings)
    unlike(state, change)
    with pytest.raises(UserError, match=r"its optimizer's state is not of its model .*as its init_from"):
        restore_optimizer(make_optimizer(model, settings), {"optimizer": state, "step": 1})


def test_moments_that_share_memory_or_lie_otherwise_in_it_get_their_own():
    settings = config().optimizer
    model, state = moments(settings)
    first, second = state["state"][0], state["state"][1]
    first["exp_avg"] = torch.full((1,), 0.5).expand(first["exp_avg"].shape)
    second["exp_avg"] = second["exp_avg_sq"]
    second["exp_avg_sq"] = second["exp_avg_sq"].t().contiguous().t()
    wanted = {i: {name: value.clone() for name, value in held.items()} for i, held in state["state"].items()}
    optimizer = make_optimizer(model, settings)
    restore_optimizer(optimizer, {"optimizer": state, "step": 1})
    found, places = optimizer.state_dict()["state"], set()
    for i, held in wanted.items():
        for key, value in held.items():
            assert torch.equal(found[i][key], value)
            assert found[i][key].is_contiguous()
            assert found[i][key].untyped_storage().nbytes() == found[i][key].nbytes
            places.add(found[i][key].data_ptr())
    assert len(places) == 3 * len(wanted)


@pytest.mark.parametrize(
    "change",
    [{"best_val_loss": math.nan}, {"best_val_loss": "1"}, {"scaler": {"scale": 2.0}}, {"scaler": None}, {"corpus": {}}],
)
def test_what_a_resume_takes_beside_the_weights_is_what_a_run_writes(change):
    whole("out/run/ckpt.pt", **change)
    with pytest.raises(UserError, match=f"has a {next(iter(change))} that no run has written: .*as its init_from"):
        checkpoint_to_resume(config())


def test_a_model_that_memory_cannot_hold_is_not_begun(monkeypatch):
    monkeypatch.setattr(resuming, "free_memory", lambda: 10**9)
    with pytest.raises(UserError, match=r"model\.n_embd: its weights alone take [\d,.]+ GB, and 1\.0 GB of memory are"):
        initial_model(config("--model.n_layer", "1000000"), Corpus("corpus"), None)
    with pytest.raises(UserError, match=r"model\.n_embd: a GPT of .* does not fit into any memory"):
        initial_model(config("--model.n_embd", str(2**40)), Corpus("corpus"), None)
