"""Files are replaced whole or not at all."""

import pytest

from harness.files import write_text, written_whole


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "config.yaml", "former")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_text(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "former"


def test_what_is_written_in_part_never_stands_under_its_name(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"former")

    def half():
        with written_whole(path) as temporary:
            temporary.write_bytes(b"ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    with written_whole(path) as temporary:
        temporary.write_bytes(b"whole")
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"whole"
