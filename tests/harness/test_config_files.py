"""Reading configs: what they say is what is trained, and every mistake in one is a line that names it."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.config import SECTIONS, Config, help_text
from harness.config_files import load_config, main_config
from harness.errors import UserError

KEYS = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def config_of(text: str, *overrides: str) -> Config:
    return load_config([write("experiment.yaml", text), *overrides])


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- values ---------------------------------------------------------------------------------------------------------


def test_an_empty_config_is_the_defaults():
    config = config_of("")
    assert config.model.n_layer == KEYS["model.n_layer"].default
    assert config.evaluation.batches == 50
    assert config.sources == {}


def test_a_run_is_named_after_its_file_unless_it_says_otherwise():
    assert config_of("").folder == Path("out/experiment")
    assert config_of("run: {name: a, out_dir: b}").folder == Path("b/a")


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_numbers_may_be_written_as_people_do(text):
    assert config_of(f"optimizer: {{lr: {text}}}").optimizer.lr == 1e-3
    assert config_of("", "--optimizer.lr", text.strip("'")).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.n_layer", "3", 3),
        ("model.bias", "false", False),
        ("model.normalizer", "softmax1", "softmax1"),
        ("model.vocab_size", "null", None),
        ("evaluation.batches", "7", 7),
        ("evaluation.batches", "full", "full"),
        ("training.compile", "auto", "auto"),
        ("training.compile", "true", True),
        ("optimizer.decay_steps", "null", None),
        ("run.seed", "0", 0),
        ("run.name", "a-b_1", "a-b_1"),
    ],
)
def test_values_get_their_types_from_the_file_and_the_command_line(key, text, value):
    section, name = key.split(".")
    from_file = config_of(f"{section}: {{{name}: {text}}}")
    with_space, with_equals = config_of("", f"--{key}", text), config_of("", f"--{key}={text}")
    for config in (from_file, with_space, with_equals):
        found = getattr(getattr(config, section), name)
        assert found == value
        assert type(found) is type(value)


def test_the_command_line_wins_and_its_last_word_counts():
    config = config_of("optimizer: {lr: 3, beta1: 0.5}", "--optimizer.lr", "1e-3", "--optimizer.lr=2e-3")
    assert (config.optimizer.lr, config.optimizer.beta1) == (2e-3, 0.5)


def test_yaml_merge_keys_work():
    model = config_of("model:\n  <<: {n_layer: 2, n_head: 2}\n  n_head: 4\n").model
    assert (model.n_layer, model.n_head) == (2, 4)


def test_a_tilde_is_the_users_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = config_of("run: {out_dir: ~/out, name: ~}\ntraining: {init_from: 'hf:~/gpt2'}", "--data.corpus=~/corpus")
    assert (config.run.out_dir, config.run.name, config.data.corpus) == (
        "/home/me/out",
        "experiment",
        "/home/me/corpus",
    )
    assert (config.training.init_from, config.kl.reference) == ("hf:/home/me/gpt2", None)


# --- extends --------------------------------------------------------------------------------------------------------


def test_extends_is_a_chain_relative_to_each_file():
    write("bases/root.yaml", "model: {n_layer: 1, n_head: 1, n_embd: 8}\noptimizer: {lr: 1}")
    write("bases/deeper/base.yaml", "extends: ../root.yaml\nmodel: {n_head: 2}")
    write("mine/variant.yaml", "extends: ../bases/deeper/base.yaml\nmodel: {n_embd: 16}")
    config = load_config(["mine/variant.yaml", "--optimizer.lr", "3"])
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd, config.optimizer.lr) == (1, 2, 16, 3)
    assert config.run.name == "variant"
    sources = {key: Path(source).name for key, source in config.sources.items()}
    assert sources == {
        "model.n_layer": "root.yaml",
        "model.n_head": "base.yaml",
        "model.n_embd": "variant.yaml",
        "optimizer.lr": "command line",
    }


def test_a_null_in_a_variant_takes_back_what_its_base_set():
    write("base.yaml", "model: {vocab_size: 50304}")
    assert config_of("extends: base.yaml\nmodel: {vocab_size: null}").model.vocab_size is None


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_of_extends_is_named(length):
    for i in range(length):
        write(f"c{i}.yaml", f"extends: c{(i + 1) % length}.yaml")
    message = refusal("c0.yaml")
    assert "extends" in message
    assert "cycle" in message
    assert all(f"c{i}.yaml" in message for i in range(length))


def test_a_missing_base_is_named_with_the_file_that_wants_it():
    message = refusal(write("experiment.yaml", "extends: nowhere.yaml"))
    assert all(part in message for part in ("experiment.yaml", "extends", "nowhere.yaml"))


@pytest.mark.parametrize("text", ["root:secret:0:0", "- secret", "model: secret", "secret: {}", "run: {seed: 'secret'"])
def test_nothing_of_a_file_that_another_names_is_printed_unless_it_is_a_config(text):
    """`extends: /etc/passwd` printed that file."""
    write("other", text)
    message = refusal(write("experiment.yaml", "extends: other"))
    assert "other" in message
    assert "root" not in message
    assert ("secret" in message) == text.startswith(("model", "secret"))  # a section's name, or what stands in one


def test_a_mistake_in_the_base_is_blamed_on_the_base():
    write("base.yaml", "optimizer: {lr: fast}")
    message = refusal(write("experiment.yaml", "extends: base.yaml\nmodel: {n_layer: 2}"))
    assert "base.yaml: optimizer.lr" in message
    assert "experiment.yaml" not in message


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optimizer: {learning_rate: 1}", ("learning_rate", "optimizer", "lr, min_lr")),
        ("optimiser: {lr: 1}", ("optimiser", "optimizer, training")),
        ("optimiser: {}", ("optimiser", "optimizer, training")),
        ("1: {lr: 1}", ("'1'", "optimizer, training")),
        ("optimizer: 5", ("optimizer", "mapping", "5")),
        ("- 5", ("mapping", "[5]")),
        ("optimizer: {lr: fast}", ("optimizer.lr", "a number ≥ 0", "'fast'")),
        ("optimizer: {lr: -1}", ("optimizer.lr", "a number ≥ 0", "-1")),
        ("optimizer: {lr: .nan}", ("optimizer.lr", "a number ≥ 0", "nan")),
        ("optimizer: {lr: true}", ("optimizer.lr", "a number ≥ 0", "True")),
        ("optimizer: {lr: [1]}", ("optimizer.lr", "a number ≥ 0", "[1]")),
        ("optimizer: {beta1: 1}", ("optimizer.beta1", "[0, 1)", "1")),
        ("optimizer: {beta2: 1.0}", ("optimizer.beta2", "[0, 1)", "1.0")),
        ("model: {n_layer: 1.5}", ("model.n_layer", "an int", "1.5")),
        ("model: {n_layer: null}", ("model.n_layer", "an int", "nothing")),
        ("model: {bias: maybe}", ("model.bias", "true or false", "'maybe'")),
        ("model: {normalizer: softmax2}", ("model.normalizer", "softmax or softmax1 or softmax_n", "'softmax2'")),
        ("model: {normalizer: }", ("model.normalizer", "softmax or softmax1 or softmax_n", "nothing")),
        ("model: {n_embd: 10, n_head: 3}", ("model", "n_embd (10)", "n_head (3)")),
        ("model: {n_layer: 0}", ("model", "n_layer", "0", "an integer and at least 1")),
        ("model: {dropout: 1}", ("model", "dropout", "1.0", "[0, 1)")),
        ("model: {n_head: 4.0}", ("model.n_head", "an int", "4.0")),
        ("run: {name: ..}", ("run.name", "'..'", "run.out_dir may be a path")),
        ("run: {name: a/b}", ("run.name", "'a/b'", "run.out_dir may be a path")),
        ('run: {name: "a\\0"}', ("run.name", "plain name")),
        ("tracking: {project: team/project}", ("tracking.project", "'team/project'", "'/'", "WANDB_ENTITY")),
        ("run: {seed: -1}", ("run.seed", "≥ 0", "-1")),
        ("run: {seed: 99999999999999999999}", ("run.seed", "99999999999999999999")),  # more than the generators take
        ("evaluation: {batches: all}", ("evaluation.batches", "a positive int or", "full", "'all'")),
        ("training: {resume: no}", ("training.resume", "auto or must or never", "False")),  # YAML's no is a bool
    ],
)
def test_a_mistake_in_a_file_is_named_with_file_key_and_value(text, named):
    message = refusal(write("experiment.yaml", text))
    assert message.startswith("experiment.yaml: ")
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("model: {n_layer: 2}\noptimizer: [1", 2, "not valid YAML"),
        ("model: {n_layer: 2}\noptimizer: lr: 3", 2, "not valid YAML"),
        ("run: {}\n\tmodel: {}", 2, "not valid YAML"),
        ("run: {}\nmodel: {n_layer: 1}\noptimizer: {}\nmodel: {n_layer: 2}", (2, 4), "'model' stands here twice"),
        ("run: {}\nmodel:\n  n_layer: 1\n  n_head: 2\n  n_layer: 2", (3, 5), "'n_layer' stands here twice"),
        ("run: {}\nmodel: *small", 2, "small"),
        ("run: {}\nmodel: !!python/object/apply:os.getcwd []", 2, "os.getcwd"),
    ],
)
def test_bad_yaml_is_named_with_file_and_line(text, line, problem):
    message = refusal(write("experiment.yaml", text))
    lines = line if isinstance(line, tuple) else (line,)
    assert any(message.startswith(f"experiment.yaml, line {n}: ") for n in lines)
    assert problem in message


@pytest.mark.parametrize("content", [b"model: \x00", b"\xff\xfe\x00", b"run: {name: \xe9}"])
def test_bytes_that_are_no_text_are_named_with_the_file(content):
    Path("experiment.yaml").write_bytes(content)
    assert "experiment.yaml" in refusal("experiment.yaml")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--optimizer.lr", "fast"], ("optimizer.lr", "a number ≥ 0", "'fast'")),
        (["--optimizer.lr="], ("optimizer.lr", "a number ≥ 0", "''")),
        (["--optimizer.lr", "null"], ("optimizer.lr", "a number ≥ 0", "null")),
        (["--optimizer.lr"], ("--optimizer.lr", "no value")),
        (["--model.n_layer", "2", "--optimizer.lr"], ("--optimizer.lr", "no value")),
        (["--optimizer.lr", "--model.n_layer", "2"], ("--optimizer.lr", "no value")),
        (["--optimizer.rate", "1"], ("rate", "optimizer", "lr, min_lr")),
        (["--optimiser.lr", "1"], ("optimiser", "optimizer, training")),
        (["--lr", "1"], ("'--lr'", "--section.key value", "--help")),
        (["--optimizer.name", "adam"], ("optimizer.name", "adamw or sgd or muon", "'adam'")),
        (["--optimizer.decay_share", "0"], ("optimizer.decay_share", "a number in (0, 1]", "'0'")),
        (["--optimizer.momentum", "0.9"], ("optimizer.momentum", "adamw has none, but beta1")),
        (["--optimizer.name", "sgd", "--optimizer.muon_lr", "1"], ("optimizer.muon_lr", "sgd steps nothing by Muon")),
        (["--optimizer.name", "muon", "--optimizer.muon_lr", "1", "--optimizer.lr", "0"], ("muon_lr", "lr is 0")),
        (["optimizer.lr=1"], ("'optimizer.lr=1'", "--section.key value")),
        (["--model.normalizer", "softmax2"], ("model.normalizer", "softmax or softmax1 or softmax_n", "'softmax2'")),
        (["--model.n_head", "5"], ("n_embd (768)", "n_head (5)")),
    ],
)
def test_a_mistake_on_the_command_line_is_named_as_such(overrides, named):
    message = refusal(write("experiment.yaml", "model: {n_embd: 768}"), *overrides)
    assert message.startswith("command line: ")
    for part in named:
        assert part in message


def test_files_that_cannot_be_read():
    assert "missing.yaml" in refusal("missing.yaml")
    Path("folder.yaml").mkdir()
    assert "folder.yaml" in refusal("folder.yaml")
    assert "experiment.yaml/x.yaml" in refusal(write("experiment.yaml", "") + "/x.yaml")


@pytest.mark.parametrize("arguments", [[], ["--optimizer.lr", "1"]])
def test_no_config_at_all(arguments):
    message = refusal(*arguments)
    assert all(part in message for part in ("no config", "CONFIG", "--help"))


def test_later_errors_name_where_a_value_was_set():
    config = config_of("training: {batch_size: 3}", "--model.n_layer", "2")
    assert str(config.error("training.batch_size", "odd")) == "experiment.yaml: training.batch_size: odd"
    assert str(config.error("model.n_layer", "even")) == "command line: model.n_layer: even"
    assert str(config.error("run.seed", "1337")) == "default: run.seed: 1337"


# Without the next-line character, which PyYAML's writer leaves as it is under allow_unicode and its reader takes for a
# line break.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=5)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | TEXT | st.lists(st.just(1))


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(KEYS)), value=VALUES)
@example(key="training.keep_interval", value=1e300)
def test_any_value_is_taken_as_it_is_or_refused_by_name(key, value):
    section, name = key.split(".")
    path = write("experiment.yaml", yaml.safe_dump({section: {name: value}}, allow_unicode=True))
    try:
        config, refused = load_config([path]), None
    except UserError as error:
        config, refused = None, str(error)
    if refused:
        assert refused.startswith("experiment.yaml: ")
        assert name in refused
        assert "\n" not in refused
    else:
        found = getattr(getattr(config, section), name)
        if isinstance(value, str) and not isinstance(found, str):  # text is taken for what it spells, as "0" or "False"
            spelled = yaml.safe_load(value)
            value = float(spelled) if isinstance(spelled, str) else spelled  # YAML reads 1e-3 as text
        home = os.path.expanduser(value) if isinstance(value, str) else value
        assert found in (value, home) or (key == "run.name" and not value)
        assert load_config([write("again.yaml", config.to_yaml())]).to_dict() == config.to_dict()


# --- printing -------------------------------------------------------------------------------------------------------


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main_config(list(arguments))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_printed(capsys):
    assert printed(capsys, "experiment.yaml", "--help") == help_text() + "\n"


def test_printed_config_is_the_same_config(capsys):
    write("base.yaml", "optimizer: {lr: 6e-5, decay_steps: 3}\nrun: {name: '007'}")
    path = write("experiment.yaml", "extends: base.yaml\nmodel: {normalizer: softmax1}\nevaluation: {batches: full}")
    arguments = [path, "--training.compile", "true", "--model.dropout=0.25"]
    text = printed(capsys, *arguments, "--print_config")
    assert load_config([write("printed.yaml", text)]).to_dict() == load_config(arguments).to_dict()
    assert yaml.safe_load(text)["optimizer"]["lr"] == 6e-5  # plain YAML, for any other reader as well


def test_main_config_returns_the_config_otherwise():
    assert main_config([write("experiment.yaml", "model: {n_layer: 2}")]).model.n_layer == 2


def test_a_mistyped_key_is_told_the_nearest_one_and_another_all_of_them(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {paralel: fsdp}\n")
    with pytest.raises(UserError, match=r"unknown key 'paralel' in section 'training'; did you mean 'parallel'\?$"):
        load_config([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("data: {xyz: 1}\n")
    with pytest.raises(UserError, match=r"unknown key 'xyz' in section 'data', which has corpus, windows$"):
        load_config([str(tmp_path / "a.yaml")])
