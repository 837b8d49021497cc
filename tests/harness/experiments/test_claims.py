"""Claims: what a file may say, and the verdicts on numbers made for them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from harness.errors import UserError
from harness.experiments.claims import FAILED, HELD, OPEN, Claim, Verdict, judge, load_claims
from harness.experiments.grid import Experiment, load_experiment
from harness.experiments.results import Results, Run
from tests.helpers import ROOT

EXPERIMENT = f"""
question: Does it?
base: {ROOT}/configs/backcopy_softmax.yaml
seeds: [1, 2, 3]
variants: {{softmax: , softmax1: {{model: {{normalizer: softmax1}}}}}}
diagnostics: {{activation_kurtosis: }}
"""
CLAIM = """
sentence: softmax1 removes kurtosis.
source: "Miller (2023)"
tested_at: nothing
experiment: ../small.yaml
decides:
  activation_kurtosis/avg kurtosis: softmax1 < 0.5 * softmax
"""
KURTOSIS, LOSS = "activation_kurtosis/avg kurtosis", "val_full/loss"
BASELINE = [4.0, 4.2, 4.4]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Experiment:
    path = tmp_path_factory.mktemp("experiments") / "small.yaml"
    path.write_text(EXPERIMENT)
    return load_experiment(path)


@pytest.fixture
def small(tmp_path, loaded) -> Experiment:
    (tmp_path / "claims").mkdir()
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    return replace(loaded, path=tmp_path / "small.yaml")


def write(experiment: Experiment, text: str, name: str = "kurtosis") -> Path:
    path = experiment.path.parent / "claims" / f"{name}.yaml"
    path.write_text(text)
    return path


def claim(*comparisons: str, seeds: int = 3, **decides: str | list[str]) -> Claim:
    """Of KURTOSIS, and of LOSS by `loss`."""
    asked = {KURTOSIS: list(comparisons)} if comparisons else {}
    asked |= {LOSS: [decides["loss"]]} if decides else {}
    return Claim(Path("c.yaml"), "It does.", "a paper", "1.3 B", Path("small.yaml"), seeds, asked)


def test_a_claim_may_have_a_larger_form_decided_by_the_same_comparisons_or_by_its_own(small):
    (small.path.parent / "large.yaml").touch()
    large = replace(small, path=small.path.parent / "large.yaml")
    write(small, CLAIM + "larger: {experiment: ../large.yaml}")
    (here,), (there,) = load_claims(small), load_claims(large)
    assert here.decides == there.decides
    assert (here.experiment.name, there.experiment.name) == ("small.yaml", "large.yaml")
    write(small, CLAIM + "larger: {experiment: ../large.yaml, decides: {val_full/loss: softmax1 < 2}}")
    assert load_claims(large)[0].decides == {"val_full/loss": ["softmax1 < 2"]}
    assert load_claims(small)[0].decides == here.decides


def results(experiment: Experiment, softmax1: list[float | None], softmax: list = BASELINE, loss=()) -> Results:
    """Of three seeds each; `loss` is softmax1's, where softmax has 2."""
    made = []
    for cell in experiment.cells:
        i = experiment.seeds.index(cell.seed)
        value = softmax1[i] if cell.variant == "softmax1" else softmax[i]
        last = {} if value is None else {KURTOSIS: value}
        if loss:
            last[LOSS] = loss[i] if cell.variant == "softmax1" else 2.0
        made.append(Run(cell, last))
    return Results(experiment, made)


