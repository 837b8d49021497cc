"""An experiment's file: its cells are what ordinary commands make, and every mistake in it is a line that names it."""

import json
import re
import shlex

import pytest
import yaml

from harness.config_files import load_config
from harness.errors import UserError
from harness.experiments.grid import Experiment, load_experiment
from tests.helpers import ROOT

BASE = ROOT / "configs" / "backcopy_softmax.yaml"
GRID = {
    "question": "Which?",
    "base": str(BASE),
    "seeds": [3, 1],
    "config": {"training": {"max_steps": 300, "dtype": "float32"}},
    "variants": {"softmax": None, "tuned": {"model": {"normalizer": "softmax1"}, "training": {"max_steps": 20}}},
}


def experiment(folder, **changed) -> Experiment:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | changed, sort_keys=False))
    return load_experiment(path, folder / "out")


def refusal(folder, **changed) -> str:
    with pytest.raises(UserError) as error:
        experiment(folder, **changed)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{folder}/grid.yaml")
    return str(error.value).removeprefix(f"{folder}/grid.yaml")


def test_a_cell_is_what_its_command_line_makes_and_says_what_the_variant_changes(tmp_path, monkeypatch):
    found = experiment(tmp_path)
    assert [cell.name for cell in found.cells] == ["softmax_s3", "softmax_s1", "tuned_s3", "tuned_s1"]
    cell = found.cells[-1]
    monkeypatch.chdir(ROOT)
    assert load_config(cell.arguments).to_dict() == cell.config.to_dict()
    assert cell.arguments[0] == "configs/backcopy_softmax.yaml"
    assert (cell.config.model.normalizer, cell.config.training.max_steps) == ("softmax1", 20)
    assert (cell.config.training.dtype, cell.config.run.seed) == ("float32", 1)
    assert cell.folder == tmp_path / "out" / "grid" / "tuned_s1"
    assert found.baseline == "softmax"


def test_a_value_of_any_kind_reaches_the_command_line_as_it_is(tmp_path):
    values = {"name": "sgd", "momentum": None, "lr": 1e-5, "decay_steps": 7}
    sections = {"optimizer": values, "evaluation": {"kurtosis": False, "batches": "full"}}
    (cell, _) = experiment(tmp_path, variants={"odd": sections}).cells
    again = load_config(shlex.split(shlex.join(["configs/backcopy_softmax.yaml", *cell.arguments[1:]])))
    for config in (cell.config, again):
        assert {key: getattr(config.optimizer, key) for key in values} == values
        assert (config.evaluation.kurtosis, config.evaluation.batches) == (False, "full")


def test_a_cell_comes_after_the_cell_of_its_seed_that_it_starts_from(tmp_path):
    tuned = {"training": {"init_from": "@teacher"}, "kl": {"reference": "@teacher"}}
    cells = experiment(tmp_path, variants={"tuned": tuned, "teacher": None}).cells
    assert [cell.name for cell in cells] == ["teacher_s3", "teacher_s1", "tuned_s3", "tuned_s1"]
    assert cells[2].config.training.init_from == cells[2].config.kl.reference == str(cells[0].checkpoint)


def test_diagnostics_are_commands_on_the_last_checkpoint_and_on_those_along_training(tmp_path):
    diagnostics = {
        "every": 100,
        "quantization": {"along": False, "schemes": ["W8*", "A8*"]},
        "compare_kl": {"reference": "@softmax", "batches": 2},
        "perplexity": {"variants": ["softmax"]},
    }
    found = experiment(tmp_path, diagnostics=diagnostics)
    assert all(cell.config.training.keep_interval == 100 for cell in found.cells)
    softmax, tuned = found.cells[0], found.cells[2]
    for cell in (softmax, tuned):
        (cell.folder / "steps").mkdir(parents=True)
        for step in ("200", "100", "300", "notes"):
            (cell.folder / "steps" / f"{step}.pt").touch()

    def commands(cell) -> dict[str, list[str]]:
        pairs = [pair for measurement in found.measurements for pair in measurement.commands(cell)]
        return {str(path.relative_to(cell.folder / "diagnostics")): words for words, path in pairs}

    of_softmax, of_tuned = commands(softmax), commands(tuned)
    assert set(of_softmax) == {"quantization.json", "perplexity.json", "along/perplexity.json"}
    assert set(of_tuned) == {"quantization.json", "compare_kl.json"}  # its 20 steps end before the first is kept
    out, steps = str(softmax.folder / "diagnostics"), softmax.folder / "steps"
    assert of_softmax["quantization.json"][:2] == ["scripts/quantization.py", str(softmax.checkpoint)]
    assert of_softmax["quantization.json"][2:] == ["--out", out, "--schemes", "W8*", "A8*"]
    along = of_softmax["along/perplexity.json"]
    assert along[1 : along.index("--out")] == [str(steps / "100.pt"), str(steps / "200.pt")]  # 300 is ckpt.pt
    assert of_tuned["compare_kl.json"][1:3] == [str(softmax.checkpoint), str(tuned.checkpoint)]


