"""How the CPU's own kernel is chosen and built: once, by the user's compiler, and for each width of vectors."""

import errno
import hashlib
import os
import platform
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch

from kernels import cpu
from kernels.backends import use_backend
from model import attention, attention_backend
from tests.kernels.test_cpu import TILES, check_against_the_readable_form


@pytest.fixture
def anew(monkeypatch):
    """As in a process that has not loaded the kernel yet."""
    cpu.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cpu.load.cache_clear()


@pytest.fixture
def built_anew(anew, tmp_path):
    """And with a source that has not been built, by flags that are quick: how fast the library is does not matter."""
    anew.setattr(cpu, "SOURCE", Path(shutil.copy(cpu.SOURCE, tmp_path)))
    anew.setattr(cpu, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in cpu.FLAGS))
    return anew


def test_it_is_what_float32_and_bfloat16_run_on(monkeypatch):
    q = torch.empty(1, 1, 9, 16)
    assert attention_backend(q, q) == attention_backend(q.bfloat16(), q.bfloat16()) == "cpu_native"
    assert attention_backend(q, q, stock=True) == "cpu_native"
    assert attention_backend(q.double(), q.double()) == "cpu_flash"
    assert attention_backend(q, q, dropout_p=0.1) == "materialized"
    monkeypatch.setenv("OFFBYONE_NATIVE", "0")
    assert attention_backend(q, q) == "cpu_flash"
    assert attention_backend(q, q, stock=True) == "cpu_flash"


def test_other_dtypes_are_refused_where_it_is_forced():
    q = torch.zeros(1, 1, 9, 16, dtype=torch.float64)
    with use_backend("cpu_native"), pytest.raises(ValueError, match="float64"):
        attention(q, q, q)


def test_it_is_compiled_once_and_then_needs_no_compiler(anew):
    path = cpu.build(["c++"])
    before = path.stat().st_mtime_ns
    assert cpu.build(["c++"]) == path
    assert path.stat().st_mtime_ns == before
    anew.delenv("CXX", raising=False)
    anew.setenv("PATH", "")
    assert cpu.load() is not None