def verdict(experiment: Experiment, of: Claim, *numbers, **options) -> Verdict:
    return judge(results(experiment, *numbers, **options), [of])[0]


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_claims_beside_an_experiment_that_name_it_are_read(small):
    write(small, CLAIM)
    write(small, CLAIM.replace("small", "other").replace("sentence", "nonsense"), "of_another")
    (small.path.parent / "other.yaml").write_text(EXPERIMENT)
    write(small, CLAIM + "  val_full/loss: [softmax1 < softmax, softmax < 9]\nseeds: 5\n", "loss")
    first, second = load_claims(small)
    assert (first.name, first.seeds, first.source, first.tested_at) == ("kurtosis", 3, "Miller (2023)", "nothing")
    assert first.decides == {KURTOSIS: ["softmax1 < 0.5 * softmax"]}
    assert (second.name, second.seeds) == ("loss", 5)
    assert second.decides[LOSS] == ["softmax1 < softmax", "softmax < 9"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tested_at: nothing", "scale: 1", "unknown key 'scale'; a claim has sentence, source"),
        ("tested_at: nothing", "", "lacks tested_at"),
        ("tested_at: nothing", "tested_at: 2023", "tested_at: a text is expected, not 2023"),
        ("../small.yaml", "../smal.yaml", "experiment: there is no "),
        ("decides:", "seeds: 1\ndecides:", "seeds: 1 is no integer from 2 on"),
        ("decides:", "seeds: many\ndecides:", "seeds: 'many' is no integer"),
        ("decides:\n ", "decides: x\n#", "decides: a mapping of measures to comparisons is expected, not 'x'"),
        ("softmax1 < 0.5 * softmax", "[]", "a comparison or a list of them, not []"),
        ("softmax1 < 0.5 * softmax", "[softmax1 < 1, 2]", "a comparison or a list of them, not ['softmax1 < 1', 2]"),
        ("softmax1 < 0.5 * softmax", "softmax1 < relu", "no variant relu; there are softmax, softmax1"),
        ("softmax1 < 0.5 * softmax", "1 < 2", "it names no variant; there are softmax, softmax1"),
        ("tested_at", "larger: {decides: {a: a < 1}}\ntested_at", "larger: a mapping of experiment and"),
        ("tested_at", "larger: {experiment: x.yaml}\ntested_at", "claims/x.yaml"),
        (CLAIM, "- a list", "a claim has the keys sentence, source"),
    ],
)
def test_a_mistake_in_a_claim_is_one_line_with_file_and_key(small, old, new, message):
    path = write(small, CLAIM.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_claims(small)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "softmax1",
        "softmax1 <= softmax",
        "softmax1 < softmax < 3",
        "softmax1 <",
        "softmax1 < softmax ** 2",
        "softmax1 < sum(softmax, 1)",
        "softmax1 < max(softmax)",
        "softmax1 < abs(softmax, 1)",
        "softmax1 < max(*softmax, 1)",
        "softmax1 < softmax.real",
        "softmax1 < True",
        "softmax1 < 1e999",
        "softmax1 < 'a'",
        "softmax1 < (lambda: softmax)()",
        "__import__('os').abort() < softmax1",
        "softmax1 < " + "-" * 100_000 + "1",
    ],
    ids=lambda text: text[:40],
)
def test_a_comparison_is_arithmetic_alone(small, text):
    path = write(small, CLAIM.replace("softmax1 < 0.5 * softmax", f'"{text}"'))
    with pytest.raises(UserError) as caught:
        load_claims(small)
    start, _, allowed = str(caught.value).rpartition(": a comparison is ")
    assert start == f"{path}: decides: {KURTOSIS}: {text!r}"
    assert allowed.startswith("one < or > between two sides")


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("softmax1", "less", "greater"),
    [
        ([1.0, 1.2, 1.1], HELD, FAILED),
        ([3.4, 3.6, 3.8], FAILED, HELD),
        ([1.8, 2.5, 2.1], OPEN, OPEN),
        ([2.0, 2.1, 2.2], OPEN, OPEN),  # both sides are the same in every seed
        ([1.0, 1.1, 1.2], HELD, FAILED),  # the difference is the same in every seed
    ],
)
def test_the_numbers_decide_and_the_sign_turns_the_verdict(small, softmax1, less, greater):
    for sign, outcome in (("<", less), (">", greater)):
        found = verdict(small, claim(f"softmax1 {sign} softmax - softmax / 2"), softmax1)
        assert (found.outcome, found.comparisons[0].outcome, found.problems) == (outcome, outcome, [])
        assert found.sentence.startswith(f"{outcome.capitalize()}: in avg kurtosis, softmax1 is ")
        assert found.sentence.endswith(".")


def test_the_numbers_are_those_of_the_paired_test(small):
    softmax1 = [1.0, 1.2, 1.1]
    found = verdict(small, claim("softmax1 < 0.5 * softmax"), softmax1).comparisons[0]
    peer = stats.ttest_rel(softmax1, [0.5 * x for x in BASELINE])
    low, high = peer.confidence_interval()
    assert found.p == pytest.approx(peer.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high), rel=1e-9)
    assert found.means == pytest.approx({"softmax1": 1.1, "softmax": 4.2})
    assert (found.left, found.right, found.difference.mean) == pytest.approx((1.1, 2.1, -1.0))
    assert (found.seeds, found.text, found.measure) == ([1, 2, 3], "softmax1 < 0.5 * softmax", KURTOSIS)
    assert found.sentence == (
        "In avg kurtosis, softmax1 is 1.1 and 0.5 * softmax is 2.1 (3 seeds), smaller by 1 "
        f"(95 % interval {-high:.4g} to {-low:.4g}, Holm-adjusted p = {peer.pvalue:.3g}), as claimed."
    )


