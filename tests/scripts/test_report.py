"""The page of an experiment, from made-up runs: what it says, in what form, and that it works in a browser."""

import base64
import csv
import json
import re
import shlex
import sys
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
import vl_convert
import yaml
from scipy import stats

import harness.report
from harness.errors import run_cli
from harness.experiments.claims import Verdict, judge
from harness.experiments.grid import load_experiment
from harness.report import charts, markdown, numbers, theme
from harness.report.document import Figure
from measure.seeds import difference
from scripts import report
from tests.helpers import ROOT

HOSTILE = """<script>alert("1")</script> & 'one' | `two` *three* </title>"""
SEEDS = [1, 2, 3]
KURTOSIS = {"softmax": [3.0, 4.0, 5.0], "softmax1": [1.0, 2.5, 2.0], "gate": [3.5, 4.0, 5.5]}  # by seed
LOSS = {"softmax": [1.0, 1.1, 1.2], "softmax1": [1.01, 1.1, 1.23], "gate": [1.5, 1.61, 1.7]}
VARIANTS = {"softmax": None, "softmax1": {"model": {"normalizer": "softmax1"}}, "gate": {"model": {"gate": "head"}}}
CLAIM = {
    "sentence": "A gate costs loss.",
    "source": "Nobody (2025), arXiv:2505.06708, see https://example.org/a_b?c=1&d=2.",
    "tested_at": "1B parameters",
    "decides": {"val_full/loss": "gate > softmax + 0.1"},
}


def write_experiment(
    folder: Path, variants=VARIANTS, seeds=SEEDS, claims=(CLAIM,), diagnostics=True, name="sinks", question="Which?"
) -> Path:
    """An experiment's file, its claims, and in folder/out/NAME what its runs would have written. → out/NAME"""
    file = folder / f"{name}.yaml"
    content = {
        "question": question,
        "base": str(ROOT / "configs/backcopy_softmax.yaml"),
        "seeds": seeds,
        "config": {"model": {"n_head": 2}, "training": {"max_steps": 200, "dtype": "float32"}},
        "variants": variants,
    }
    if diagnostics:
        content["diagnostics"] = {
            "every": 100,
            "activation_kurtosis": {"batches": 2},
            "jacobian_energy": {"along": False},
        }
    (folder / "claims").mkdir()
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    for i, claim in enumerate(claims):
        text = yaml.safe_dump(claim | {"experiment": f"../{file.name}"})
        (folder / "claims" / f"claim{i}.yaml").write_text(text)
    out = folder / "out" / name
    out.mkdir(parents=True)
    machine = {"processor": "A processor", "cores": 2, "python": "3.11", "torch": "2.13", "platform": "Linux"}
    facts = {
        "file": str(file),
        "commit": "abc1234-dirty",
        "date": "2026-11-28",
        "command": "python …",
        "machine": machine,
    }
    (out / "experiment.json").write_text(json.dumps(facts))
    for cell in load_experiment(file, folder / "out").cells:
        write_run(cell, diagnostics)
    return out


def write_run(cell, diagnostics: bool) -> None:
    names = list(LOSS)
    variant = cell.variant if cell.variant in LOSS else names[sum(map(ord, cell.variant)) % 3]
    loss, kurtosis = (of[variant][(cell.seed - 1) % 3] for of in (LOSS, KURTOSIS))
    (cell.folder / "steps").mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(cell.config.to_yaml().replace("vocab_size: null", "vocab_size: 97"))
    speed = {"train/tokens_per_second": 32 * 64 / (2 if variant == "gate" else 0.5), "sink_rate/val": 0.25}
    lines = [{"step": s, "val/loss": loss + (200 - s) / 50, "train/loss": loss} | speed for s in (0, 50, 100, 150, 200)]
    lines[-1]["val_full/loss"] = loss
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not diagnostics:
        return
    (cell.folder / "steps" / "100.pt").touch()
    heads = [{"layer": 0, "head": head, "sink_rate": 0.25 * head} for head in (0, 1)]
    first, last = (
        {"step": s, "summary": {"avg kurtosis": kurtosis * s / 200, "sink_rate": 0.5}, "rows": [], "heads": heads}
        for s in (100, 200)
    )
    jacobian = {"step": 200, "summary": {"cos_diag": 0.8}, "rows": [{"layer": 0, "head": 0, "cos_diag": None}]}
    for path, entry in {
        "activation_kurtosis": last,
        "along/activation_kurtosis": first,
        "jacobian_energy": jacobian,
    }.items():
        path = cell.folder / "diagnostics" / f"{path}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entry))


