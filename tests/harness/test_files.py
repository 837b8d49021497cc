"""Files are replaced whole or not at all."""

import pytest

from harness.files import write_text


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "config.yaml", "former")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_text(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "former"