def test_what_is_not_decided_says_what_would_have_been_seen(small):
    found = verdict(small, claim("softmax1 - softmax > -2"), [1.8, 2.5, 2.1]).comparisons[0]
    d = found.difference
    assert found.sentence == (
        f"In avg kurtosis, softmax1 - softmax is −2.067 and the bound is −2 (3 seeds), smaller by {-d.mean:.4g}, "
        f"the interval −{d.high:.4g} to {-d.low:.4g} holds 0, and tested alone, with this spread and 3 seeds, "
        f"a difference of {d.detectable:.4g} would have been seen four times out of five."
    )


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("abs(softmax1 - softmax) > max(softmax1, -softmax, 2)", 3.2, 2.0),
        ("-(softmax + 1) / 2 < min(softmax1, softmax) * softmax1 - 0.5e1", -2.6, -4.0 + 0.02 / 3),
    ],
)
def test_comparisons_are_arithmetic_seed_by_seed(small, text, left, right):
    found = verdict(small, claim(text), [1.1, 1.0, 0.9]).comparisons[0]
    assert (found.left, found.right) == pytest.approx((left, right))


def test_a_claim_of_two_comparisons_needs_both(small):
    both = claim("softmax1 < 0.5 * softmax", loss="softmax1 < softmax + 0.01")
    kurtosis = [1.0, 1.2, 1.1]
    same, worse, unclear = [2.001, 1.999, 2.0], [2.1, 2.11, 2.12], [2.0, 2.1, 1.9]
    assert verdict(small, both, kurtosis, loss=same).outcome == HELD
    assert verdict(small, both, kurtosis, loss=unclear).outcome == OPEN
    assert verdict(small, both, [1.8, 2.5, 2.1], loss=worse).outcome == FAILED
    failed = verdict(small, both, kurtosis, loss=worse)
    assert [c.outcome for c in failed.comparisons] == [HELD, FAILED]
    assert failed.outcome == FAILED
    assert failed.sentence == f"Did not hold: i{failed.comparisons[1].sentence[1:]}"  # what held did not decide it
    held = verdict(small, both, kurtosis, loss=same).sentence
    assert "; in val_full/loss, softmax1 is 2 and softmax + 0.01 is 2.01 (3 seeds), smaller by 0.01" in held


def test_holms_correction_is_over_all_comparisons_of_all_claims(small):
    first, numbers = claim("softmax1 < 0.5 * softmax"), [1.0, 1.6, 1.3]
    alone = verdict(small, first, numbers)
    p = alone.comparisons[0].difference.p
    assert 0.025 < p < 0.05
    assert alone.outcome == HELD
    second, third = claim("softmax1 < softmax / 2"), claim(loss="softmax1 < softmax")
    corrected = judge(results(small, numbers), [first, second, third])
    assert [v.outcome for v in corrected] == [OPEN, OPEN, OPEN]
    assert [v.comparisons[0].p for v in corrected[:2]] == pytest.approx([2 * p, 2 * p])  # the third was not tested
    assert "does not hold 0, but by Holm's correction p = " in corrected[0].sentence
    assert f"p = {2 * p:.3g}" in corrected[0].sentence


# --- what is missing --------------------------------------------------------------------------------------------------


def test_fewer_seeds_than_the_claim_needs_decide_nothing_and_are_shown(small):
    found = verdict(small, claim("softmax1 < 0.5 * softmax"), [1.0, 1.2, None])
    assert found.outcome == OPEN
    assert found.problems == [
        f"{KURTOSIS}: softmax1 has no value of seed 3",
        f"{KURTOSIS}: softmax1 < 0.5 * softmax: 2 seeds, and the claim needs 3",
    ]
    assert found.comparisons[0].seeds == [1, 2]
    assert found.comparisons[0].means == pytest.approx({"softmax1": 1.1, "softmax": 4.1})  # of the same seeds
    assert found.comparisons[0].p < 0.05
    assert "from fewer seeds than the 3 that the claim needs" in found.sentence
    enough = verdict(small, claim("softmax1 < 0.5 * softmax", seeds=2), [1.0, 1.2, None])
    assert (enough.outcome, enough.problems) == (HELD, found.problems[:1])


