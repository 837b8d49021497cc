"""The two commands, as a user types them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import launch
from harness.config_files import load_config
from harness.errors import run_cli
from harness.launch import as_typed, next_steps, without_max_restarts
from scripts import sample
from tests.helpers import ROOT
from tests.processes import children

TINY = """
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, bias: false}
optimizer: {warmup_steps: 1}
training: {max_steps: 3, batch_size: 4, device: cpu, dtype: float32}
evaluation: {batches: 1}
tracking: {wandb: disabled}
"""


def run_training(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [str(ROOT / "run_training.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **kwargs)


@pytest.fixture
def config(tmp_path) -> Path:
    """A tiny run on a corpus whose prepare.py has not run yet."""
    corpus = tmp_path / "digits"
    corpus.mkdir()
    (corpus / "prepare.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from harness.corpus_writing import write_corpus
from harness.tokenizer import from_name
documents = [("train", b"0123456789" * 99), ("val", b"0123456789" * 9)]
write_corpus({str(corpus)!r}, documents, from_name("bytes"), source="")
""")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"data: {{corpus: {corpus}}}\nrun: {{out_dir: {tmp_path / 'out'}}}\n")
    return path


@pytest.mark.slow
def test_one_command_prepares_trains_samples_and_says_what_next_then_does_nothing(config, monkeypatch, capsys):
    done = run_training("tiny.yaml", cwd=config.parent)  # a config is found from where the user stands
    assert done.returncode == 0, done.stderr
    folder = config.parent / "out" / "tiny"
    assert (config.parent / "digits" / "val.bin").exists()
    assert (folder / "ckpt.pt").exists()
    for words in ("preparing", "a sample:", "plot_metrics.py", "--training.max_steps", str(folder)):
        assert words in done.stdout

    argv = ["sample.py", str(folder / "ckpt.pt"), "--prompt", "012", "--seed", "7", "--max_new_tokens", "9"]
    monkeypatch.setattr(sys, "argv", argv)
    samples = [(run_cli(sample.main), *capsys.readouterr()) for _ in range(2)]
    status, printed, error = samples[0]
    assert not status, error
    assert printed.startswith("012")
    assert samples[0] == samples[1]

    again = run_training(str(config))
    assert again.returncode == 0
    assert "is finished: step 3 of 3" in again.stdout
    assert "a sample:" not in again.stdout