def made(folder: Path) -> tuple[str, str]:
    """The report's HTML, without Vega, and Markdown."""
    report.main([str(folder)])
    html = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL), (folder / "report.md").read_text(
        encoding="utf-8"
    )


def rows_of(html: str, caption: str) -> list[list[str]]:
    """The texts of a table's cells, row by row, the head first."""
    table = next(
        t for t in re.findall(r"<table>.*?</table>", html, flags=re.DOTALL) if f"<caption><span>{caption}" in t
    )
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[unescape(re.sub(r"<[^>]*>", "", cell)).replace("\xa0", " ") for cell in row] for row in cells]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch) -> None:
    """Where the script goes, and from where it comes back here."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pictures are compiled, which finds what is wrong with them, and not drawn."""
    monkeypatch.setattr(
        vl_convert, "vegalite_to_png", lambda s, **_: json.dumps(vl_convert.vegalite_to_vega(s)).encode()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(folder) -> tuple[str, str]:
    return made(folder)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_tables_have_the_seeds_statistics(page):
    head, *rows = rows_of(page[0], "Mean ± half")
    kurtosis = next(i for i, name in enumerate(head) if name.startswith("avg kurtosis"))
    assert [row[kurtosis] for row in rows] == ["4.0 ± 2.5", "1.8 ± 1.9", "4.3 ± 2.6"]  # 2.5: 4.303 · 1 / √3
    rows = [row for row in rows_of(page[0], "Paired differences") if row[1].startswith("avg kurtosis")]
    found = [[a - b for a, b in zip(KURTOSIS[v], KURTOSIS["softmax"], strict=True)] for v in ("softmax1", "gate")]
    least, most = sorted(float(stats.ttest_1samp(values, 0).pvalue) for values in found)
    holm = sorted([2 * least, max(2 * least, most)])  # softmax1's p is the smaller one
    assert [row[0] for row in rows] == ["softmax1", "gate"]
    assert [row[2] for row in rows] == ["−2.167", "0.3333"]
    assert [row[4] for row in rows] == [numbers.probability(p) for p in holm]


def test_verdict_names_what_decides_it(page):
    html, text = page
    (row,) = rows_of(html, "What decides it")[1:]
    assert row == [
        "gate > softmax + 0.1val_full/loss",
        "held",
        "1.603",
        "1.2",
        "0.4033",
        "0.389 to 0.4177",
        "< 0.0001",
        "3",
        row[8],
    ]
    assert f"larger by {row[4]} (95 % interval {row[5]}, Holm-adjusted p {row[6]})" in unescape(html)
    assert "Of 1 claim, 1 held." in unescape(html)
    assert "Of 1 claim, 1 held." in text
    assert '<a href="https://arxiv.org/abs/2505.06708" rel="noreferrer">arXiv:2505.06708</a>' in html
    assert '<a href="https://example.org/a_b?c=1&amp;d=2" rel="noreferrer">' in html


def test_premises_are_shown_and_measured(quick, tmp_path, monkeypatch):
    """What has to hold for a claim to be testable stands first, and its measure is among the results."""

    def with_a_premise(*arguments) -> list[Verdict]:
        (verdict,) = judge(*arguments)
        (decided,) = verdict.comparisons
        return [replace(verdict, premises=[replace(decided, measure="val/loss@50", text="softmax > 2")])]

    monkeypatch.setattr(harness.report, "judge", with_a_premise)
    html, _ = made(write_experiment(tmp_path))
    rows = rows_of(html, "What decides it")[1:]
    assert [row[0] for row in rows] == ["given softmax > 2val/loss@50", "gate > softmax + 0.1val_full/loss"]
    assert any(name.startswith("validation loss, step 50") for name in rows_of(html, "Mean ± half")[0])


def test_what_is_significant_stands_out(page):
    table = page[0].partition("<caption><span>Paired differences")[2].partition("</table>")[0]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]:
        p = re.findall(r"<td.*?</td>", row)[3]
        text = unescape(re.sub("<[^>]*>", "", p))
        found.setdefault("<strong>" in p, []).append(0.0 if text.startswith("<") else float(text))
    assert max(found[True]) < 0.05 <= min(found[False])
    assert '<td class="short"><strong>held</strong>' in page[0]


