"""Files are replaced whole or not at all, and what cannot be written shows before any work is done."""

import errno
import os
import stat
import sys

import pytest

from data.stdlib import prepare
from harness.diagnostics import attention_kl_bound_demo, compare_kl_demo
from harness.errors import UserError, run_cli
from harness.files import check_file, check_folder, write_text, written_whole
from scripts import bench_attention, bench_diagnostics, bench_training, export_hf, kl_theory
from tests.helpers import ROOT, save_model, tiny_gpt


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_shows_before_anything_is_made(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"no permission to write to .*locked"):
        check_folder(tmp_path / "locked" / "sub")


def test_a_file_in_the_way_of_a_folder_and_a_folder_in_that_of_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(UserError, match=r"file.* cannot be a folder"):
            check_folder(path)
    with pytest.raises(UserError, match="is a folder: give the name of a file in it"):
        check_file(tmp_path)
    with pytest.raises(UserError, match=r"file.* cannot be a folder"):
        check_file(tmp_path / "file" / "x.json")
    check_file(tmp_path / "file")  # to be replaced
    check_file(tmp_path / "new" / "x.json")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (export_hf.main, ["ckpt.pt", "file"]),
        (export_hf.main, ["ckpt.pt", "file/sub"]),
        (kl_theory.main, ["--out", "file"]),
        (lambda: compare_kl_demo.demo(sys.argv[1:]), ["--demo", "--out", "file"]),
        (lambda: attention_kl_bound_demo.demo(sys.argv[1:]), ["--demo", "--out", "file"]),
        (bench_attention.main, ["--out", "file"]),
        (bench_training.main, [ROOT / "configs/stdlib_softmax1.yaml", "--out", "folder"]),
        (bench_training.main, [ROOT / "configs/stdlib_softmax1.yaml", "--out", "file/x.json"]),
        (bench_diagnostics.main, ["--out", "folder"]),
        (bench_diagnostics.main, ["--out", "file/x.json"]),
        (prepare.main, ["--out", "file"]),
    ],
)
def test_a_script_that_could_not_write_says_so_before_it_measures(main, arguments, tmp_path, monkeypatch, capsys):
    """In one line and with status 2; the diagnostics' own cases are in diagnostics/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    save_model(tiny_gpt(), "ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    assert run_cli(main) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "cannot be a folder" in said.err or "is a folder" in said.err
    assert (tmp_path / "file").read_text() == "mine"
    assert not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize("refused", [stat.S_ISDIR, stat.S_ISREG])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
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
