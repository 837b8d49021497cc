"""A user's mistake is one line and exit status 2; a mistake of ours keeps its traceback."""

import pytest

from harness.errors import UserError, run_cli
from tests.helpers import run_python


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
