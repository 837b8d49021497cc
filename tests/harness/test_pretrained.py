"""GPT-2 weights from and to Hugging Face's class, which is also the model's independent peer."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.checkpoint import load_model
from harness.errors import UserError
from harness.pretrained import load_hf, save_hf
from model import GPT, GPTConfig
from tests.helpers import tiny_gpt

# Logits of a few units, of float32 and two implementations: some ten layers' rounding, 1e-6 each at most.
SAME_LOGITS = {"rtol": 0, "atol": 1e-5}
IDX = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
SHAPE = {"block_size": 16, "vocab_size": 61}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 would at its import


def save_peer(folder, cls=transformers.GPT2LMHeadModel, **config):
    """A GPT-2 of Hugging Face's in `folder`, with matrices (and so logits) far from 0."""
    shape = {"vocab_size": 61, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 8, "initializer_range": 0.5}
    torch.manual_seed(0)
    peer = cls(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **config)).eval()
    for name, parameter in peer.named_parameters():
        if name.endswith("bias"):  # 0 at first, which would hide a bias that is lost
            torch.nn.init.normal_(parameter, std=0.5)
    peer.save_pretrained(folder)
    return peer


def random_gpt(**changes) -> GPT:
    return tiny_gpt(std=0.5, **SHAPE | changes)


def refusal(name_or_folder) -> str:
    with pytest.raises(UserError) as error:
        load_hf(str(name_or_folder))
    message = str(error.value)
    assert "\n" not in message
    assert f"hf:{name_or_folder}" in message
    return message


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_imported_weights_give_the_peers_logits(tmp_path, activation):
    peer = save_peer(tmp_path, activation_function=activation)
    with torch.no_grad():
        expected = peer(IDX).logits
        torch.testing.assert_close(load_hf(str(tmp_path))(IDX)[0], expected, **SAME_LOGITS)
    assert expected.std() > 0.5


def test_a_peer_without_its_language_model_head_loads_as_well(tmp_path):
    save_peer(tmp_path / "head")
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "head")
    peer.transformer.save_pretrained(tmp_path / "trunk")
    assert torch.equal(load_hf(str(tmp_path / "trunk"))(IDX)[0], load_hf(str(tmp_path / "head"))(IDX)[0])


