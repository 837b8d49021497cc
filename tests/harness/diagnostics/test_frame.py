"""What the diagnostic scripts share: arguments, data, tables, JSON, pictures and wandb."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import diagnostics
from harness.diagnostics import Diagnostic, Result, Subject, entry, labels, run, write_json
from harness.errors import UserError, run_cli
from harness.figures import draw_heads, new_figure
from harness.tracking import log_diagnostic
from model import GPTConfig
from tests.helpers import LETTERS, read_json, save_model, tiny_gpt

CONFIG = GPTConfig(block_size=10, vocab_size=13, n_layer=1, n_head=2, n_embd=8)


def measure(subject: Subject) -> Result:
    """How often each token stands in the batches: every window is counted once."""
    count = sum(torch.bincount(x.flatten(), minlength=13) for x, _ in subject.batches())
    rows = [
        {"name": letter, "share": n / sum(count.tolist())} for letter, n in zip(LETTERS, count.tolist(), strict=True)
    ]
    return Result(rows, {"tokens": int(count.sum())}, ["a note"], {"largest": [{"name": LETTERS[count.argmax()]}]})


def draw(result: Result, title: str):
    figure, (panel,) = new_figure()
    panel.bar([row["name"] for row in result.rows], [row["share"] for row in result.rows])
    panel.set_title(title)
    return figure


COUNTING = Diagnostic(
    name="counting",
    about="Counts letters.",
    columns={"name": "the letter", "share": "its share of all letters, " + "as said at length " * 8},
    measure=measure,
    draw=draw,
    reading="Most letters are as frequent as others.",
    tables={"largest": {"name": "the most frequent letter"}},
)


def checkpoint(path: Path, corpus: Path | None, config: GPTConfig = CONFIG) -> Path:
    return save_model(tiny_gpt(**asdict(config)), path, corpus)


@pytest.fixture
def path(tmp_path, corpus) -> Path:
    return checkpoint(tmp_path / "run" / "ckpt.pt", corpus)


def refusal(monkeypatch, capsys, *arguments, diagnostic=COUNTING) -> str:
    """The one line that a user sees; exit status 2."""
    monkeypatch.setattr(sys, "argv", ["counting.py", *map(str, arguments)])
    assert run_cli(lambda: run(diagnostic)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_prints_and_writes_everything(path, capsys):
    run(COUNTING, [str(path), "--device", "cpu"])
    printed, folder = capsys.readouterr().out, path.parent / "diagnostics"
    for expected in ("run, step 7", "share", "largest:", "tokens", "note: a note", "Most letters", str(folder)):
        assert expected in printed
    written = read_json(folder / "counting.json")
    keys = ["script", "checkpoint", "step", "config", "arguments", "rows", "largest", "summary", "notes"]
    assert list(written) == keys
    assert (written["script"], written["checkpoint"], written["step"]) == ("counting", str(path), 7)
    assert GPTConfig(**written["config"]) == CONFIG
    assert written["summary"] == {"tokens": 200}  # 8 × 4 windows are wanted, val has 20 whole ones
    assert sum(row["share"] for row in written["rows"]) == pytest.approx(1)
    assert written["notes"] == ["a note"]
    assert (folder / "counting.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["counting.json", "counting.png"]


def test_help_explains_every_column_of_every_table(capsys):
    with pytest.raises(SystemExit) as stop:
        run(COUNTING, ["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for column in ("name", "share"):
        assert any(line.split()[:1] == [column] and len(line.split()) > 1 for line in lines)
    assert "largest:" in lines
    assert max(map(len, lines)) <= 120
    for option in ("--data", "--split", "--batches", "--batch-size", "--device", "--seed", "--out", "--wandb"):
        assert any(line.strip().startswith(option) for line in lines)


def test_several_checkpoints_are_a_list_and_a_picture_each(path, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = checkpoint(tmp_path / "run" / "best.pt", corpus)
    run(COUNTING, [str(path), str(other), "--device", "cpu"])
    written = read_json(tmp_path / "out" / "counting" / "counting.json")["checkpoints"]
    assert [entry["checkpoint"] for entry in written] == [str(path), str(other)]
    names = sorted(p.name for p in (tmp_path / "out" / "counting").iterdir())
    assert names == ["counting.json", "counting_run.png", "counting_run_best.png"]


def test_pictures_of_several_checkpoints_never_share_a_file(tmp_path, corpus):
    """a/best and a_best are the same once / may not stand in a name."""
    paths = [checkpoint(tmp_path / "a" / "best.pt", corpus), checkpoint(tmp_path / "a_best" / "ckpt.pt", corpus)]
    run(COUNTING, [*map(str, paths), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_the_best_checkpoint_has_a_folder_of_its_own(path, corpus):
    """And what is of ckpt.pt stays at its place, diagnostics/NAME.json."""
    run(COUNTING, [str(path), "--device", "cpu"])
    folder = path.parent / "diagnostics"
    before = (folder / "counting.json").read_bytes()
    best = checkpoint(path.parent / "best.pt", corpus)
    run(COUNTING, [str(best), "--device", "cpu"])
    assert (folder / "counting.json").read_bytes() == before
    assert read_json(folder / "best" / "counting.json")["checkpoint"] == str(best)
    assert (folder / "best" / "counting.png").exists()
    assert diagnostics.name_in_run("perplexity", str(path)) == "perplexity"
    assert diagnostics.name_in_run("perplexity", str(best)) == "perplexity/best"  # on wandb


OTHER_QUESTIONS = {  # than the checkpoint's with the defaults
    "an argument": lambda path: [path, "--split", "train"],
    "another checkpoint": lambda path: [path.with_name("best.pt")],
    "several checkpoints": lambda path: [path, path.with_name("best.pt")],
    "a later step": lambda path: [save_model(tiny_gpt(**asdict(CONFIG)), path, path.parents[1] / "corpus", step=8)],
}


@pytest.mark.parametrize("other", OTHER_QUESTIONS.values(), ids=OTHER_QUESTIONS)
def test_results_that_answer_another_question_are_kept(other, path, corpus, tmp_path, capsys):
    checkpoint(path.parent / "best.pt", corpus)
    folder = tmp_path / "results"

    def ask(arguments) -> dict[str, bytes]:
        run(COUNTING, [*map(str, arguments), "--device", "cpu", "--out", str(folder)])
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    first = ask([path])
    assert ask([path]) == first  # the same question replaces its own answer
    assert not (folder / "earlier").exists()
    assert ask(other(path)) != first
    (kept,) = (folder / "earlier").iterdir()
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == first
    assert kept.name.startswith("run-")
    assert str(kept) in capsys.readouterr().out
    ask([path])
    ask(other(path))  # and each answer has one place
    assert len(list((folder / "earlier").iterdir())) == (1 if other is OTHER_QUESTIONS["a later step"] else 2)


@pytest.mark.parametrize("content", ["not JSON", "[1, 2]", '{"checkpoints": [3]}'])
def test_what_is_in_the_way_and_not_ours_is_kept_too(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    write_json(tmp_path / "x.json", [{"script": "x"}])
    (kept,) = (tmp_path / "earlier").glob("*/x.json")
    assert kept.read_text() == content


def test_checkpoints_of_one_call_are_drawn_on_one_scale(path, corpus, tmp_path, monkeypatch):
    """As in measuring, one result is ten times the other."""
    other = checkpoint(tmp_path / "other" / "ckpt.pt", corpus)
    sizes, saved = iter((1.0, 10.0)), []

    def heads(result, title):
        figure, (panel,) = new_figure()
        draw_heads(panel, [{"layer": 0, "head": h, "a": h * size} for size in [next(sizes)] for h in range(2)], "a", "")
        return figure

    monkeypatch.setattr(diagnostics, "save_figure", lambda figure, path: saved.append(figure) or path)
    run(replace(COUNTING, draw=heads), [str(path), str(other), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert [figure.axes[0].images[0].get_clim() for figure in saved] == [(0, 10), (0, 10)]


def test_the_same_command_gives_the_same_file(path, tmp_path):
    for folder in ("a", "b"):
        run(COUNTING, [str(path), "--device", "cpu", "--out", str(tmp_path / folder)])
    assert (tmp_path / "a" / "counting.json").read_bytes() == (tmp_path / "b" / "counting.json").read_bytes()


def test_the_json_says_with_what_arguments_it_was_measured(path, corpus, tmp_path):
    strided = replace(COUNTING, add_arguments=lambda parser: parser.add_argument("--stride", type=int))

    def arguments(*given) -> dict:
        run(strided, [str(path), "--device", "cpu", *given])
        return read_json(path.parent / "diagnostics" / "counting.json")["arguments"]

    default = arguments()
    expected = {"data": str(corpus), "split": "val", "batches": 8, "batch_size": 4, "seed": 1337, "device": "cpu"}
    assert default == expected | {"stride": None}  # the corpus, though not named, is that of the training
    other = corpus.rename(tmp_path / "moved")
    given = ("--data", str(other), "--split", "train", "--stride", "3", "--seed", "5")
    assert arguments(*given) == default | {"data": str(other), "split": "train", "stride": 3, "seed": 5}


def test_rows_that_are_too_many_are_in_the_json_alone(path, capsys):
    run(replace(COUNTING, shown=lambda row: row["name"] in "ab"), [str(path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "\na " in printed
    assert "\nc " not in printed
    assert "and 11 rows more in the JSON" in printed
    assert len(read_json(path.parent / "diagnostics" / "counting.json")["rows"]) == 13


def test_labels_tell_checkpoints_apart():
    assert labels(["out/a/ckpt.pt", "out/b/ckpt.pt", "out/b/best.pt", "hf:gpt2"]) == ["a", "b", "b/best", "hf:gpt2"]
    assert labels(["x/a/ckpt.pt", "y/a/ckpt.pt", "y/b/ckpt.pt"]) == ["x/a/ckpt.pt", "y/a/ckpt.pt", "b"]
    with pytest.raises(UserError, match=r"out/a/ckpt\.pt is given twice"):
        labels(["out/a/ckpt.pt", "out/a/ckpt.pt"])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_and_leaves_no_file(path, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.pt").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "foreign.pt").write_text("hello")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))

    def refused(*arguments) -> str:
        return refusal(monkeypatch, capsys, *arguments, "--device", "cpu")

    assert "no checkpoint nowhere.pt" in refused("nowhere.pt")
    assert "truncated.pt" in refused("truncated.pt")
    assert "foreign.pt" in refused("foreign.pt")
    assert "--batches 0: at least 1" in refused(path, "--batches", "0")
    assert "--batch-size -1: at least 1" in refused(path, "--batch-size", "-1")
    assert "--seed -1" in refused(path, "--seed", "-1")
    assert "twice" in refused(path, path)
    assert "nowhere" in refused(path, "--data", "nowhere")
    assert "no device 'tpu'" in refusal(monkeypatch, capsys, path, "--device", "tpu")
    assert "wandb/run.json" in refused(path, "--wandb")
    assert "second.pt" in refused(path, "second.pt")  # nothing is written of the first
    assert sorted(tmp_path.rglob("*")) == before
    assert "file" in refused(path, "--out", tmp_path / "file")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_there_shows_before_anything_is_measured(path, tmp_path, monkeypatch, capsys):
    """Measuring may take hours."""

    def fail(subject):
        raise AssertionError("measured")

    (tmp_path / "file").touch()
    trained(path.parent, "disabled")
    for arguments, message in (
        ((path, "second.pt"), "no checkpoint second.pt"),
        ((path, "--out", tmp_path / "file"), "file cannot be a folder"),
        ((path, "--out", tmp_path / "file" / "sub" / "folder"), "folder cannot be a folder, a file is in the way"),
        ((path, "--wandb"), "disables wandb"),
    ):
        error = refusal(monkeypatch, capsys, *arguments, "--device", "cpu", diagnostic=replace(COUNTING, measure=fail))
        assert message in error


def test_a_scripts_own_arguments_are_checked_before_anything_is_loaded(monkeypatch, capsys):
    def check(args):
        raise UserError(f"--stride {args.stride}: at least 1")

    diagnostic = replace(
        COUNTING, add_arguments=lambda parser: parser.add_argument("--stride", type=int), check_arguments=check
    )
    assert "--stride 0" in refusal(monkeypatch, capsys, "nowhere.pt", "--stride", "0", diagnostic=diagnostic)


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_null_with_a_note():
    rows = [{"name": "first", "a": math.nan, "b": [1, -math.inf]}, {"name": "second", "a": 1.5, "b": None}]
    result = Result(
        rows, {"loss": math.inf, "tokens": 3}, ["said before"], {"heads": [{"layer": 2, "head": 0, "x": math.nan}]}
    )
    found = entry("counting", None, result, "ckpt.pt")
    assert found["rows"] == [{"name": "first", "a": None, "b": [1, None]}, {"name": "second", "a": 1.5, "b": None}]
    assert found["summary"] == {"loss": None, "tokens": 3}
    assert found["heads"] == [{"layer": 2, "head": 0, "x": None}]
    nulls = ["rows first: a is nan", "rows first: b is -inf", "heads layer 2, head 0: x is nan", "summary: loss is inf"]
    assert found["notes"] == ["said before", *nulls]
    assert math.isnan(rows[0]["a"])  # the result itself stays


VALUES = st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=25)
@given(rows=st.lists(st.dictionaries(st.text(), VALUES | st.lists(VALUES))), summary=st.dictionaries(st.text(), VALUES))
def test_the_json_round_trips(rows, summary, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    written = entry("counting", None, Result(rows, summary), "hf:gpt2")
    write_json(path, [written])
    assert read_json(path) == written


def test_a_json_is_whole_or_not_there(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", [{"a": 1}])

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_json(tmp_path / "x.json", [{"a": 2}])
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- wandb ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, wandb: str) -> None:
    """What a training run leaves beside its checkpoint."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "run.json").write_text('{"id": "abcd1234", "last_step": 7}')
    (folder / "config.yaml").write_text(f"run: {{name: a run}}\ntracking: {{wandb: {wandb}, project: offbyone}}\n")