def test_a_difference_is_filled_where_significant_and_every_seed_has_a_tick():
    values = {"a": [0.4, 0.5, 0.6, 0.7], "b": [0.0, 0.0, 0.0, 0.0, 1.0]}  # the last is beyond the interval
    found = [
        numbers.Paired(v, difference(own), p, dict(enumerate(own, 1)))
        for (v, own), p in zip(values.items(), (0.01, 0.8), strict=True)
    ]
    panel = charts.differences(numbers.Measure("loss", "loss", ""), found, ["baseline", "a", "b"])
    svg = vl_convert.vegalite_to_svg(json.dumps(theme.drawn(Figure("differences", "", [panel], legend=False))))
    group = r'role-mark[^>]*aria-roledescription="{}[^>]*>(.*?)</g>'
    points = [re.findall('fill="([^"]*)"', g) for g in re.findall(group.format("symbol mark container"), svg)]
    assert [theme.PALETTE[1], theme.LIGHT["paper"]] in points
    ticks = [g.count("<path") for g in re.findall(group.format("rect mark container"), svg)]
    assert ticks == [9]
    assert panel.spec["layer"][1]["encoding"]["x"]["scale"]["domain"][1] > 1


def test_values_at_equal_time_are_explained(quick, tmp_path, page):
    claim = CLAIM | {"decides": {"val/loss@equal_time": "gate > softmax"}}
    html, _ = made(write_experiment(tmp_path, claims=[claim]))
    rows = rows_of(html, "Mean ± half")
    assert [row[-1] for row in rows] == ["seconds a stepof training, median over all runs", "0.5", "0.5", "2"]
    assert "A slower variant is then in the middle of its schedule" in html
    assert "seconds a step" not in page[0]
    assert "at equal time" not in page[0]


def test_where_no_diagnostic_is_along_training_its_own_metrics_are(quick, tmp_path, page):
    html, _ = made(write_experiment(tmp_path, diagnostics=False))
    assert [row[1] for row in rows_of(html, "Along training")[1:]] == ["0.25 ± 0"] * 5
    assert "sink rate, step 0" not in page[0]
    assert "avg kurtosis, step 100" in page[0]


def test_earlier_runs_are_said(quick, tmp_path):
    folder = write_experiment(tmp_path)
    facts = json.loads((folder / "experiment.json").read_text())
    earlier = {"commit": "def5678", "date": facts["date"], "machine": facts["machine"] | {"processor": "Another"}}
    (folder / "experiment.json").write_text(json.dumps(facts | {"earlier": [earlier]}))
    html, _ = made(folder)
    assert "<li>it was run more than once, and not all by one commit, machine or day" in html
    assert "<dt>an earlier run (1)</dt><dd>commit def5678; processor Another</dd>" in html


def test_setup_in_words(page):
    assert (
        "3 variants × 3 seeds (1, 2, 3), 9 runs. The baseline, softmax, is a GPT of 1 layer of 2 heads, 64 wide, at a "
        "context of 64 tokens (59,648 parameters), trained on data/backcopy for 200 steps of 32 windows, 409,600 "
        "tokens in all, by adamw with a peak learning rate of 0.001, in float32."
    ) in page[0]
    rows = rows_of(page[0], "The variants")
    assert rows[2] == ["softmax1", "model.normalizer softmax → softmax1"]


def test_commands_are_those_of_the_runs(folder, page):
    cells = load_experiment(folder.parent.parent / "sinks.yaml", folder.parent).cells
    lines = unescape(page[0]).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python train.py")]
    for cell in cells:
        assert ["python", "train.py", *cell.arguments] in commands


