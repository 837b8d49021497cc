"""Which weights a checkpoint may hold: under other names, of another kind, of nanoGPT and of quietGPT."""

import math
import re
from dataclasses import asdict, replace

import pytest
import torch

from harness.checkpoint import load_model
from model import GPTConfig
from tests.harness.test_checkpoint import CONFIG, IDX, checkpoint_of, random_gpt, refusal, saved
from tests.helpers import tiny_gpt


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 7."""
    return saved(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod._orig_mod.module.{name}",
        lambda name: name.replace(".h.1.", ".h.1._orig_mod."),  # each block compiled by itself
        lambda name: f"model.{name}",  # as Lightning's
        lambda name: name.replace("transformer.", "net.gpt."),
        lambda name: None if name == "lm_head.weight" else name,
        lambda name: None if name == "lm_head.weight" else name.removeprefix("transformer."),
    ],
)
@pytest.mark.parametrize("nan", [False, True])
def test_weights_under_other_names_load(path, rename, nan):
    """A tied head too that is missing, or holds the same NaN as the embedding."""
    state = random_gpt().state_dict()
    state["transformer.wte.weight"] = state["transformer.wte.weight"].clone()  # in a file of its own memory
    if nan:
        state["transformer.wte.weight"][3, 2] = state["lm_head.weight"][3, 2] = math.nan
    renamed = {rename(name): value for name, value in state.items() if rename(name)}
    torch.save(checkpoint_of(random_gpt()) | {"model": renamed}, path)
    loaded = load_model(path)[0].state_dict()
    assert all(loaded[name].equal(value) or value.isnan().any() for name, value in state.items())
    assert loaded["lm_head.weight"].isnan().sum() == nan


def untied(state):
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    state["lm_head.weight"][3, 2] += 1


def of_another_vocabulary(state):
    state["lm_head.weight"] = torch.zeros(13, 8)


def surplus(state):
    state |= {name.replace(".h.1.", ".h.2."): value for name, value in state.items() if ".h.1." in name}


def int8(state):
    state["transformer.h.0.attn.c_attn.weight"] = torch.ones(24, 8, dtype=torch.int8)


def twice(state):
    state["_orig_mod.transformer.ln_f.weight"] = torch.ones(8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (untied, r"lm_head\.weight is not transformer\.wte\.weight, and tie_embeddings in its model_args says it is"),
        (of_another_vocabulary, r"lm_head\.weight is not transformer\.wte\.weight"),
        (surplus, r"also have transformer\.h\.2\.attn\.c_attn\.bias, .* and 9 more"),
        (int8, r"transformer\.h\.0\.attn\.c_attn\.weight is int8: .*quantized"),
        (twice, r"are both transformer\.ln_f\.weight"),
    ],
)
def test_weights_that_this_model_has_no_place_for_are_refused_by_name(path, change, reason):
    state = random_gpt().state_dict()
    change(state)
    torch.save(checkpoint_of(random_gpt()) | {"model": state}, path)
    assert re.search(reason, refusal(path, load_model))


def test_a_head_of_its_own_is_taken_where_the_model_args_leave_it_unsaid(path):
    state, args = random_gpt().state_dict(), asdict(CONFIG)
    del args["tie_embeddings"]
    untied(state)
    torch.save({"model": state, "model_args": args}, path)
    model, _ = load_model(path)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.transformer.wte.weight, state["transformer.wte.weight"])
    del state["lm_head.weight"]  # and is never made up where they say that there is one
    torch.save({"model": state, "model_args": args | {"tie_embeddings": False}}, path)
    assert "the weights lack lm_head.weight" in refusal(path, load_model)


def test_a_matrix_a_third_as_high_as_wide_is_not_taken_for_hugging_faces(path):
    model = random_gpt(replace(CONFIG, n_embd=24, head_dim=2, n_kv_head=1))
    assert model.transformer.h[0].attn.c_attn.weight.shape == (8, 24)
    torch.save(checkpoint_of(model), path)
    assert torch.equal(load_model(path)[0](IDX)[0], model(IDX)[0])


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_alone_are_refused_with_the_command_that_makes_a_checkpoint_of_them(path, key, monkeypatch):
    """A state dict, a Lightning checkpoint (with its prefix), and one of ours without model_args."""
    state = {f"model.{name}": value for name, value in random_gpt().state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, path)
    command = re.search(r"torch\.save\(.*\)", refusal(path, load_model))[0]
    monkeypatch.chdir(path.parent)
    exec(command.replace("'n_head': …, 'activation': …", "'n_head': 2, 'activation': 'gelu_tanh'"), {"torch": torch})
    softmax = tiny_gpt(**vars(CONFIG) | {"normalizer": "softmax", "backward": "full"})
    assert torch.equal(load_model(path.parent / "ckpt.pt")[0](IDX)[0], softmax(IDX)[0])


def test_weights_of_a_llama_alone_say_what_their_names_and_shapes_tell(path, monkeypatch):
    parts = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "tie_embeddings": False}
    config = replace(CONFIG, **parts, bias=False, qkv_bias=True, n_inner=20, normalizer="softmax", backward="full")
    model = random_gpt(config)
    torch.save(model.state_dict(), path)
    message = refusal(path, load_model)
    assert "put block_size, position, norm, n_head and activation" in message
    command = re.search(r"torch\.save\(.*\)", message)[0]
    for hole, value in asdict(config).items():
        command = command.replace(f"{hole!r}: …", f"{hole!r}: {value!r}")
    monkeypatch.chdir(path.parent)
    exec(command, {"torch": torch})
    assert load_model(path.parent / "ckpt.pt")[0].config == config


# --- other projects' checkpoints ------------------------------------------------------------------------------------


def test_nanogpts_checkpoint_of_a_compiled_model(tmp_path):
    """nanoGPT's: no normalizer or backward, the exact GELU, iter_num; and what torch.compile does to the names."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=False, activation="gelu")
    model = random_gpt(config)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save(
        {
            "model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
            "model_args": {name: getattr(config, name) for name in names},
            "iter_num": 5000,
        },
        tmp_path / "ckpt.pt",
    )
    loaded, info = load_model(tmp_path / "ckpt.pt")
    assert loaded.config == config
    assert torch.equal(loaded(IDX)[0], model(IDX)[0])
    assert info["iter_num"] == 5000


@pytest.mark.parametrize("use_softmax1", [True, False])
def test_quietgpts_checkpoint(tmp_path, use_softmax1):
    """quietGPT's: `use_softmax1`, GPT-2's tanh GELU, and the causal mask stored as a buffer of each attention."""
    normalizer = "softmax1" if use_softmax1 else "softmax"
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, normalizer=normalizer)
    model = random_gpt(config)
    mask = torch.ones(8, 8).tril().view(1, 1, 8, 8)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save(
        {
            "model": model.state_dict() | {f"transformer.h.{i}.attn.bias": mask for i in range(2)},
            "model_args": {name: getattr(config, name) for name in names} | {"use_softmax1": use_softmax1},
        },
        tmp_path / "ckpt.pt",
    )
    loaded, _ = load_model(tmp_path / "ckpt.pt")
    assert loaded.config == config
    assert torch.equal(loaded(IDX)[0], model(IDX)[0])
