"""Curves that stay right over kills and resumes, the run's folder, and what is measured inside a model."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from harness.errors import UserError
from harness.files import write_text
from harness.runfolder import RunFolder, run_files
from harness.tracking import Tracker
from measure.probe import attention_kurtosis, capture_qk, weight_kurtosis
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]


def config(wandb: str = "disabled"):
    return SimpleNamespace(
        tracking=SimpleNamespace(wandb=wandb, project="offbyone"),
        run=SimpleNamespace(name="a run"),
        to_dict=lambda: {"run": {"name": "a run"}},
    )


class FakeWandb:
    """Stands in for wandb.init: remembers the arguments and what is logged."""

    def __init__(self, monkeypatch):
        self.starts, self.steps = [], []
        monkeypatch.setattr("wandb.init", self.init)

    def init(self, **arguments):
        self.starts.append(arguments)
        return SimpleNamespace(log=lambda metrics, step: self.steps.append((step, metrics)), finish=lambda: None)


def session(folder: Path, resume_step: int | None, steps, wandb: str = "disabled", close: bool = True) -> None:
    """A training process that logs `steps`; one that is killed does not close."""
    tracker = Tracker(folder, config(wandb), resume_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 10})
    if close:
        tracker.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(0, {"val/loss": 2.5, "val/perplexity": 12.0})
    assert lines(tmp_path) == [{"step": 0, "val/loss": 2.5, "val/perplexity": 12.0}]
    tracker.close()


def test_each_step_stands_there_once_after_any_number_of_resumes(tmp_path):
    session(tmp_path, None, range(0, 9), close=False)  # killed at 8, its checkpoint at 5
    session(tmp_path, 5, range(6, 8), close=False)  # killed at 7, before another checkpoint
    session(tmp_path, 5, range(6, 11))
    assert lines(tmp_path) == [{"step": step, "train/loss": step / 10} for step in range(11)]


def test_a_run_that_starts_afresh_keeps_no_former_line(tmp_path):
    session(tmp_path, None, range(5))
    session(tmp_path, None, range(2))
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("rest", ['{"step": 6, "train/lo', "{", "\x00\x00\x00"])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, rest):
    session(tmp_path, None, range(6))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write(rest)
    session(tmp_path, 5, range(6, 8))
    assert steps(tmp_path) == list(range(8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    tracker = Tracker(tmp_path, config(), None)
    tracker.log(3, {"train/loss": value, "train/lr": 0.1})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text  # which Python reads back, and no other JSON reader does
    assert "Infinity" not in text
    assert lines(tmp_path) == [{"step": 3, "train/loss": None, "train/lr": 0.1}]


# --- wandb ----------------------------------------------------------------------------------------------------------


def test_wandb_continues_the_same_run_and_never_sees_a_step_twice(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 9), "offline", close=False)
    session(tmp_path, 5, range(6, 8), "offline", close=False)  # killed before it got beyond the first
    session(tmp_path, 5, range(6, 12), "offline")
    assert [step for step, _ in wandb.steps] == list(range(12))
    assert len(wandb.starts) == 3
    assert len({start["id"] for start in wandb.starts}) == 1
    assert all(start["resume"] == "allow" for start in wandb.starts)
    assert steps(tmp_path) == list(range(12))


def test_a_line_that_was_cut_off_may_have_reached_wandb_no_more_than_once(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    session(tmp_path, None, range(0, 6), "offline", close=False)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "trai')  # killed while it wrote: wandb, which comes second, has not seen step 6
    session(tmp_path, 4, range(5, 8), "offline")
    assert [step for step, _ in wandb.steps] == list(range(8))


def test_wandb_gets_the_finite_values_and_the_config(tmp_path, monkeypatch):
    wandb = FakeWandb(monkeypatch)
    tracker = Tracker(tmp_path, config("offline"), None)
    tracker.log(3, {"train/loss": math.nan, "train/lr": 0.1})
    assert wandb.steps == [(3, {"train/lr": 0.1})]
    (start,) = wandb.starts
    assert (start["mode"], start["project"], start["name"]) == ("offline", "offbyone", "a run")
    assert start["config"] == {"run": {"name": "a run"}}
    assert Path(start["dir"]) == tmp_path


@pytest.mark.parametrize(
    ("setting", "environment", "logged_in", "expected"),
    [
        ("offline", "online", True, "offline (as configured)"),
        ("disabled", "online", True, "disabled"),
        ("auto", "offline", True, "offline (WANDB_MODE)"),
        ("auto", "disabled", True, "disabled"),
        ("auto", None, True, "online (logged in)"),
        ("auto", None, False, "offline (not logged in)"),
    ],
)
def test_wandbs_mode_is_chosen_and_said(tmp_path, monkeypatch, capsys, setting, environment, logged_in, expected):
    wandb = FakeWandb(monkeypatch)
    monkeypatch.setattr("wandb.login", lambda **_: logged_in)
    monkeypatch.setattr("wandb.setup", lambda *_: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    Tracker(tmp_path, config(setting), None).close()
    said, mode = capsys.readouterr().out, expected.split()[0]
    assert f"wandb: {expected}" in said
    assert {start["mode"] for start in wandb.starts} | {"disabled"} == {mode, "disabled"}
    assert (f"{tmp_path}/wandb" in said) == (mode != "disabled")  # where the run is, if there is one


def test_the_real_wandb_writes_an_offline_run_that_a_resume_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    session(tmp_path, None, (0, 5, 10), "offline")
    session(tmp_path, 5, (10, 15), "offline")
    logged, ids = [], set()
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in output.splitlines()]
        ids |= {record["run"]["run_id"] for record in records if record["type"] == "run"}
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        logged += [(item["_step"], item["train/loss"]) for item in items]
    assert sorted(logged) == [(0, 0), (5, 0.5), (10, 1), (15, 1.5)]
    assert len(ids) == 1


# --- the run's folder -----------------------------------------------------------------------------------------------

HOLD = "import sys, pathlib, time; from harness.runfolder import RunFolder, run_files; "
HOLD += "folder = RunFolder(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_which_one_holds_the_folder(tmp_path, holder):
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path / "run")
    assert str(holder.pid) in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_killed_process_holds_no_folder(tmp_path, holder):
    (tmp_path / "run" / "ckpt.pt.123.tmp").touch()  # left by the process, killed while it wrote
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run"):
        assert not (tmp_path / "run" / "ckpt.pt.123.tmp").exists()


def test_the_folder_is_free_again_after_its_context(tmp_path):
    path = tmp_path / "a" / "b"
    with RunFolder(path):
        (path / "config.yaml").touch()
        with pytest.raises(UserError, match=str(os.getpid())):
            RunFolder(path)
    with RunFolder(path) as folder:
        assert run_files(folder.path)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with RunFolder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    with RunFolder(tmp_path) as folder:
        assert not run_files(folder.path)
        ours = ("config.yaml", "metrics.jsonl", "ckpt.pt", "best.pt", "wandb/run.json", "diagnostics/kurtosis.json")
        for name in (*ours, "notes.md", "plots/mine.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert run_files(folder.path)
        folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["notes.md", "plots"]
    assert (tmp_path / "plots" / "mine.png").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run.*run\.out_dir"):
        RunFolder(tmp_path / "file" / "run")


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "config.yaml", "former")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_text(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "former"


# --- what is measured inside a model --------------------------------------------------------------------------------


def probed_gpt(normalizer: str = "softmax") -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=10, vocab_size=13, n_layer=2, n_head=2, n_embd=8, normalizer=normalizer)
    model = GPT(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "sink"])
def test_attention_kurtosis_is_scipys_of_the_materialised_probabilities(normalizer):
    model, idx = probed_gpt(normalizer), torch.randint(13, (3, 10), generator=torch.Generator().manual_seed(0))
    kurtoses = []
    with torch.no_grad():
        x = model.transformer.wte(idx) + model.transformer.wpe.weight
        for block in model.transformer.h:
            q, k, _ = block.attn.c_attn(block.ln_1(x)).split(8, dim=-1)
            q, k = (z.view(3, 10, 2, 4).transpose(1, 2) for z in (q, k))
            scores = (q @ k.mT / 2).masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
            if normalizer != "softmax":
                null = block.attn.sink if normalizer == "sink" else torch.zeros(2)
                scores = torch.cat((scores, null.double().view(1, 2, 1, 1).expand(3, 2, 10, 1)), dim=-1)
            probabilities = torch.softmax(scores, dim=-1)[..., :10]  # the causal zeros included
            kurtoses.append(stats.kurtosis(probabilities.flatten().numpy()))
            x = block(x)
    # Both in float64: some 600 summands' rounding, of moments that are a few times the variance's square
    assert attention_kurtosis(model, idx) == pytest.approx(sum(kurtoses) / 2, rel=1e-11)


def test_weight_kurtosis_is_scipys_of_every_matrix():
    model = probed_gpt()
    found = weight_kurtosis(model)
    assert set(found) == {name for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in found.items():
        weights = model.get_parameter(name).detach().flatten().numpy()
        assert value == pytest.approx(stats.kurtosis(weights), rel=1e-11)


def test_a_constant_matrix_has_no_kurtosis():
    model = probed_gpt()
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    assert weight_kurtosis(model)["transformer.wpe.weight"] is None


@pytest.mark.parametrize("fails", [False, True])
def test_probing_leaves_no_hook_and_no_gradient_behind(fails):
    model = probed_gpt()
    idx = torch.zeros(1, 11 if fails else 10, dtype=torch.long)  # 11 are more than block_size
    if fails:
        with pytest.raises(ValueError, match="block_size"):
            attention_kurtosis(model, idx)
    else:
        attention_kurtosis(model, idx)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_captured_q_and_k_are_those_of_every_layer():
    model, idx = probed_gpt(), torch.randint(13, (3, 10))
    with capture_qk(model) as captured:
        model(idx)
    assert [attn for attn, _, _ in captured] == [block.attn for block in model.transformer.h]
    x = model.transformer.wte(idx) + model.transformer.wpe.weight
    first = model.transformer.h[0]
    whole = first.attn.c_attn(first.ln_1(x))
    _, q, k = captured[0]
    assert torch.equal(q[:, 1], whole[..., 4:8])  # the second head's
    assert torch.equal(k[:, 1], whole[..., 12:16])
