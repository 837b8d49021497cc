"""What is there of cells: of which config, trained to which end, measured by which options."""

import json
import os

import pytest
import yaml

from harness.errors import UserError
from harness.experiments.runner import run_experiment
from harness.experiments.state import as_run, changed_keys, other_options, to_measure, trained


def write_config(cell, **changed) -> None:
    """As train.py writes it: with what the run finds out by itself."""
    config = cell.config.to_dict()
    config["model"] |= {"vocab_size": 97}
    config["training"] |= {"device": "cuda", "resume": "must"}
    for key, value in changed.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_cell_of_another_config_is_refused_with_the_keys_and_nothing_is_run(experiment):
    first, *others = experiment.cells
    for cell in others:
        write_config(cell)
        assert changed_keys(cell) == []
    write_config(first, training__max_steps=7, optimizer__lr=0.5, tracking__log_interval=3)
    assert changed_keys(first) == ["optimizer.lr 0.5 → 0.001", "training.max_steps 7 → 1000"]
    with pytest.raises(UserError, match=r"a_s1 holds a run of another config.*: optimizer.lr 0.5 → 0.001, training"):
        run_experiment(experiment, 1, "")
    assert not list((experiment.folder / "logs").iterdir())


def test_a_fine_tuned_cell_may_take_over_what_its_config_leaves_open(experiment):
    tuned = next(cell for cell in experiment.cells if cell.variant == "b")
    write_config(tuned, model__sigmoid_bias=-4.0)
    assert changed_keys(tuned) == []
    write_config(tuned, model__n_layer=3)  # the base's file sets it
    assert changed_keys(tuned) == ["model.n_layer 3 → 1"]


def test_only_what_is_not_measured_yet_or_with_other_options_or_checkpoints_is_measured(experiment):
    cell = experiment.cells[0]
    ((words, path),) = to_measure(experiment, cell)
    (cell.folder / "diagnostics").mkdir(parents=True)
    cell.checkpoint.write_text("a")
    path.write_text("{}")
    record = experiment.folder / "measured.json"
    record.write_text(json.dumps({str(path): as_run(words)}))
    assert to_measure(experiment, cell) == []
    os.utime(cell.checkpoint, (1, 1))
    assert to_measure(experiment, cell) == [(words, path)]
    record.write_text(json.dumps({str(path): as_run([*words, "--seed", "2"])}))
    assert to_measure(experiment, cell) == [(words, path)]
    record.write_text("torn")
    assert to_measure(experiment, cell) == [(words, path)]


def test_a_cell_that_started_from_a_checkpoint_made_anew_since_is_refused(experiment):
    teacher, pupil = experiment.cells[0], next(cell for cell in experiment.cells if cell.variant == "b")
    for cell, time in ((teacher, 1000), (pupil, 2000)):
        write_config(cell)
        cell.checkpoint.write_text("not looked at")
        os.utime(cell.checkpoint, (time, time))
    os.utime(teacher.checkpoint, (3000, 3000))
    with pytest.raises(UserError, match=r"b_s1 was trained before .*a_s1/ckpt.pt, which it starts from, was written"):
        trained(pupil)


def test_a_result_of_other_options_is_known(experiment):
    ((words, path),) = to_measure(experiment, experiment.cells[0])
    assert not other_options(experiment, words, path)  # nothing is known of it
    elsewhere = [word.replace("a_s1", "moved") for word in words]
    (experiment.folder / "measured.json").write_text(json.dumps({str(path): as_run(elsewhere)}))
    assert not other_options(experiment, words, path)
    assert other_options(experiment, [*words, "--seed", "2"], path)


@pytest.mark.parametrize("record", ["null", "[]", "3", '{"a": 1}', "torn"])
def test_a_record_that_is_none_has_everything_measured_again(experiment, record):
    (experiment.folder / "measured.json").write_text(record)
    assert len(to_measure(experiment, experiment.cells[0])) == 1