def test_commands_of_an_experiment_in_the_repository_run_anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.report, "ROOT", tmp_path)
    folder = write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = harness.report.write_report(folder).with_suffix(".md").read_text()
    assert "--run.out_dir out/sinks" in text
    commands = re.search("python train.py.*?```", text, flags=re.DOTALL).group()
    assert str(tmp_path) not in commands


def test_csv_holds_everything_and_is_one_click_away(folder, page):
    (link,) = re.findall(r'download="sinks.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', page[0])
    text = (folder / "table.csv").read_text()
    assert base64.b64decode(link).decode() == text
    rows = list(csv.DictReader(text.splitlines()))
    found = {
        int(r["seed"]): float(r["value"]) for r in rows if (r["variant"], r["measure"]) == ("gate", "val_full/loss")
    }
    assert found == dict(zip(SEEDS, LOSS["gate"], strict=True))


def test_markdown_has_two_pictures_and_the_same_tables(folder, page):
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]*)\)", page[1])
    assert pictures == ["figures/differences.png", "figures/training.png"]
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "| gate | 3 | 1.60 ± 0.25 | 4.3 ± 2.6 |" in page[1]
    lines = page[1].splitlines()
    for head, rule in pairwise(lines):
        if rule.startswith("|---"):
            assert head.count("|") == rule.count("|")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": [1]}, "one seed: nothing has an interval, and no difference is tested"),
        ({"seeds": [1, 2]}, "two seeds: an interval is 12.7 standard errors to each side"),
        ({"variants": {"softmax": None}, "claims": ()}, "There is one variant alone, and nothing to compare it with."),
        ({"claims": ()}, "No claim is tested here."),
        ({"diagnostics": False}, "No diagnostic is run on the checkpoints."),
        ({"variants": {f"v{i}": None for i in range(12)}, "claims": (), "seeds": [1, 2]}, "12 variants × 2 seeds"),
    ],
    ids=["one seed", "two seeds", "one variant", "no claims", "no diagnostics", "twelve variants"],
)
def test_any_experiment_makes_a_page(quick, tmp_path, options, said):
    html, text = made(write_experiment(tmp_path, **options))
    assert said in unescape(html)
    assert markdown.plain(said) in text
    for row in rows_of(html, "Mean ± half")[1:]:
        assert ("±" in row[2]) == (options.get("seeds") != [1])


def test_what_is_missing_is_said(quick, tmp_path):
    folder = write_experiment(tmp_path)
    (folder / "gate_s2" / "metrics.jsonl").unlink()
    (folder / "softmax1_s1" / "diagnostics" / "activation_kurtosis.json").unlink()
    html, _ = made(folder)
    assert "7 of 9 runs are finished and measured." in html
    assert "gate_s2: not trained" in html
    assert "softmax1_s1: activation_kurtosis was not measured" in html
    assert "val_full/loss: gate &gt; softmax + 0.1: 2 seeds, and the claim needs 3" in html
    rows = {row[0]: row for row in rows_of(html, "Mean ± half")}
    assert rows["gate"][1:3] == ["2", "1.6 ± 1.3"]
    assert rows["softmax1"][3].endswith("n = 2")


def test_nothing_trained_yet(tmp_path):
    folder = write_experiment(tmp_path)
    for file in folder.rglob("metrics.jsonl"):
        file.unlink()
    html, _ = made(folder)
    assert "0 of 9 runs are finished and measured." in html
    assert (folder / "table.csv").read_text() == "variant,seed,measure,value\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no experiment.json in it; give a folder that scripts/run_experiment.py has made"),
        ("{", "experiment.json cannot be read"),
        ("[]", "it does not say which file the experiment is in"),
        ('{"file": "experiments/gone.yaml"}', "there is no experiments/gone.yaml"),
        ('{"file": "experiments/backcopy.yaml"}', "it is of the experiment backcopy"),
    ],
)
def test_a_folder_of_something_else_is_one_line(tmp_path, monkeypatch, capsys, content, said):
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert run_cli(report.main) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "report.html").exists()
