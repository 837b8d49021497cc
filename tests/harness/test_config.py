"""The keys of a config, as --help explains them, and the configs that are shipped."""

import dataclasses
import math

import pytest
import torch

from harness.config import SECTIONS, help_text
from harness.config_files import load_config
from model import GPT
from tests.helpers import ROOT

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