def test_one_seed_has_no_interval_and_says_so(small):
    found = verdict(small, claim("softmax1 < 0.5 * softmax"), [1.0, None, None])
    assert (found.outcome, found.comparisons[0].p, found.comparisons[0].difference.low) == (OPEN, None, None)
    assert found.sentence == (
        "Not decided: in avg kurtosis, softmax1 is 1 and 0.5 * softmax is 2 (1 seed), smaller by 1, "
        "and one seed gives no interval."
    )


def test_a_measure_that_no_run_has_leaves_its_claim_open(small):
    found = verdict(small, claim("softmax1 < 0.5 * softmax", loss="softmax1 < 9"), [1.0, 1.2, 1.1])
    assert (found.outcome, [c.outcome for c in found.comparisons]) == (OPEN, [HELD])
    assert found.problems == [f"no run has a value of {LOSS}; there are {KURTOSIS}"]
    assert found.sentence == "Not decided: 1 of its 2 comparisons could not be made: no seed has the values."
    failed = verdict(small, claim("softmax1 > 0.5 * softmax", loss="softmax1 < 9"), [1.0, 1.2, 1.1])
    assert failed.outcome == FAILED


def test_a_variant_without_any_value_leaves_its_claim_open(small):
    found = verdict(small, claim("softmax1 < 0.5 * softmax"), [None, None, None])
    assert (found.outcome, found.comparisons) == (OPEN, [])
    assert found.problems[0] == f"{KURTOSIS}: softmax1 has no value of seeds 1, 2, 3"
    assert found.problems[1].endswith(": no seeds, and the claim needs 3")


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_seed_without_a_finite_value_is_left_out(small, value):
    found = verdict(small, claim("softmax / softmax1 > 2", seeds=2), [1.0, value, 1.1])
    assert (found.outcome, found.comparisons[0].seeds) == (HELD, [1, 3])
    assert found.problems == [f"{KURTOSIS}: softmax / softmax1 > 2: seed 2 is left out, it has no finite value there"]


def test_along_training_measures_say_where(small):
    runs = results(small, [1.0, 1.2, 1.1])
    for run in runs.runs:
        run.along[KURTOSIS] = [(500, run.last[KURTOSIS]), (1000, 9.0)]
    at = [replace(claim(), decides={f"{KURTOSIS}@{where}": ["softmax1 < softmax / 2"]}) for where in ("500", "max")]
    first, second = judge(runs, at)
    assert first.sentence.startswith("Held: in avg kurtosis (step 500), softmax1 is 1.1 and softmax / 2 is 2.1 ")
    assert second.sentence.startswith("Did not hold: in avg kurtosis (largest along training), softmax1 is 9 ")


def test_identical_runs_do_not_differ_by_their_rounding(small):
    found = verdict(small, claim("softmax1 < softmax + 0.2"), [0.3, 0.3, 0.3], [0.1, 0.1, 0.1])
    assert 0.1 + 0.2 > 0.3
    assert (found.outcome, found.comparisons[0].p, found.comparisons[0].difference.mean) == (OPEN, 1.0, 0.0)
    assert "(3 seeds), no difference, the interval 0 to 0 holds 0." in found.sentence


@pytest.mark.parametrize(("bound", "outcome"), [("softmax > 3", HELD), ("softmax > 5", OPEN), ("softmax > 4.2", OPEN)])
def test_a_claim_is_decided_only_where_its_premise_holds(small, bound, outcome):
    """softmax1 is a tenth of softmax; softmax is 4.0, 4.2 and 4.4."""
    found = results(small, [0.1 * value for value in BASELINE])
    asked = replace(claim("softmax1 < 0.5 * softmax"), given={KURTOSIS: [bound]})
    (verdict,) = judge(found, [asked])
    assert verdict.outcome == outcome
    assert [premise.text for premise in verdict.premises] == [bound]
    assert verdict.comparisons[0].outcome == HELD
    assert ("Not decided: the claim is not testable here, since in avg kurtosis" in verdict.sentence) == (
        outcome == OPEN
    )


def test_a_premise_that_no_run_has_a_value_for_leaves_the_claim_open(small):
    found = results(small, [0.1 * value for value in BASELINE])
    asked = replace(claim("softmax1 < 0.5 * softmax"), given={LOSS: ["softmax > 1"]})
    (verdict,) = judge(found, [asked])
    assert verdict.outcome == OPEN
    assert any("no run has a value of val_full/loss" in problem for problem in verdict.problems)
