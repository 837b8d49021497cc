"""Models from and to Hugging Face's classes, which are also this model's independent peers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.checkpoint import load_model
from harness.errors import UserError
from harness.families import read_config
from harness.pretrained import load_hf, save_hf, stored_weights
from harness.tokenizer import from_name
from model import GPT, GPTConfig
from tests.helpers import tiny_gpt
from tests.processes import run_python

# Logits of a few units, of float32 and two implementations: some ten layers' rounding, 1e-6 each at most.
SAME_LOGITS = {"rtol": 0, "atol": 2e-5}
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


ROPE = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}


@pytest.mark.parametrize(
    ("written", "changes"),
    [
        ("GPT2LMHeadModel", {}),
        ("GPT2LMHeadModel", {"bias": False, "activation": "gelu", "dropout": 0.1}),  # its biases are zeros there
        ("GPT2LMHeadModel", {"n_inner": 20, "tie_embeddings": False, "norm_eps": 1e-3, "qkv_bias": False}),
        ("LlamaForCausalLM", ROPE | {"rope_theta": 100.0}),
        ("LlamaForCausalLM", ROPE | {"n_kv_head": 1, "head_dim": 6, "rope_scaling": 4.0, "rope_original_context": 40}),
        ("LlamaForCausalLM", ROPE | {"bias": True, "qkv_bias": False, "tie_embeddings": False}),
        ("Qwen2ForCausalLM", ROPE | {"qkv_bias": True, "n_kv_head": 1}),
        ("Qwen3ForCausalLM", ROPE | {"qk_norm": True, "tie_embeddings": False}),
        ("GPTNeoXForCausalLM", {"position": "rope", "rope_fraction": 0.5, "parallel_residual": True}),
        ("GPTNeoXForCausalLM", {"position": "rope", "bias": False, "activation": "gelu", "rope_scaling": 2.0}),
        ("MistralForCausalLM", ROPE | {"n_head": 3, "n_embd": 8, "head_dim": 4}),
    ],
)
def test_exported_model_gives_the_same_logits_there_and_back(tmp_path, written, changes):
    model = random_gpt(**changes)
    assert save_hf(model, tmp_path) == written
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(peer).__name__ == written
    with torch.no_grad():
        logits = model(IDX)[0]
        torch.testing.assert_close(peer(IDX).logits, logits, **SAME_LOGITS)
        torch.testing.assert_close(load_hf(str(tmp_path))(IDX)[0], logits, **SAME_LOGITS)
    assert logits.std() > 0.3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": "softmax1"}, "gpt2, the nearest, has no normalizer 'softmax1'"),
        ({"norm": "rmsnorm"}, "gpt2, the nearest, has no norm 'rmsnorm'"),
        (ROPE | {"normalizer": "sink"}, "llama, the nearest, has no normalizer 'sink'"),
        (ROPE | {"rope_fraction": 0.5}, "llama, the nearest, has no rope_fraction 0.5"),
        (ROPE | {"qk_norm": True, "qkv_bias": True}, "qwen2, the nearest, has no qk_norm True"),
        ({"position": "rope", "n_kv_head": 1}, "gpt_neox, the nearest, has no n_kv_head 1"),
    ],
)
def test_a_model_that_no_family_can_express_is_not_exported(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        save_hf(random_gpt(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_option_or_a_parameter_that_no_family_has_is_refused(tmp_path):
    Younger = dataclasses.make_dataclass("Younger", [("n_sinks", int, 4)], bases=(GPTConfig,))
    model = random_gpt()
    model.config = Younger(**dataclasses.asdict(model.config))
    save_hf(model, tmp_path / "as_ever")
    model.config.n_sinks = 2
    with pytest.raises(UserError, match="gpt2, the nearest, has no n_sinks 2"):
        save_hf(model, tmp_path / "younger")
    model.config.n_sinks = 4
    model.transformer.h[0].attn.gate = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no transformer\.h\.0\.attn\.gate"):
        save_hf(model, tmp_path / "younger")
    assert not (tmp_path / "younger").exists()


MEASURED = """
import re, sys
from pathlib import Path
import torch
from harness.pretrained import load_hf

def megabytes(of):
    return int(re.search(rf"{of}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

for folder in sys.argv[1:]:  # the first one, tiny, for what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = megabytes("VmRSS")
    model = load_hf(folder)
    print(megabytes("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak from now on")
@pytest.mark.slow
def test_a_model_takes_its_own_size_and_one_file_in_memory(tmp_path):
    folders, size = [], 0.0
    for width, suffix in ((16, "safetensors"), (16, "bin"), (1024, "safetensors"), (1024, "bin")):
        folder = tmp_path / f"{width}_{suffix}"
        folder.mkdir()
        folders.append(folder)
        c = {"model_type": "llama", "vocab_size": 61, "max_position_embeddings": 16, "num_attention_heads": 4}
        c |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4}
        (folder / "config.json").write_text(json.dumps(c))
        family, config = read_config(c)
        with torch.device("meta"):
            stored = stored_weights(dict(GPT(config).named_parameters()), config, family)
        files = {name: f"{'_'.join(name.split('.')[:3])}.{suffix}" for name in stored}  # a layer a file
        for file in set(files.values()):
            weights = {name: torch.ones(shape) for name, (shape, _) in stored.items() if files[name] == file}
            (save_file if suffix == "safetensors" else torch.save)(weights, folder / file)
        whole = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
        (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": files}))
        size = sum(shape.numel() for shape, _ in stored.values()) * 4 / 2**20
    found = run_python("-c", MEASURED, *folders)
    assert size > 200, found.stderr
    for peak in map(float, found.stdout.split()[2:]):
        assert size / 2 < peak < size * 5 / 4 + 20  # a layer is a quarter; a few megabytes for what else a process does


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


@pytest.mark.parametrize(
    "part", ["../outside.safetensors", "{folder}/outside.safetensors", "a/../../outside.safetensors"]
)
def test_weights_outside_of_the_folder_are_not_read(tmp_path, part):
    save_peer(tmp_path / "peer")
    (tmp_path / "peer" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (tmp_path / "peer" / "a").mkdir()
    index = {"weight_map": {"a": part.format(folder=tmp_path)}}
    (tmp_path / "peer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not in its folder" in refusal(tmp_path / "peer")


@pytest.mark.parametrize("changes", [{"n_layer": 10**6}, {"vocab_size": 10**9}, {"n_positions": 10**12}])
def test_a_model_far_larger_than_its_weights_is_not_made(tmp_path, changes):
    save_peer(tmp_path)
    edit_config(tmp_path, **changes)
    assert "the weights lack most of a GPT of" in refusal(tmp_path)


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
        {"vocab_size": 10**30},
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


@pytest.mark.parametrize("name", ["out/smollm2", "models/mine", "a/b/c", "./mine", "~nobody/mine"])
def test_what_can_only_be_a_folder_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.pretrained._import", lambda module: pytest.fail("the hub was asked"))
    Path("models").mkdir()
    assert refusal(name) == f"hf:{name}: no such folder"
    with pytest.raises(UserError, match="no such folder"):
        from_name(f"hf:{name}")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_what_can_be_a_name_on_the_hub_is_asked_for_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "harness.pretrained._import", lambda module: (_ for _ in ()).throw(UserError(f"hf:{name}: asked"))
    )
    assert refusal(name) == f"hf:{name}: asked"
