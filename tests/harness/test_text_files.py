"""JSON and YAML are read as data, whose size bounds what becomes of it."""

from itertools import pairwise

import pytest

from harness.errors import UserError
from harness.text_files import parse_json, read_json, read_yaml


def aliases(form: str) -> str:
    """YAML in which each line stands for nine times the line before; `form` has a place for the nine names."""
    names = [chr(97 + i) for i in range(12)]
    lines = ["a: &a {x: 1}"]
    lines += [f"{name}: &{name} " + form.format(", ".join(9 * [f"*{before}"])) for before, name in pairwise(names)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (aliases("[{}]"), "its aliases unfold to far more than the file"),
        (aliases("{{<<: [{}]}}"), "its aliases unfold to far more than the file"),
        ("a: &a [*a]", "its aliases unfold to far more than the file"),
        ("a: 2001-99-99", "this is no timestamp"),
        ("a: !!float x", "this is no float"),
        ("a: !!bool x", "this is no bool"),
        (f"a: {'9' * 5000}", "a number of 5000 digits"),
        ('a: "\\ud800"', "half a character"),
    ],
)
def test_yaml_that_is_no_tree_of_plain_values_is_named_with_its_line(tmp_path, text, problem):
    (tmp_path / "x.yaml").write_text("# one line before\n" + text)
    with pytest.raises(UserError, match=rf"x\.yaml, line \d+: not valid YAML: {problem}$"):
        read_yaml(tmp_path / "x.yaml", "config")


def test_nesting_without_end_is_a_line(tmp_path):
    (tmp_path / "x.yaml").write_text("a: " + 2000 * "[")
    with pytest.raises(UserError, match=r"cannot read the config .*x\.yaml"):
        read_yaml(tmp_path / "x.yaml", "config")
    (tmp_path / "x.json").write_text(100_000 * "[")
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(tmp_path / "x.json")


def test_aliases_as_people_use_them(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {x: [1, 2], y: 3}\nb: *a\nc: {<<: *a, y: 4}")
    assert read_yaml(tmp_path / "x.yaml", "config")["c"] == {"x": [1, 2], "y": 4}


def test_a_text_of_json_can_be_written_again():
    assert parse_json('{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "😀 \\ud800"}
    with pytest.raises(ValueError, match="surrogates"):
        parse_json('{"a": "\\ud800"}')