@pytest.mark.slow
def test_summary_and_picture_go_to_the_runs_own_page(path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(path.parent / "cache"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trained(path.parent, "offline")
    (path.parent / "wandb" / "latest-run").symlink_to("run-of-the-training")
    run(COUNTING, [str(path), "--device", "cpu", "--wandb"])
    assert os.readlink(path.parent / "wandb" / "latest-run") == "run-of-the-training"  # what `wandb leet` opens
    (folder,) = (path.parent / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    records = [json.loads(line) for line in output.splitlines()]
    assert {record["run"]["run_id"] for record in records if record["type"] == "run"} == {"abcd1234"}
    summary = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert summary["counting/tokens"] == 200
    picture = folder / "files" / summary["counting/picture"]["path"]
    assert picture.read_bytes() == (path.parent / "diagnostics" / "counting.png").read_bytes()


def test_values_that_do_not_exist_are_left_out(tmp_path, monkeypatch):
    summary = {}

    class FakeRun:
        def __init__(self):
            self.summary = summary

        def finish(self):
            summary["finished"] = True

    monkeypatch.setattr("wandb.init", lambda **arguments: FakeRun())
    monkeypatch.setattr("wandb.Image", lambda path: f"picture {path}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trained(tmp_path, "offline")
    log_diagnostic(tmp_path, "counting", {"a": 1.5, "b": None, "c": math.nan}, tmp_path / "x.png")
    assert summary == {"counting/a": 1.5, "counting/picture": f"picture {tmp_path}/x.png", "finished": True}
