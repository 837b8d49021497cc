"""A user's mistake is one line and exit status 2; a mistake of ours keeps its traceback."""

import pytest

from harness.errors import UserError, run_cli


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
