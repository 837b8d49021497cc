"""Checkpoints of a sharded model: resumed on any number of ranks, whole for every diagnostic, never half written."""

import contextlib
import os
import pickle
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import sharded
from harness.checkpoint import load_model, read_checkpoint
from harness.config import OptimizerConfig
from harness.errors import UserError
from harness.optimizers import make_optimizer, saved_optimizer
from harness.parallel import shard
from harness.sharded import BackgroundSaver, optimizer_state
from tests.helpers import tiny_gpt
from tests.processes import finished, finished_on_ranks, on_ranks, refused

pytestmark = pytest.mark.usefixtures("training_folder")

HOW = ("--training.batch_size", "6", "--training.checkpoint_interval", "4", "--training.keep_interval", "8")
FSDP = (*HOW, "--training.parallel", "fsdp")


def losses(run) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in run.metrics() if "train/loss" in line}


def test_a_sharded_run_goes_on_on_any_number_of_ranks_sharded_or_not():
    schedule = ("--optimizer.decay_steps", "16", "--evaluation.kurtosis", "false")  # half of such a run's time
    first, again = (("--training.max_steps", steps, *schedule) for steps in ("8", "16"))
    alone = finished("alone", *HOW, *again)
    finished_on_ranks(2, "sharded", *FSDP, *first)
    finished("whole", *HOW, *first)
    for name, number, how in (("sharded", 3, FSDP), ("sharded", 1, HOW), ("whole", 2, FSDP)):
        copy = f"{name}{number}"
        shutil.copytree(f"out/{name}", f"out/{copy}")
        run = finished_on_ranks(number, copy, *how, *again) if number > 1 else finished(copy, *how, *again)
        assert f"resuming out/{copy} from step 8" in run.output()
        np.testing.assert_allclose(list(losses(run).values()), list(losses(alone).values()), rtol=1e-5)
    assert os.listdir("out/sharded3/shards") == ["16"]  # the former ones are gone
    assert not Path("out/sharded1/shards").exists()
    Path("out/sharded3/shards/9").mkdir()  # of a run that was killed
    Path("out/sharded3/shards/notes").mkdir()  # a user's own
    finished("sharded3", *HOW, *again)
    assert sorted(os.listdir("out/sharded3/shards")) == ["16", "notes"]
    assert not [*Path("out").rglob("*.tmp")]