@pytest.fixture
def compiler(anew, tmp_path) -> Path:
    """A compiler that takes no time for a source in tmp_path: it gives what `$TO_GIVE` names, the library as built."""
    built = cpu.build(["c++"])
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\ncat "$TO_GIVE" > "$last"\necho >> builds\n')
    script.chmod(0o755)
    (tmp_path / "built.so").write_bytes(built.read_bytes()[:-32])  # without the hash that follows it
    (tmp_path / "cpu.cpp").touch()
    anew.setattr(cpu, "SOURCE", tmp_path / "cpu.cpp")
    anew.setenv("TO_GIVE", str(tmp_path / "built.so"))
    anew.setenv("CXX", str(script))
    anew.chdir(tmp_path)
    return script


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another system"])
def test_a_library_that_is_damaged_or_does_not_load_is_built_anew(compiler, damage):
    """One that is cut short would end every process that loads it, by a SIGBUS."""
    path = cpu.build([str(compiler)])
    content = bytearray(path.read_bytes())
    if damage == "of another system":
        content = bytearray(b"\x7fELF of none" + hashlib.sha256(b"\x7fELF of none").digest())
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"cut": content[: len(content) // 3], "empty": b""}.get(damage, content))
    assert cpu.load() is not None
    assert Path("builds").read_text().count("\n") == 2
    cpu.load.cache_clear()
    assert cpu.load() is not None  # as it stands now
    assert Path("builds").read_text().count("\n") == 2


def test_a_compiler_whose_library_never_loads_is_tried_twice_and_said(compiler, anew):
    anew.setenv("TO_GIVE", str(compiler))
    with pytest.warns(UserWarning, match=r"no kernel from cpu\.cpp"):
        assert cpu.load() is None
    assert not [*compiler.parent.rglob("*.so.*"), *compiler.parent.glob("__pycache__/*")]


def test_a_library_is_on_the_disk_before_it_has_its_name(compiler, anew):
    happened = []
    fsync, replace = os.fsync, Path.replace
    anew.setattr(os, "fsync", lambda descriptor: (happened.append("fsync"), fsync(descriptor)))
    anew.setattr(Path, "replace", lambda path, target: (happened.append("replace"), replace(path, target))[1])
    assert cpu.load() is not None
    assert happened == ["fsync", "replace"]


def test_a_file_system_without_fsync_is_no_failure(compiler, anew):
    def fsync(_descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    anew.setattr(os, "fsync", fsync)
    assert cpu.load() is not None


def test_a_compiler_that_hangs_is_said_and_given_up(compiler, anew, capsys):
    anew.setattr(cpu, "PATIENCE", (0.05, 1))
    compiler.write_text("#!/bin/sh\nsleep 50 &\necho $! > sleeper\nwait\n")
    with pytest.warns(UserWarning, match=r"no kernel from cpu\.cpp by .*(?s:.*)timed out"):
        assert cpu.load() is None
    assert re.search(r"compiler is still building cpu\.cpp: 0\.95 s more", capsys.readouterr().err)
    process = Path("/proc", Path("sleeper").read_text().strip(), "stat")  # what it had started ends with it
    deadline = time.time() + 60
    while process.exists() and process.read_text().split()[2] != "Z":
        assert time.time() < deadline
        time.sleep(0.001)


def test_what_a_killed_build_left_is_removed_by_the_next(compiler):
    folder = compiler.parent / "__pycache__"
    folder.mkdir()
    dead, alive = (folder / f"cpu-0123.so.{pid}.tmp" for pid in (2**22 + 1, os.getppid()))
    for path in (dead, alive):
        path.touch()
    assert cpu.load() is not None
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize("words", ["c++ -DNDEBUG", " "])  # as make takes them; none but the default
def test_the_compiler_is_the_users(words, built_anew):
    built_anew.setenv("CXX", words)
    assert cpu.load() is not None


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, None),
        ("no-such-c++", "no such compiler: no-such-c"),
        ('c++ "', "No closing quotation"),
        ("true", "true: .*(?s:.*)No such file"),  # all is well, says this one, and makes nothing
        ("c++", r"by c\+\+: .* PyTorch's.* OFFBYONE_NATIVE=0 (?s:.*)error"),
    ],
)
def test_without_a_compiler_attention_runs_on_pytorchs_kernels(compiler, said, anew, tmp_path):
    source = tmp_path / "cpu.cpp"
    source.write_text("this is no C++;")
    anew.setattr(cpu, "SOURCE", source)
    anew.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if compiler is None:
        anew.delenv("CXX", raising=False)
        anew.setenv("PATH", "")
    else:
        anew.setenv("CXX", compiler)
    q = torch.empty(1, 1, 9, 16)
    with warnings.catch_warnings(record=True, action="always") as warned:
        assert attention_backend(q, q) == "cpu_flash"
    messages = [str(w.message) for w in warned]
    assert len(messages) == (said is not None)  # that there is just no compiler is no reason to warn
    for message in messages:
        assert re.search(said, message)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["cpu.cpp"]  # nothing half made is left
    with pytest.raises(ValueError, match=r"compiler"), use_backend("cpu_native"):
        pass


def test_a_checkout_that_cannot_be_written_to_has_it_in_the_users_cache(built_anew, tmp_path):
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    built_anew.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu.load() is not None
    assert [p.suffix for p in (tmp_path / "cache" / "offbyone").iterdir()] == [".so"]
    (tmp_path / "none").write_text("")
    built_anew.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    cpu.load.cache_clear()
    with pytest.warns(UserWarning, match="no folder to keep it in"):
        assert cpu.load() is None


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64's vectors")
@pytest.mark.parametrize("target", ["-march=x86-64", "-march=x86-64-v3"])  # vectors of 4 and of 8; native may have 16
def test_every_width_of_vectors_gives_the_same(target, anew, tmp_path):
    if target == "-march=x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    source = tmp_path / "cpu.cpp"
    shutil.copy(cpu.SOURCE, source)
    anew.setattr(cpu, "SOURCE", source)
    flags = {"-march=native": target, "-O3": "-O1"}  # the same vectors, built in half the time
    anew.setattr(cpu, "FLAGS", tuple(flags.get(flag, flag) for flag in cpu.FLAGS))
    if cpu.load() is None:
        pytest.skip(f"this compiler knows no {target}")
    for T, D in ((1, 5), (65, 12), (130, 64)):
        check_against_the_readable_form(T, D, tiles=TILES)
        check_against_the_readable_form(T, D, 4, H_kv=2, tiles=TILES)
