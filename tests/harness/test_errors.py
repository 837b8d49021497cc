"""A user's mistake is one line and exit status 2; a mistake of ours keeps its traceback."""

import errno
import os

import numpy as np
import pytest
import torch

from harness.config import Config, TrainingConfig
from harness.errors import UserError, advising, run_cli
from tests.processes import forked, run_python


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("config.yaml: lr: too high")

    assert run_cli(main) == 2
    assert capsys.readouterr() == ("", "error: config.yaml: lr: too high\n")


def test_what_the_program_returns_is_its_status():
    assert run_cli(lambda: 3) == 3
    assert not run_cli(lambda: None)


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


def test_an_output_without_a_character_gets_its_escape():
    code = "from harness.errors import run_cli; run_cli(lambda: print('2 × é', chr(0xDCFF)))"
    for encoding, printed in (("ascii", "2 \\xd7 \\xe9 \\udcff\n"), ("utf-8", "2 × é \\udcff\n")):
        done = run_python("-c", code, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        ("ENOSPC", "free some space"),
        ("EROFS", "a folder that can be written to"),
        ("EIO", "mend the disk"),
        ("EMFILE", "ulimit -n"),
        ("EFBIG", "ulimit -f"),
        ("ENOMEM", "--batch-size"),
    ],
)
def test_what_the_machine_refuses_is_one_line(number, advice, capsys):
    def main():
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "some/file")

    assert run_cli(main) == 2
    said = capsys.readouterr().err
    assert advice in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("status", ["full", "closed"])
def test_an_error_that_cannot_be_said_keeps_its_status(status):
    def main():
        print("on the way")
        raise UserError("config.yaml: lr: too high")

    full = os.open("/dev/full", os.O_WRONLY) if status == "full" else None
    assert forked(lambda: run_cli(main), full, full) == 2


NO_MEMORY = [
    (lambda: torch.empty(2**52, dtype=torch.uint8), "4.19e+06 GiB"),  # more than any machine can address
    (lambda: np.empty(2**52, dtype=np.uint8), ""),
    (lambda: bytearray(2**62), ""),
]


@pytest.mark.parametrize(("main", "size"), NO_MEMORY)
def test_no_memory_left_is_one_line(main, size, capsys):
    assert run_cli(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory")
    assert size in said
    assert "--batch-size" in said
    assert said.count("\n") == 1


ON_A_CARD = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 138.55 GiB memory in use."
)


@pytest.mark.parametrize(
    ("training", "ranks", "expected"),
    [
        ({"batch_size": 64, "micro_batch_size": 16}, "1", "micro_batch_size from 16 to 8"),
        ({"batch_size": 12}, "2", "micro_batch_size from 6 to 3"),
        ({"batch_size": 60, "micro_batch_size": 16}, "1", "micro_batch_size from 15 to 6"),  # as they divide 60
        ({"batch_size": 8, "micro_batch_size": 1}, "1", "training.checkpoint_activations true"),
        ({"batch_size": 8, "micro_batch_size": 1, "checkpoint_activations": True}, "1", "training.parallel fsdp"),
        ({"batch_size": 8, "parallel": "fsdp"}, "8", "training.checkpoint_activations true"),
    ],
)
def test_a_run_without_memory_says_which_keys_take_less(training, ranks, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    config = Config(training=TrainingConfig(**training))
    with pytest.raises(UserError) as caught, advising(config):
        raise torch.OutOfMemoryError(ON_A_CARD)
    message = str(caught.value)
    assert message.startswith("out of memory, 2.5 GiB more were asked for. What takes less:")
    assert expected in message.partition("less: ")[2].split(";")[0]
    assert "block_size" in message
    assert ("fsdp" in message) == (config.training.parallel != "fsdp")
    assert ("checkpoint_activations" in message) != config.training.checkpoint_activations


def test_other_errors_say_nothing_of_memory():
    for error in (RuntimeError("a bug"), OSError(errno.EIO, "Input/output error"), ValueError("x")):
        with pytest.raises(type(error)) as caught, advising(Config()):
            raise error
        assert caught.value is error


def test_what_has_no_deterministic_form_is_named_with_the_key():
    config = Config(training=TrainingConfig(deterministic=True))
    said = "cumsum_cuda_kernel does not have a deterministic implementation, but you set more. You can turn it off"
    with (
        pytest.raises(UserError, match=r"training.deterministic: cumsum_cuda_kernel does not have a") as caught,
        advising(config),
    ):
        raise RuntimeError(said)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError), advising(Config()):
        raise RuntimeError(said)
