"""scripts/compare_checkpoints.py: what the diagnostics say of each checkpoint, side by side."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness import comparison
from harness.diagnostics import activation_kurtosis, run, weight_kurtosis
from harness.errors import UserError
from harness.figures import new_figure
from scripts import compare_checkpoints
from scripts.compare_checkpoints import DIAGNOSTICS, find_diagnostic, main
from tests.helpers import save_model, tiny_corpus, tiny_gpt

BOTH = ("--diagnostics", "weight_kurtosis", "activation_kurtosis")


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> list[str]:
    """Three runs, the third a compiled one of nanoGPT: prefixed names, and no normalizer."""
    tiny_corpus(tmp_path / "corpus")
    paths = []
    for seed, name in enumerate(("one", "two", "three")):
        normalizer = ("softmax", "softmax1", "softmax")[seed]
        model = tiny_gpt(seed, block_size=10, vocab_size=13, normalizer=normalizer)
        state, args = model.state_dict(), asdict(model.config)
        if name == "three":
            state = {f"_orig_mod.{key}": value for key, value in state.items()}
            for key in ("normalizer", "backward", "activation"):
                del args[key]
        save_model(model, tmp_path / name / "ckpt.pt", model=state, model_args=args, iter_num=seed, step=seed)
        paths.append(f"{name}/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    return paths


def compare(*arguments: str) -> dict:
    main([*arguments, "--data", "corpus", "--device", "cpu", "--out", "compared"])
    return json.loads(Path("compared/compare_checkpoints.json").read_text())


@pytest.mark.slow
def test_every_value_is_the_one_that_its_script_writes(checkpoints, capsys):
    compared = compare(*checkpoints, *BOTH)
    printed = capsys.readouterr().out
    assert [row["checkpoint"] for row in compared["rows"]] == ["one", "two", "three"]
    assert [row["step"] for row in compared["rows"]] == [0, 1, 2]
    for script in (weight_kurtosis, activation_kurtosis):
        no_picture = replace(script.DIAGNOSTIC, draw=lambda result, title: new_figure()[0])  # they take seconds
        run(no_picture, [*checkpoints, "--data", "corpus", "--device", "cpu", "--out", "alone"])
        name = script.DIAGNOSTIC.name
        entries = json.loads(Path(f"alone/{name}.json").read_text())["checkpoints"]
        assert [e for e in compared["checkpoints"] if e["script"] == name] == entries
        for row, alone in zip(compared["rows"], entries, strict=True):
            assert {f"{name}/{key}": value for key, value in alone["summary"].items()}.items() <= row.items()
            for key in alone["summary"]:
                assert f"{name}/{key}" in printed
    header = next(line for line in printed.splitlines() if line.startswith("value"))
    assert header.split() == ["value", "one", "two", "three"]
    assert Path("compared/compare_checkpoints.png").stat().st_size > 10_000


def test_options_reach_the_diagnostics_and_leave_their_defaults_alone(checkpoints):
    few = compare(*checkpoints[:2], "--diagnostics", "activation_kurtosis", "--batches", "1", "--batch-size", "3")
    assert {row["activation_kurtosis/sequences"] for row in few["rows"]} == {3}
    default = compare(*checkpoints[:2], "--diagnostics", "activation_kurtosis")
    assert {row["activation_kurtosis/sequences"] for row in default["rows"]} == {20}  # 8 × 4 are more than there are


def test_a_diagnostics_own_options_reach_it_and_no_other(checkpoints):
    own = ("--schemes", "W8A8 per token", "W4*", "--seeds=1", "--calibration", "2")
    rows = compare(*checkpoints[:2], "--diagnostics", "weight_kurtosis", "quantization", *own)["rows"]
    rises = {value.removeprefix("quantization/perplexity_rise ") for value in rows[0] if "perplexity_rise" in value}
    assert rises == {"W8A8 per token", "W4 per channel"}


def test_without_names_it_is_all_of_them(checkpoints):
    rows = compare(*checkpoints[:2], "--batches", "1", "--batch-size", "2")["rows"]
    assert {value.partition("/")[0] for value in rows[0]} - {"checkpoint", "step"} == set(DIAGNOSTICS)
    # one loss of the same model on the same two windows, found by three scripts
    losses = [rows[0][f"{name}/loss"] for name in ("perplexity", "jacobian_energy", "quantization")]
    assert losses == pytest.approx(3 * losses[:1], rel=1e-5)  # float32


def test_the_picture_has_a_few_values_that_the_diagnostics_do_write(checkpoints, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare_checkpoints, "draw", lambda rows, values, _: drawn.extend(values) or new_figure()[0])
    row = compare(*checkpoints[:2], "--batches", "1", "--batch-size", "2")["rows"][0]
    diagnostics = [find_diagnostic(name) for name in DIAGNOSTICS]
    expected = {f"{diagnostic.name}/{value}" for diagnostic in diagnostics for value in diagnostic.headlines}
    assert set(drawn) == expected < set(row)
    assert len(drawn) <= 4 * comparison.PANELS_A_ROW  # 4 rows of 2.7 inches: a page


def test_a_diagnostic_without_headlines_has_its_first_values_in_the_picture():
    values = ["step", "perplexity/tokens", "perplexity/loss", *(f"other/{i}" for i in range(9))]
    diagnostics = [find_diagnostic("perplexity")]
    assert list(comparison.headlines(values, diagnostics)) == [
        "perplexity/loss",
        "other/0",
        "other/1",
        "other/2",
        "other/3",
    ]


def test_the_same_weights_can_be_compared_too(checkpoints):
    Path("one/best.pt").write_bytes(Path("one/ckpt.pt").read_bytes())
    rows = compare("one/ckpt.pt", "one/best.pt", "--diagnostics", "weight_kurtosis")["rows"]
    assert [row.pop("checkpoint") for row in rows] == ["one", "one/best"]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one/ckpt.pt"], "at least two"),
        (["one/ckpt.pt", "one/ckpt.pt"], "twice"),
        (["one/ckpt.pt", "two/ckpt.pt", "--diagnostics", "nothing"], "no scripts/nothing.py"),
        (["one/ckpt.pt", "two/ckpt.pt", "--diagnostics", "sample"], "more than checkpoints"),
        (["one/ckpt.pt", "two/ckpt.pt", "--batches", "0"], "--batches 0"),
        (["one/ckpt.pt", "two/ckpt.pt", "--wandb"], r"one has no wandb/run\.json"),
        (["one/ckpt.pt", "two/ckpt.pt", "--diagnostics", "weight_kurtosis", "--seeds", "1"], "--seeds: no option of"),
        (["one/ckpt.pt", "two/ckpt.pt", "--schemes", "W9"], "--schemes 'W9' is none of W8 per channel, W4"),
        (["one/ckpt.pt", "nowhere.pt", "--diagnostics", "weight_kurtosis"], r"no checkpoint nowhere\.pt"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(checkpoints, arguments, message):
    with pytest.raises(UserError, match=message):
        compare(*arguments)
    assert not Path("compared").exists()
