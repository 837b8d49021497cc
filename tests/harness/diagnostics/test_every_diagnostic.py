"""What every diagnostic promises its user: --help for each column, and one line or a note for whatever is wrong."""

import importlib
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import diagnostics
from harness.config import OptimizerConfig
from harness.diagnostics import Diagnostic, run
from harness.figures import new_figure
from harness.optimizers import make_optimizer
from tests.helpers import (
    TODAY,
    diagnose,
    random_ids,
    read_json,
    save_model,
    tiny_corpus,
    tiny_gpt,
    with_repeated_keys,
)

NAMES = [module.name for module in pkgutil.iter_modules(diagnostics.__path__) if not module.name.endswith("_demo")]
NO_DATA = ("weight_kurtosis",)  # reads the checkpoint alone
QUICK = {"quantization": ("--seeds", "1")}
WEIGHT = "transformer.h.1.attn.c_attn.weight"
HOLDS = rf"{re.escape(WEIGHT)} holds 1 of 192 weights that are NaN or Inf"


def diagnostic_of(name: str) -> Diagnostic:
    own = importlib.import_module(f"harness.diagnostics.{name}").DIAGNOSTIC
    assert own.name == name
    return replace(own, draw=lambda result, title: new_figure()[0])  # the pictures have tests of their own


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a corpus, a checkpoint with its optimizer's state, a reference for it, and what is wrong."""
    folder = tmp_path_factory.mktemp("every")
    corpus = tiny_corpus(folder / "corpus", letters=None)
    tiny_corpus(folder / "short", 12, 12, letters=None)
    model, x = tiny_gpt(noise=0.3), random_ids(2, 12)
    optimizer = make_optimizer(model, OptimizerConfig())
    model(x, x)[1].backward()
    optimizer.step()
    save_model(model, folder / "ckpt.pt", corpus, optimizer=optimizer.state_dict())
    for value in (torch.nan, torch.inf):
        broken = {name: weight.clone() for name, weight in model.state_dict().items()}
        broken[WEIGHT][3, 5] = value
        save_model(model, folder / f"{value}.pt", corpus, model=broken, optimizer=optimizer.state_dict())
    save_model(tiny_gpt(1, noise=0.3, normalizer="softmax1"), folder / "reference.pt", corpus)
    save_model(tiny_gpt(vocab_size=17), folder / "small.pt", corpus)
    save_model(model, folder / "moved.pt", folder / "moved away")
    save_model(model, folder / "unknown.pt")
    (folder / "foreign.pt").write_bytes(b"no checkpoint at all")
    (folder / "cut.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(prepared)
    return tmp_path


def command(name: str, checkpoint: str, *options, out: Path, reference: str = "reference.pt") -> tuple:
    paths = (reference, checkpoint) if diagnostic_of(name).takes_reference else (checkpoint,)
    settings = ("--device", "cpu", "--batches", "2", "--batch-size", "2", "--out", out)
    return (*paths, *settings, *QUICK.get(name, ()), *options)


def refusal(capsys, name: str, *arguments) -> str:
    """The one line; exit status 2."""
    capsys.readouterr()
    assert diagnose(diagnostic_of(name), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --- --help -----------------------------------------------------------------------------------------------------------

UNEXPLAINED = {"quantization": {"site"}}  # part of the name, for programs; the table does not print it
ALSO_SAID = {
    "compare_kl": (
        "REFERENCE CKPT",
        "that of each sequence and averages the hinges",
        "The models compute their logits in float32",
    ),
    "jacobian_energy": ("each batch's own mean",),
}


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_column_that_is_written(name, place, capsys):
    diagnostic = diagnostic_of(name)
    with pytest.raises(SystemExit, match="0"):
        run(diagnostic, ["--help"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    tables = {title.partition(",")[0]: columns for title, columns in diagnostic.tables.items()}
    for column in (*diagnostic.columns, *(column for columns in tables.values() for column in columns)):
        assert any(line.startswith(f"  {column} ") and len(line.split()) > 1 for line in lines), column
    assert all(said in " ".join(printed.split()) for said in ALSO_SAID.get(name, ()))
    assert f"scripts/{name}.py" in printed

    assert diagnose(diagnostic, *command(name, "ckpt.pt", out=place)) == 0
    written = read_json(place / f"{name}.json")
    assert written["rows"]
    assert set(written["rows"][0]) <= set(diagnostic.columns)
    for title, rows in written.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and title != "rows":
            said = " ".join([*tables[title], *tables[title].values()])  # a line may explain several columns
            unsaid = {column for column in rows[0] if not re.search(rf"(?<!\w){re.escape(column)}(?!\w)", said)}
            assert unsaid <= UNEXPLAINED.get(name, set()), title


# --- models of today --------------------------------------------------------------------------------------------------

MORE_ROWS = {"quantization": ("layers",), "jacobian_energy": ("layers",), "activation_kurtosis": ("heads",)}
REPEATED = re.compile(r"attn\.[kv]\b|c_attn(\.weight)?(\[[kv]|$)")  # what has other rows where keys are repeated


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_keys_have_the_figures_of_keys_repeated_for_each_query(name, parallel, place):
    """A model with RoPE, RMSNorm, SwiGLU, norms of q and k and an untied head; and the same function ungrouped."""
    model = tiny_gpt(2, noise=0.3, **TODAY | {"parallel_residual": parallel})
    paths = [save_model(model, place / "grouped.pt", Path("corpus"))]
    paths += [save_model(with_repeated_keys(model), place / "repeated.pt", Path("corpus"))]
    options, rows = (("--direction", "random") if name == "attention_kl_bound" else ()), []
    for path, reference in zip(paths, reversed(paths), strict=True):
        arguments = command(name, str(path), *options, out=place / path.stem, reference=str(reference))
        assert diagnose(diagnostic_of(name), *arguments) == 0
        written = read_json(place / path.stem / f"{name}.json")
        found = [row for title in ("rows", *MORE_ROWS.get(name, ())) for row in written[title]]
        rows.append({str([row.get(label) for label in diagnostics.LABELS]): row for row in found})
    grouped, repeated = rows
    if name == "compare_kl":
        assert all(row["max"] < 1e-6 for row in grouped.values() if row["divergence"].startswith("kl"))
    elif name == "attention_kl_bound":  # a step parts the two: its slopes are held to differences in test_probe.py
        assert grouped.keys() == repeated.keys()
        assert all(row["rows"] and row["tightness_forward"] <= 1 + 1e-9 for row in grouped.values())
    else:
        labels = [label for label in repeated if not REPEATED.search(repeated[label].get("name") or "")]
        assert len(labels) > 3
        for label in labels:
            assert grouped[label] == {
                column: pytest.approx(x, rel=1e-3, abs=1e-4) if isinstance(x, float) else x
                for column, x in repeated[label].items()
            }, label


# --- rivals of softmax ------------------------------------------------------------------------------------------------

OPEN = {"gate_init": 1 - 1e-9}
LIMITS = [  # a mechanism, and what it is at this setting
    ({"normalizer": "softmax_n", "softmax_n": 1.0}, {"normalizer": "softmax1"}),
    ({"normalizer": "kbias"}, {"normalizer": "softmax1"}),  # as it starts
    ({"normalizer": "clipped", "clipped_alpha": 0.0}, {}),
    ({"gate": "head", **OPEN}, {}),
    ({"gate": "element", "normalizer": "relu", **OPEN}, {"normalizer": "relu"}),
]


@pytest.mark.parametrize(("options", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_mechanism_at_its_limit_has_the_figures_of_what_it_is_there(name, options, limit, place, capsys):
    known, model = tiny_gpt(2, noise=0.3, **limit), tiny_gpt(2, **options)
    model.load_state_dict(known.state_dict(), strict=False)
    rows = []
    for stem, one in (("known", known), ("limit", model)):
        path = save_model(one, place / f"{stem}.pt", Path("corpus"))
        more = ("--direction", "gradient") if name == "attention_kl_bound" else ()
        # (The reference has a context of 12 tokens.)
        arguments = command(name, str(path), *more, out=place / stem, reference=str(place / "known.pt"))
        if name == "attention_kl_bound" and one.config.normalizer in ("clipped", "relu"):
            assert "is no softmax" in refusal(capsys, name, *arguments)
            return
        assert diagnose(diagnostic_of(name), *arguments) == 0
        written = read_json(place / stem / f"{name}.json")
        found = [row for title in ("rows", *MORE_ROWS.get(name, ())) for row in written[title]]
        rows.append({str([row.get(label) for label in diagnostics.LABELS]): row for row in found})
    if name == "attention_kl_bound" and len([*model.parameters()]) > len([*known.parameters()]):
        return  # the step moves what only one of the two has
    compared = 0
    for label in rows[0].keys() & rows[1].keys():
        for column, expected in rows[0][label].items():
            found = rows[1][label].get(column)
            # What no softmax has is null. A rise by quantization is a difference, of whole steps.
            if isinstance(expected, float) and found is not None and not column.endswith(("_rise", "standard_error")):
                assert found == pytest.approx(expected, rel=2e-3, abs=1e-4), (label, column)
                compared += 1
    assert compared > 3


@pytest.mark.parametrize("normalizer", ["ssmax", "softpick", "sigmoid", "relu", "entmax15"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention_kl_bound"])
def test_every_mechanism_is_measured(name, normalizer, place):
    gate = {"sigmoid": "head", "ssmax": "element"}.get(normalizer, "none")
    path = save_model(tiny_gpt(2, noise=0.3, normalizer=normalizer, gate=gate), place / "ckpt.pt", Path("corpus"))
    assert diagnose(diagnostic_of(name), *command(name, str(path), out=place)) == 0
    written = read_json(place / f"{name}.json")
    assert written["rows"]
    assert not any("NaN" in note for note in written["notes"])


# --- a corpus that has changed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_DATA])
def test_a_flipped_byte_in_the_corpus_is_found(name, place, capsys):
    path = Path("corpus/val.bin")
    whole = path.read_bytes()
    try:
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        error = refusal(capsys, name, *command(name, "ckpt.pt", out=place / "out"))
    finally:
        path.write_bytes(whole)
    assert "val.bin is not the file that meta.json describes" in error


# --- weights that are not finite --------------------------------------------------------------------------------------

FOUND = {  # in the error of those that have nothing to measure, in a note of the others
    "activation_kurtosis": r"transformer\.h\.1\.attn\.q: \d+ of its \d+ numbers are NaN or infinite",
    "attention_kl_bound": f"nan.pt has no attention to measure: .*{HOLDS}",
    "compare_kl": f"nan.pt predicts no distribution to compare: .*{HOLDS}",
    "jacobian_energy": HOLDS,
    "perplexity": HOLDS,
    "quantization": f"^not quantized: {HOLDS}$",
    "weight_kurtosis": rf"{re.escape(WEIGHT)}: 1 of its 192 numbers are NaN or infinite",
}
REFUSED = ("attention_kl_bound", "compare_kl")
VARIANTS_OF = {"attention_kl_bound": [("--direction", d) for d in ("adamw", "gradient", "random")]}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in NAMES for options in VARIANTS_OF.get(name, [()])]
)
def test_a_weight_that_is_not_finite_is_named_and_what_it_spoils_is_null(name, options, value, place, capsys):
    expected, out = FOUND[name].replace("nan.pt", f"{value}.pt"), place / "out"
    arguments = command(name, f"{value}.pt", *options, out=out)
    if name in REFUSED:
        assert re.search(expected, refusal(capsys, name, *arguments))
        assert not out.exists()
        return
    assert diagnose(diagnostic_of(name), *arguments) == 0
    written = read_json(out / f"{name}.json")
    assert any(re.search(expected, note) for note in written["notes"])
    assert None in written["summary"].values()


def test_a_reference_that_is_not_finite_is_refused_too(place, capsys):
    arguments = command("compare_kl", "ckpt.pt", out=place / "out", reference="nan.pt")
    assert re.search(FOUND["compare_kl"], refusal(capsys, "compare_kl", *arguments))
    assert not (place / "out").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------

ANY = [
    ("ckpt.pt", ("--batches", "0"), "--batches 0: at least 1"),
    ("ckpt.pt", ("--batch-size", "0"), "--batch-size 0: at least 1"),
    ("ckpt.pt", ("--seed", "-1"), "--seed -1: at least 0"),
    ("ckpt.pt", ("--device", "tpu"), "no device 'tpu'"),
    ("absent.pt", (), r"no checkpoint absent\.pt"),
    ("foreign.pt", (), r"foreign\.pt is not a checkpoint"),
    ("cut.pt", (), r"cut\.pt is truncated or not a checkpoint"),
]
WITH_DATA = [
    ("ckpt.pt", ("--data", "nowhere"), "nowhere is not prepared"),
    ("ckpt.pt", ("--data", "short"), r"short/(train|val)\.bin has 12 tokens, fewer than one window of 12"),
    ("moved.pt", (), r"moved away, the corpus that moved\.pt was trained on, is not here: name one with --data"),
    ("unknown.pt", (), r"unknown\.pt does not say which corpus it was trained on: name one with --data"),
    ("small.pt", (), r"corpus has 256 token ids, small\.pt only 17"),
]
OWN = {
    "attention_kl_bound": [("--tau", "-1", "--tau -1: above 0"), ("--tau", "nan", "--tau nan: above 0")],
    "compare_kl": [
        ("--tau", "-0.1", r"--tau -0\.1: at least 0"),
        ("--tau", "inf", "--tau inf: at least 0"),
        ("--order", "-1", "--order -1: at least 0"),
        ("--worst", "-1", "--worst -1: at least 0"),
    ],
    "perplexity": [
        ("--stride", "13", r"--stride 13 would skip tokens, the context of .* is 12"),
        ("--stride", "0", "--stride 0: at least 1"),
    ],
    "quantization": [
        ("--seeds", "0", "--seeds 0: at least 1"),
        ("--calibration", "0", "--calibration 0: at least 1"),
        ("--percentile", "100", r"--percentile 100\.0: above 50 and below 100"),
        ("--percentile", "nan", "--percentile nan: above 50 and below 100"),
    ],
}


def mistakes():
    for name in NAMES:
        cases = ANY if name in NO_DATA else ANY + WITH_DATA
        if name == "compare_kl":  # takes the corpus from whichever model knows it, and compares vocabularies first
            cases = [case for case in cases if case[0] not in ("moved.pt", "unknown.pt", "small.pt")]
        cases = cases + [("ckpt.pt", (option, value), message) for option, value, message in OWN.get(name, ())]
        for checkpoint, options, message in cases:
            yield pytest.param(name, checkpoint, options, message, id=" ".join((name, checkpoint, *options)))


@pytest.mark.parametrize(("name", "checkpoint", "options", "message"), mistakes())
def test_a_mistake_is_one_line_and_nothing_is_written(name, checkpoint, options, message, place, capsys):
    arguments = command(name, checkpoint, *options, out=place / "out")
    assert re.search(message, refusal(capsys, name, *arguments))
    assert not (place / "out").exists()