def test_a_sharded_run_leaves_a_whole_checkpoint():
    finished_on_ranks(2, "sharded", *FSDP)
    alone = finished("alone", *HOW)
    for name in ("ckpt.pt", "best.pt", "steps/8.pt"):
        model, info = load_model(f"out/sharded/{name}")
        peer, _ = load_model(f"out/alone/{name}")
        assert ("shards" in info) == (name == "ckpt.pt")
        for key, weight in peer.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], weight, rtol=0, atol=1e-4)
    model, info = load_model("out/sharded/ckpt.pt")
    found, expected = saved_optimizer(model, info, "out/sharded/ckpt.pt").state_dict(), alone.checkpoint()["optimizer"]
    assert found["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"]
    for number, values in expected["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(found["state"][number][key], value, rtol=1e-3, atol=1e-5)


def test_what_is_damaged_or_runs_code_is_refused_and_nothing_of_it_is_run():
    small = ("--model.n_layer", "1")  # with a small index, which is read 200 times
    finished_on_ranks(2, "sharded", *FSDP, *small)
    path = Path("out/sharded/ckpt.pt")
    checkpoint, shards = read_checkpoint(path), Path("out/sharded/shards/24")
    model, _ = load_model(path)
    optimizer = make_optimizer(model, OptimizerConfig())
    index = (shards / ".metadata").read_bytes()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        content = (shards / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            (shards / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(UserError, match=f"{name} is damaged"):
                optimizer_state(checkpoint, path, optimizer)
        (shards / name).write_bytes(content[:-9])
        assert f"{name} is damaged" in refused("sharded", *HOW, *small, "--training.max_steps", "30")
        (shards / name).write_bytes(content)

    class Hostile:
        def __reduce__(self):
            return Path.touch, (Path("run"),)

    written = pickle.dumps(Hostile())
    (shards / ".metadata").write_bytes(written)
    checkpoint["shards"]["crc32"][".metadata"] = zlib.crc32(written)
    with pytest.raises(UserError, match=r"it asks for pathlib\.Path\.touch"):
        optimizer_state(checkpoint, path, optimizer)
    assert not Path("run").exists()
    generator, unharmed = np.random.default_rng(0), 0
    for _ in range(200):  # an index that is damaged on purpose
        hostile = bytearray(index)
        for place in generator.integers(0, len(index), 1 + generator.integers(3)):
            hostile[place] = generator.integers(256)
        (shards / ".metadata").write_bytes(hostile)
        checkpoint["shards"]["crc32"][".metadata"] = zlib.crc32(hostile)
        with contextlib.suppress(UserError):
            optimizer_state(checkpoint, path, optimizer)
            unharmed += 1
    assert unharmed < 150
    bomb = b"\x80\x02Nr\xff\xff\xff\x7f."  # a memo of two thousand million places
    for hostile, expected in ((bomb, "LONG_BINPUT in it"), (b"", "does not hold"), (index, "has no checksum")):
        (shards / ".metadata").write_bytes(hostile)
        named = {"folder": "shards/24", "crc32": {".metadata": zlib.crc32(hostile)}}
        with pytest.raises(UserError, match=expected):
            optimizer_state(checkpoint | {"shards": named}, path, optimizer)
    reader = sharded.Reader(shards)
    metadata = reader.read_metadata()
    metadata.state_dict_metadata["optimizer.0.exp_avg"].chunks.clear()  # nothing would be read into it
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint["shards"]["crc32"][".metadata"] = sharded.crc32(shards / ".metadata")
    with pytest.raises(UserError, match="of parameter 0 is not all, or not finite"):
        optimizer_state(checkpoint, path, optimizer)
    (shards / "__0_0.distcp").unlink()
    os.mkfifo(shards / "__0_0.distcp")  # a read of it would wait for ever
    with pytest.raises(UserError, match="not a plain file"):
        optimizer_state(checkpoint, path, optimizer)
    for named in ({"folder": "shards/24", "crc32": {"../ckpt.pt": 0}}, {"folder": "../24", "crc32": {}}, 3):
        with pytest.raises(UserError, match=r"is damaged|that no run has written"):
            optimizer_state(checkpoint | {"shards": named}, path, optimizer)


def failing(ranks) -> None:
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    model = tiny_gpt()
    content = {"model_args": asdict(model.config)}
    shard(model, ranks, torch.float32)
    optimizer, saver = make_optimizer(model, OptimizerConfig(name="sgd")), BackgroundSaver(folder, ranks)
    path = folder / "ckpt.pt"
    saver.save(model, optimizer, content | {"step": 1}, [path])
    with torch.no_grad():  # it is what the weights were that is written
        for parameter in model.parameters():
            parameter.zero_()
    saver.wait()
    assert read_checkpoint(path)["model"]["lm_head.weight"].norm() > 0.5
    saver.save(model, optimizer, content | {"step": 2}, [folder / "gone" / "ckpt.pt"])  # by rank 0 alone
    with pytest.raises(UserError, match=r"cannot write run/.*No such file"):
        saver.wait()
    assert read_checkpoint(path)["step"] == 1
    crc32 = sharded.crc32
    sharded.crc32 = lambda path: crc32(path) if ranks.is_main else Path("nowhere").read_bytes()  # of rank 1 alone
    saver.save(model, optimizer, content | {"step": 3}, [path])
    with pytest.raises(UserError, match=r"cannot write run/shards/3: .*No such file.* the former checkpoint is intact"):
        saver.wait()
    sharded.crc32 = crc32
    if ranks.is_main:
        Path("run/shards/.nfs01").touch()  # what is not of a run stays
    ranks.share(None)
    saver.save(model, optimizer, content | {"step": 4}, [path])
    saver.wait()
    assert sorted(os.listdir("run/shards")) == [".nfs01", "4"]
    ranks.share(None)
    if ranks.is_main:
        shutil.rmtree("run/shards")
        Path("run/shards").touch()
    ranks.share(None)
    saver.save(model, optimizer, content | {"step": 3}, [path])
    with pytest.raises(
        UserError, match=r"cannot write run/shards/3: .*Not a directory.*; the former checkpoint is intact"
    ):
        saver.wait()
    assert read_checkpoint(path)["step"] == 4


def test_what_cannot_be_written_in_the_background_is_told_on_every_rank():
    on_ranks(2, failing)
