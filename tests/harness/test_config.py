"""The keys of a config, as --help explains them, and the configs that are shipped."""

import dataclasses
import math

import pytest
import torch

from harness.config import _IDLE, _SHIPPED, SECTIONS, help_text
from harness.config_files import load_config
from model import GPT, NORMALIZERS
from tests.helpers import ROOT, random_ids, tiny_gpt

CONFIGS = ROOT / "configs"
KEYS = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


def test_help_explains_every_key_with_its_default():
    lines = help_text().splitlines()
    for key, f in KEYS.items():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [f"--{key}"])
        assert len(lines[at].split()) > 2, f"{key} has no explanation"
        default = {None: "null", True: "true", False: "false"}.get(f.default, f.default)
        assert f"default: {default})" in lines[at + 1] or math.isclose(
            float(lines[at + 1].split("default: ")[1].rstrip(")")), f.default
        )


SET = {  # keys that may change nothing, each at a value that is not its default
    "model.gate_init": 0.25,
    "model.rope_theta": 5.0,
    "model.rope_fraction": 0.5,
    "model.rope_scaling": 2.0,
    "model.rope_original_context": 4,
    "model.activation": "gelu",
    "model.softmax_n": 3.0,
    "model.sink_init": -2.0,
    "model.ssmax_init": 1.0,
    "model.clipped_alpha": 1.0,
    "model.clipped_by": "row",
    "model.sigmoid_bias": -1.0,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.eps": 1e-3,
    "optimizer.decay_share": 0.5,
    "optimizer.decay": "all",
    "training.nonfinite_limit": 3,
    "training.overwrite": True,
    "kl.mode": "distill",
    "kl.direction": "forward",
    "kl.aggregate": "max",
    "kl.tau": 0.5,
    "kl.weight": 2.0,
    "kl.temperature": 2.0,
}


def notes(**keys) -> list[str]:
    words = [word for key, value in keys.items() for word in (f"--{key}", "null" if value is None else str(value))]
    config = load_config([str(CONFIGS / "stdlib_softmax.yaml"), *words])
    return config.idle(config.model.gpt_config(256))


@pytest.mark.parametrize(("keys", "other", "values"), _IDLE, ids=[keys for keys, *_ in _IDLE])
def test_a_key_that_changes_nothing_is_told_with_what_it_lacks(keys, other, values):
    beside = {"kl.reference": "x"} if other in ("kl.mode", "kl.weight") else {}
    beside |= {"model.position": "rope"} if other == "model.rope_scaling" else {}
    beside |= {"model.normalizer": "clipped"} if other == "model.clipped_alpha" else {}
    for key, value in ((key, value) for key in keys.split() for value in values):
        given = beside | {other: value}
        reason = "null" if value is None else str(value).lower()
        (line,) = notes(**given | {key: SET[key]})
        assert line.startswith(f"command line: {key}: {SET[key]} changes nothing here, since {other} is ")
        assert line.removesuffix(".0").endswith(reason)
        assert notes(**given | {key: "null" if KEYS[key].default is None else KEYS[key].default}) == []
        if key.startswith("model."):  # it is so
            shape = {name.removeprefix("model."): x for name, x in given.items()}
            one, two = (tiny_gpt(**shape | more) for more in ({}, {key.removeprefix("model."): SET[key]}))
            assert torch.equal(*(model(random_ids(2, 12))[0] for model in (one, two)))


def test_a_key_that_changes_something_is_not_told():
    rope = {"model.position": "rope", "model.rope_scaling": 2.0, "model.rope_original_context": 64}
    assert notes(**rope | {"model.gate": "head", "model.gate_init": 0.25, "optimizer.beta1": 0.5}) == []
    assert notes(**{"model.normalizer": "sink", "model.sink_init": -2.0, "kl.reference": "x", "kl.tau": 0.5}) == []


def test_neither_what_is_inherited_nor_a_key_that_a_new_normalizer_may_read_is_told(tmp_path, monkeypatch):
    assert set(_SHIPPED) == set(NORMALIZERS)
    monkeypatch.setitem(NORMALIZERS, "mine", NORMALIZERS["sink"])
    assert notes(**{"model.normalizer": "mine", "model.sink_init": 1.0}) == []
    (tmp_path / "base.yaml").write_text("model: {sink_init: 1.0}\ndata: {corpus: corpus}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nmodel: {gate_init: 0.5}\n")
    config = load_config([str(tmp_path / "mine.yaml")])
    (line,) = config.idle(config.model.gpt_config(256))
    assert line.startswith(f"{tmp_path / 'mine.yaml'}: model.gate_init: 0.5 changes nothing here")


# --- the shipped configs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_named_after_its_file(path):
    assert load_config([str(path)]).run.name == path.stem


VARIANTS = [(n, b) for n in ("softmax", "softmax1", "sink") for b in ("full", "diagonal", "ste")][1:]


@pytest.mark.parametrize("family", ["stdlib", "shakespeare_char", "gpt2_124m"])
@pytest.mark.parametrize(("normalizer", "backward"), VARIANTS)
def test_variants_differ_from_their_base_in_the_attention_alone(family, normalizer, backward):
    expected = load_config([str(CONFIGS / f"{family}_softmax.yaml")]).to_dict()
    assert (expected["model"]["normalizer"], expected["model"]["backward"]) == ("softmax", "full")
    name = f"{family}_{normalizer}" + ("" if backward == "full" else f"_{backward}")
    expected["model"] |= {"normalizer": normalizer, "backward": backward}
    expected["run"]["name"] = name
    assert load_config([str(CONFIGS / f"{name}.yaml")]).to_dict() == expected


@pytest.mark.parametrize(("family", "base"), [("llama_small", "stdlib_softmax"), ("llama_124m", "gpt2_124m_softmax")])
def test_llama_configs_are_todays_model_in_the_recipe_of_their_base(family, base):
    llama, gpt2 = (load_config([str(CONFIGS / f"{name}.yaml")]) for name in (family, base))
    with torch.device("meta"):
        sizes = [GPT(config.model.gpt_config(256)).num_parameters() for config in (llama, gpt2)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    new = {"n_kv_head", "n_inner", "position", "norm", "mlp"}
    both = [config.to_dict() for config in (llama, gpt2)]
    assert {key for key, value in both[0]["model"].items() if value != both[1]["model"][key]} <= new
    for config in both:
        del config["model"], config["run"]["name"]
    assert both[0] == both[1]
    for normalizer in ("softmax1", "sink"):
        expected = llama.to_dict()
        expected["model"]["normalizer"], expected["run"]["name"] = normalizer, f"{family}_{normalizer}"
        assert load_config([str(CONFIGS / f"{family}_{normalizer}.yaml")]).to_dict() == expected