@pytest.mark.slow
def test_a_stopped_run_passes_its_status_on_and_continues(config):
    process = subprocess.Popen(
        [str(ROOT / "run_training.sh"), str(config), "--training.max_steps", "100000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = config.parent / "out" / "tiny" / "metrics.jsonl"
    deadline = time.time() + 900
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in output


def test_paths_on_the_command_line_are_relative_to_where_the_user_stands(tmp_path, monkeypatch, capsys):
    here, clone = tmp_path / "here", tmp_path / "clone"
    for folder in (here / "mine", here / "gpt2", here / "both", clone / "both", clone / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(clone)

    def typed(*arguments):
        return as_typed(["config.yaml", *arguments], here)[1:]

    assert typed("--data.corpus", "mine") == ["--data.corpus", f"{here}/mine"]
    assert typed("--data.corpus=both", "--help") == [f"--data.corpus={here}/both", "--help"]
    assert typed("--run.out_dir", "new", "--kl.reference", "hf:gpt2") == [
        "--run.out_dir", f"{here}/new", "--kl.reference", f"hf:{here}/gpt2"
    ]  # fmt: skip
    as_they_are = ["--training.init_from", "scratch", "--kl.reference", "hf:gpt2-xl", "--run.name", "mine"]
    assert typed(*as_they_are) == as_they_are
    assert typed("--data.corpus", "/absolute") == ["--data.corpus", "/absolute"]
    assert typed("--data.corpus", "nowhere") == ["--data.corpus", f"{here}/nowhere"]
    assert typed("--data.corpus") == ["--data.corpus"]  # which has an error of its own
    assert not capsys.readouterr().out
    assert typed("--data.corpus", "data") == ["--data.corpus", "data"]
    assert f"--data.corpus data: it is not in {here}, so that in {clone} is taken" in capsys.readouterr().out
    assert as_typed(["config.yaml", "--data.corpus", "data"], clone) == ["config.yaml", "--data.corpus", "data"]


@pytest.fixture
def launched(monkeypatch):
    """run_training.sh in this process, where the environment stands and from the repository's root."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch.py", str(ROOT), *map(str, arguments)])
        return run_cli(launch.main)

    monkeypatch.chdir(ROOT)
    return run


@pytest.mark.slow
def test_without_a_config_it_is_the_default_one_and_a_mistake_passes_its_status_on():
    done = run_training("--optimizer.lr", "x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: command line: optimizer.lr takes a number ≥ 0, not 'x'"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere.yaml",), "no config file nowhere.yaml"),
        (("/dev/null",), "/dev/null is no file, as a config has to be: it is read more than once"),
        (
            ("configs/stdlib_softmax1.yaml", "--data.corpus", "nowhere"),
            "data.corpus: nowhere has neither a val.bin nor a prepare.py to make one",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, expected, launched, capsys):
    assert launched(*arguments) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_a_mistake_about_machines_is_one_line_before_anything_is_prepared(config, launched, monkeypatch, capsys):
    monkeypatch.setenv("NNODES", "two")
    assert launched(config) == 2
    assert capsys.readouterr().err == "error: NNODES: 'two' is not a whole number from 1 to 100000\n"
    assert not (config.parent / "digits" / "val.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "rest", "restarts"),
    [
        (["--max-restarts", "3", "--run.name", "x"], ["--run.name", "x"], "3"),
        (["--run.name=x", "--max-restarts=0"], ["--run.name=x"], "0"),
        (["--max_restarts=x"], [], "x"),  # refused with the other numbers
    ],
)
def test_restarts_are_asked_for_as_of_torchrun(arguments, rest, restarts):
    assert without_max_restarts(["a.yaml", *arguments]) == (["a.yaml", *rest], {"--max-restarts": restarts})


@pytest.mark.parametrize("arguments", [("--max-restarts",), ("--max-restarts=",)])
def test_restarts_without_a_number_are_a_mistake(arguments, launched, capsys):
    assert launched("configs/stdlib_softmax1.yaml", *arguments) == 2
    expected = "error: --max-restarts takes a number: how often the ranks are started again after a failure\n"
    assert capsys.readouterr().err == expected


def test_a_signal_while_a_program_is_being_started_reaches_it(monkeypatch):
    start, former = subprocess.Popen, signal.signal(signal.SIGTERM, lambda *_: None)

    def popen(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        assert launch.run(["sleep", "5"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_signal_to_the_launcher_alone_reaches_training(name):
    status = launch.run(["sh", "-c", f"kill -{name} $PPID; exec sleep 5"], training=True)
    assert status == 128 + signal.Signals[f"SIG{name}"]


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", "143"), ("SIGINT", "130")])
def test_a_signal_that_stops_the_preparing_is_no_mistake(number, status, config, capsys):
    script = config.parent / "digits" / "prepare.py"
    script.write_text(f"import os, signal; os.kill(os.getppid(), signal.{number}); signal.pause()")
    with pytest.raises(SystemExit, match=status):
        launch.prepare(script.parent)
    assert capsys.readouterr().err == ""


def test_a_hangup_that_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch.run(["sh", "-c", "kill -HUP $PPID; sleep 0.1"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


FINISHING = "finishing this step, then saving"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "whom", "status", "lines"),
    [
        (signal.SIGKILL, 0, 137, ["error: rank 0 on "]),
        (signal.SIGKILL, 1, 137, ["error: rank 1 on "]),
        (signal.SIGSTOP, 0, 75, ["error: rank 0 on "]),
        (signal.SIGSTOP, 1, 75, ["error: rank 1 on "]),
        (signal.SIGTERM, "launcher", 143, [f"SIGTERM: {FINISHING}; Ctrl-C twice", "stopped at step "]),
        (signal.SIGINT, "launcher", 130, [f"SIGINT: {FINISHING}; Ctrl-C again", "stopped at step "]),
        (signal.SIGKILL, "launcher", -9, ["stopped at step "]),
        (signal.SIGKILL, "launcher of one rank", -9, [f"SIGTERM: {FINISHING}", "stopped at step "]),
    ],
)
def test_ranks_end_with_the_lines_that_matter(config, number, whom, status, lines):
    log, size = config.parent / "log", 1 if whom == "launcher of one rank" else 2
    settings = {"NPROC_PER_NODE": str(size), "RANK_TIMEOUT": "3", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(ROOT / "run_training.sh"), str(config), "--training.max_steps", "1000000"]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT)
    while "step 20/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    ranks, before = children(process.pid), len(log.read_text())
    assert len(ranks) == size
    os.kill(ranks[whom] if isinstance(whom, int) else process.pid, number)
    assert process.wait(60) == status
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.05)
    said = [line for line in log.read_text()[before:].splitlines() if line and not line.startswith("step ")]
    if whom == "launcher" and number == signal.SIGKILL:  # rank 0 says it, but where rank 1 has noticed it before
        said = [line for line in said if not line.startswith(f"SIGTERM: {FINISHING}")]
    assert len(said) == len(lines), said
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True)), said


@pytest.mark.slow
def test_help_needs_no_config():
    shown = run_training("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert shown.returncode == 0
    assert "--optimizer.warmup_steps" in shown.stdout
    assert "torch._dynamo" not in shown.stderr  # PyTorch's compiler, which takes longer to import than PyTorch itself


def test_print_config_needs_no_corpus(config, launched, capsys):
    with pytest.raises(SystemExit, match="0"):
        launched(config, "--print_config")
    assert capsys.readouterr().out.startswith("run:\n  name: tiny\n")


def commands(config: Path, *changes: str, here: Path = ROOT) -> list[str]:
    """What is proposed after a run to a user who stands in `here`."""
    proposed = next_steps(load_config([str(config), *changes]), [str(config), *changes], here)
    return [line.strip() for line in proposed.partition("next:")[2].splitlines()]


@pytest.mark.parametrize(
    ("changes", "proposed", "at"),
    [
        ((), ["--training.max_steps", "6", "--optimizer.decay_steps", "3"], "at min_lr"),  # not up again
        (("--optimizer.decay_steps", "2"), ["--optimizer.decay_steps", "2", "--training.max_steps", "6"], "at min_lr"),
        (("--optimizer.decay_steps", "5000",), ["--optimizer.decay_steps", "5000", "--training.max_steps", "6"],
         "while the learning rate falls to min_lr at step 5000"),
        (("--optimizer.warmup_steps", "3"), ["--optimizer.warmup_steps", "3", "--training.max_steps", "6"],
         "while the learning rate still rises"),
    ],
)  # fmt: skip
def test_training_on_is_proposed_with_what_the_learning_rate_does_then(config, changes, proposed, at):
    command, _, comment = commands(config, *changes)[-1].partition("    # ")
    assert shlex.split(command)[2:] == proposed
    assert comment.startswith(f"train on, {at}")


def test_the_commands_that_are_proposed_may_be_pasted_whatever_the_names_are(config):
    folder = config.parent / "out of $HOME's way" / "tiny"
    for command in commands(config, "--run.out_dir", str(folder.parent))[2:]:
        words = shlex.split(command, comments=True)
        if words and "run_training.sh" not in words[0]:
            assert words[2].startswith(str(folder)), command


def test_the_commands_that_are_proposed_begin_with_the_way_to_where_they_run(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    inside, outside = commands(config), commands(config, here=config.parent)
    assert outside == [*inside[:1], f"cd {shlex.quote(str(ROOT))}", *inside[1:]]


def test_an_environment_of_an_old_python_is_not_used_nor_removed(tmp_path):
    (tmp_path / "harness").mkdir()
    for name in ("run_training.sh", "harness/environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    done = subprocess.run([str(tmp_path / "run_training.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {tmp_path}/.venv is of a Python older than 3.11" in done.stderr
    assert python.exists()


def test_no_recent_python_is_said_in_one_line(tmp_path):
    """On a PATH whose only Python is old, and without an active environment."""
    (tmp_path / "repo" / "harness").mkdir(parents=True)
    for name in ("run_training.sh", "harness/environment.sh", "requirements.txt"):
        (tmp_path / "repo" / name).write_bytes((ROOT / name).read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "basename", "cat", "bash"):
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    done = subprocess.run(
        [str(tools / "bash"), str(tmp_path / "repo" / "run_training.sh")],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: no Python 3.11 or later found" in done.stderr
    assert not (tmp_path / "repo" / ".venv").exists()


@pytest.mark.parametrize(("wandb", "proposed"), [("disabled", False), ("offline", True)])
def test_wandbs_pictures_are_proposed_where_wandb_has_any(config, wandb, proposed):
    lines = commands(config, "--tracking.wandb", wandb)
    assert any(line.startswith("wandb leet") for line in lines) == proposed
