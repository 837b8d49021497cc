"""Files are replaced whole or not at all."""

import errno
import os
import stat

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


@pytest.mark.parametrize("refused", [stat.S_ISDIR, stat.S_ISREG])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch, number, refused):
    flushed = []

    def fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        if refused(mode):
            raise OSError(number, os.strerror(number))
        flushed.append(stat.S_IFMT(mode))

    monkeypatch.setattr("os.fsync", fsync)
    write_text(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert flushed == [stat.S_IFREG if refused is stat.S_ISDIR else stat.S_IFDIR]
    assert len([*tmp_path.iterdir()]) == 1


def test_a_disk_that_fails_to_flush_is_a_failure(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "config.yaml", "new")
    assert not [*tmp_path.iterdir()]
