"""Figures are written whole, tables are aligned, runs are told apart."""

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.figures import RUN_STYLES, new_figure, print_table, save_figure


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    old = tmp_path / "curves.png"
    old.write_bytes(b"old")
    figure, _ = new_figure()

    def full_disk(path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError):
        save_figure(figure, old)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert old.read_bytes() == b"old"


def test_unknown_picture_type_raises():
    with pytest.raises(UserError, match=r"\.docx"):
        save_figure(new_figure()[0], "curves.docx")


def test_run_styles_all_differ():
    assert len({(style["color"], style["linestyle"]) for style in RUN_STYLES}) == len(RUN_STYLES)


def test_table_aligns_text_left_and_numbers_right(capsys):
    print_table([{"name": "a", "x": 1.23456}, {"name": "long", "x": None}, {"name": "b", "x": 123456.7}], ["name", "x"])
    assert capsys.readouterr().out == "name       x\na      1.235\nlong       –\nb     123457\n"