def test_load_model_takes_hf_folders(tmp_path):
    save_peer(tmp_path)
    model, info = load_model(f"hf:{tmp_path}")
    assert not model.training
    assert info == {"source": f"hf:{tmp_path}"}
    assert torch.equal(model(IDX)[0], load_hf(str(tmp_path)).eval()(IDX)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_exported_model_gives_the_same_logits_there_and_back(tmp_path, bias, activation):
    model = random_gpt(bias=bias, activation=activation)
    save_hf(model, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(IDX)[0]
        torch.testing.assert_close(peer(IDX).logits, logits, **SAME_LOGITS)
        torch.testing.assert_close(load_hf(str(tmp_path))(IDX)[0], logits, **SAME_LOGITS)
    assert logits.std() > 0.5


def test_an_option_or_a_parameter_that_gpt2_does_not_have_is_refused(tmp_path):
    Younger = dataclasses.make_dataclass("Younger", [("n_kv_head", int, 4)], bases=(GPTConfig,))
    model = random_gpt()
    model.config = Younger(**vars(model.config))
    save_hf(model, tmp_path / "as_ever")
    model.config.n_kv_head = 2
    with pytest.raises(UserError, match="GPT-2's class has no n_kv_head, here 2"):
        save_hf(model, tmp_path / "younger")
    model.config.n_kv_head = 4
    model.transformer.h[0].attn.gate = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"GPT-2's class has no transformer\.h\.0\.attn\.gate"):
        save_hf(model, tmp_path / "younger")
    assert not (tmp_path / "younger").exists()


def test_softmax1_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match=r"softmax1.*only a softmax model"):
        save_hf(random_gpt(normalizer="softmax1"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_inner", 20),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("activation_function", "relu"),
        ("add_cross_attention", True),
    ],
)
def test_a_gpt2_that_this_model_cannot_express_is_refused_by_its_field(tmp_path, field, value):
    save_peer(tmp_path, **{field: value})
    assert field in refusal(tmp_path)


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change, suffix=".safetensors") -> None:
    """`change` the dict of weights in place, and write it as safetensors or as a .bin of PyTorch's."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    if suffix == ".safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")


def untied(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights["lm_head.weight"][3, 2] += 1


def surplus(weights):
    weights |= {name.replace(".h.1.", ".h.2."): value.clone() for name, value in weights.items() if ".h.1." in name}


def int8(weights):
    weights["transformer.h.0.attn.c_attn.weight"] = weights["transformer.h.0.attn.c_attn.weight"].to(torch.int8)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [(untied, "lm_head.weight is not"), (surplus, "transformer.h.2.attn"), (int8, "c_attn.weight is int8")],
)
def test_weights_that_this_model_has_no_place_for_are_refused(tmp_path, change, reason, suffix):
    """An untied head under a config that says tied would otherwise be dropped, as transformers does."""
    save_peer(tmp_path)
    edit_weights(tmp_path, change, suffix)
    assert reason in refusal(tmp_path)


def prefixed(weights):
    for name in list(weights):
        weights[f"_orig_mod.module.{name}"] = weights.pop(name)


def with_buffers(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    for layer in (0, 1):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16)
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("change", [lambda weights: None, prefixed, with_buffers])
def test_weights_as_other_versions_wrote_them_give_the_peers_logits(tmp_path, change, suffix):
    peer = save_peer(tmp_path)
    edit_weights(tmp_path, change, suffix)
    edit_config(tmp_path, n_head=2.0, _attn_implementation="flash_attention_2")  # neither changes what is computed
    with torch.no_grad():
        torch.testing.assert_close(load_hf(str(tmp_path))(IDX)[0], peer(IDX).logits, **SAME_LOGITS)


def test_weights_in_several_files(tmp_path):
    peer = save_peer(tmp_path)
    peer.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    assert torch.equal(load_hf(str(tmp_path / "parts"))(IDX)[0], load_hf(str(tmp_path))(IDX)[0])
    next((tmp_path / "parts").glob("model-*.safetensors")).unlink()
    assert "which is not there" in refusal(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "the weights lack" in refusal(tmp_path / "parts")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"n_head": 2.5},
        {"n_head": "2"},
        {"n_head": 0},
        {"n_layer": None},
        {"pruned_heads": {"0": [1]}},
        {"activation_function": ["gelu"]},
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_its_key(tmp_path, changes):
    save_peer(tmp_path)
    edit_config(tmp_path, **changes)
    assert next(iter(changes)) in refusal(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"n_head": '])
def test_a_folder_without_a_readable_config(tmp_path, content):
    save_peer(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_an_adapter_beside_the_weights_is_not_left_out(tmp_path):
    save_peer(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it" in refusal(tmp_path)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (self.victim, "w")


def test_code_in_weights_is_never_run_and_damage_is_seen(tmp_path):
    save_peer(tmp_path)
    edit_weights(tmp_path, lambda weights: None, ".bin")
    weights = tmp_path / "pytorch_model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "is damaged" in refusal(tmp_path)
    torch.save({"wte.weight": Malicious(str(tmp_path / "victim"))}, weights)
    assert "nothing in it was run" in refusal(tmp_path)
    weights.write_bytes(b"")
    assert "pytorch_model.bin is truncated" in refusal(tmp_path)
    torch.save([1, 2], weights)
    assert "not tensors by their names" in refusal(tmp_path)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_of_weights_is_refused_with_the_folder_to_name(tmp_path, suffix):
    save_peer(tmp_path)
    edit_weights(tmp_path, lambda weights: None, suffix)
    file = next(path for path in tmp_path.iterdir() if path.suffix == suffix)
    with pytest.raises(UserError, match=f"hf:{tmp_path}$"):
        load_model(file)


def test_another_architecture_is_refused(tmp_path):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=61
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert "model_type" in refusal(tmp_path)


def test_nothing_there(tmp_path):
    refusal(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty")
    refusal("no-such-gpt2")  # a hub name, which cannot be looked up


def test_weights_that_are_missing_are_never_made_up(tmp_path):
    save_peer(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    some = {name: value for name, value in weights.items() if ".h.1.mlp." not in name}
    save_file(some, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    assert "h.1.mlp" in refusal(tmp_path / "part")


def test_truncated_weights_are_refused(tmp_path):
    save_peer(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refusal(tmp_path)