def test_a_claims_file_stands_for_the_experiment_that_decides_it(tmp_path):
    whole = experiment(tmp_path)
    (tmp_path / "claim.yaml").write_text("experiment: grid.yaml\nsentence: So it is.\n")
    assert load_experiment(tmp_path / "claim.yaml", tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"sedes": [1]}, "an experiment has the keys .*, not 'sedes'"),
        ({"question": None}, "it lacks question"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is no list of different integers"),
        ({"seeds": ["1"]}, "is no list of different integers"),
        ({"seeds": [-1]}, "variant softmax: run.seed takes an int ≥ 0"),
        ({"variants": ["softmax"]}, "variants: a mapping of names"),
        ({"variants": {"soft-max": None}}, "'soft-max': a name is letters"),
        ({"variants": {"a": None, "A": None}}, "'a' and another one differ in their case alone"),
        ({"variants": {"a": {"model": {"normalizr": "softmax1"}}}}, "variant a: unknown key 'normalizr' in section"),
        ({"variants": {"a": {"modle": {}, "mdl": {"n_layer": 1}}}}, "variant a: unknown section 'mdl'"),
        ({"variants": {"a": {"model": {"normalizer": "sofmax"}}}}, "variant a: model.normalizer takes softmax or"),
        ({"variants": {"a": {"model": "softmax1"}}}, "variants: a: model: a mapping is expected, not 'softmax1'"),
        ({"variants": {"a": {"training": {"init_from": "@b"}}}}, "'@b' is no @VARIANT; the variants are a"),
        ({"variants": {"a": {"training": {"init_from": "@a"}}}}, "variants: a needs itself"),
        ({"diagnostics": {"kurtosis": None}}, "kurtosis: there is no scripts/kurtosis.py"),
        ({"diagnostics": {"sample": None}}, "sample: it takes more than checkpoints"),
        ({"diagnostics": {"perplexity": {"batchs": 2}}}, "diagnostics: perplexity: unrecognized arguments: --batchs"),
        ({"diagnostics": {"perplexity": {"batches": 0}}}, "diagnostics: perplexity: --batches 0: at least 1"),
        ({"diagnostics": {"perplexity": {"batches": "x"}}}, "argument --batches: invalid int value: 'x'"),
        ({"diagnostics": {"compare_kl": None}}, "compare_kl: it needs a reference: @VARIANT"),
        ({"diagnostics": {"compare_kl": {"reference": "softmax"}}}, "'softmax' is no @VARIANT"),
        ({"diagnostics": {"perplexity": {"reference": "@softmax"}}}, "perplexity: it takes no reference"),
        ({"diagnostics": {"perplexity": {"variants": ["b"]}}}, "variants: there is no b"),
        ({"diagnostics": {"every": 0}}, "diagnostics: every: 0 is no positive number of steps"),
        ({"diagnostics": {"perplexity": {"out": "/tmp"}}}, "perplexity: 'out' is no option to give here"),
        ({"diagnostics": {"perplexity": {1: 2}}}, "perplexity: 1 is no option to give here"),
        ({"variants": {"a": {"run": {"seed": 3}}}}, "variants: a: run.seed is no choice of an experiment's"),
        ({"config": {"training": {"overwrite": True}}}, "config: training.overwrite is no choice"),
        ({"variants": {"a": {"model": {"n_layer": [1]}}}}, r"model.n_layer: \[1\] is no value of a config"),
        ({"variants": {"a": {"optimizer": {"lr": "--x"}}}}, "variant a: optimizer.lr takes .*, not '--x'"),
        ({"variants": {"lambda": None}}, "'lambda': a name is letters"),
        ({"question": ["?"]}, r"question: a text is expected, not \['\?'\]"),
        ({"base": "nowhere.yaml"}, "base: there is no .*nowhere.yaml"),
        ({"prepare": ["rm", "-r", "data"]}, r"prepare: a list that begins with data/CORPUS/prepare.py"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_every_mistake_is_one_line_that_names_the_file_and_the_place(tmp_path, changed, problem):
    assert re.search(problem, refusal(tmp_path, **changed))


def test_two_variants_of_one_name_are_refused_with_their_line(tmp_path):
    (tmp_path / "grid.yaml").write_text("question: Which\nvariants:\n  softmax:\n  softmax: {model: {n_layer: 2}}\n")
    with pytest.raises(UserError, match=r"grid.yaml, line 4: not valid YAML: 'softmax' stands here twice"):
        load_experiment(tmp_path / "grid.yaml")
