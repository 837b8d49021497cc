"""What an experiment would take: tokens and FLOPs exactly, seconds from real steps."""

import yaml

from harness.experiments.estimate import estimate
from harness.experiments.grid import load_experiment
from model import GPT
from tests.helpers import ROOT, tiny_corpus


def test_tokens_and_flops_are_those_of_all_steps_and_a_reference_still_to_be_trained_is_counted(tmp_path):
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    grid = {"question": "?", "base": str(ROOT / "configs" / "backcopy_softmax.yaml"), "seeds": [1, 2]}
    grid["config"] = {
        "model": small,
        "data": {"corpus": str(tiny_corpus(tmp_path / "corpus")), "windows": "stream"},
        "training": {"batch_size": 4, "max_steps": 30, "dtype": "float32"},
    }
    grid["variants"] = {"teacher": None, "pupil": {"kl": {"reference": "@teacher"}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    experiment = load_experiment(tmp_path / "grid.yaml", tmp_path)
    teacher, again, pupil, _ = estimate(experiment)
    assert teacher | {"cell": "teacher_s2"} == again
    model = experiment.cells[0].config.model
    tokens, a_token = 30 * 4 * 8, GPT(model.gpt_config(vocab_size=13)).flops_per_token()
    assert (teacher["tokens"], teacher["flops"], teacher["steps"]) == (tokens, tokens * a_token, 30)
    assert pupil["flops"] == teacher["flops"] * 4 // 3  # the teacher's forward pass is a third of forward and backward
    assert teacher["seconds"] > 0
