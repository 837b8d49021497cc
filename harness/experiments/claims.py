"""Published claims, and whether an experiment bears them out: *held*, *did not hold* or *not decided*.

    sentence: softmax1 keeps the loss and removes the kurtosis of the activations.
    source: "Miller (2023), Attention Is Off By One: https://…"
    tested_at: nothing; the post has no experiment              # the scale at which its source tested it
    experiment: ../normalizers.yaml                             # relative to this file
    seeds: 3                                                    # as many at least; the default
    given:                                                      # what has to be so for the claim to be testable
      activation_kurtosis/avg kurtosis: softmax > 10            # (there are outliers to be removed); may be left out
    decides:                                                    # measure → what has to be so, of variants' names
      perplexity/loss: softmax1 < softmax + 0.01
      activation_kurtosis/avg kurtosis: softmax1 - 3 < 0.5 * (softmax - 3)
    larger: {experiment: ../normalizers_gpu.yaml}               # a larger form that decides it too, by the same
                                                                # comparisons or by its own `given` and `decides`

A comparison is arithmetic on the variants' values of one seed: numbers, + − * / and abs(…), min(…), max(…), with one <
or > between two sides. The difference of the sides is taken seed by seed and tested against 0, two-sided, at 5 % after
Holm's correction over all comparisons of all claims of the experiment. One that is significant the way it was written
*held*, the other way *did not hold*; any other is *not decided*. A claim held if all its comparisons did, and did not
hold if one of them did not; it is not decided where a comparison under `given` did not hold or is not decided itself.
"""

import ast
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError
from harness.experiments.grid import Experiment
from harness.experiments.results import Results
from harness.figures import number
from harness.text_files import read_yaml
from measure.seeds import LEVEL, Difference, difference, holm

HELD, FAILED, OPEN = "held", "did not hold", "not decided"
SEEDS = 3  # that a claim asks for where it does not say
_FUNCTIONS: dict[str, Callable[..., float]] = {"abs": abs, "min": min, "max": max}
_TEXTS = ("sentence", "source", "tested_at", "experiment")
_LARGER = ("experiment", "given", "decides")
_ALLOWED = "one < or > between two sides of variants, numbers, + - * / and abs(…), min(…, …), max(…, …)"


@dataclass(frozen=True)
class Claim:
    path: Path
    sentence: str
    source: str
    tested_at: str
    experiment: Path
    seeds: int
    decides: dict[str, list[str]]
    """measure → comparisons"""
    given: dict[str, list[str]] = field(default_factory=dict)
    """the same, of what has to hold for the claim to be testable"""

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Comparison:
    """One comparison with what came of it."""

    measure: str
    text: str
    """as the claim's file has it"""
    means: dict[str, float]
    """variant → mean over the seeds that were compared, of the variants that it names"""
    left: float
    """means over the seeds that were compared, of the two sides"""
    right: float
    seeds: list[int]
    """that have all values it needs"""
    difference: Difference
    """of left − right"""
    p: float | None
    """after Holm's correction"""
    outcome: str
    sentence: str
    """made from the numbers: what was found, with the interval"""


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    comparisons: list[Comparison]
    """in the claim's order, of which a seed at least has the values"""
    outcome: str
    sentence: str
    """made from the numbers"""
    problems: list[str]
    """in a line each: a measure that no run has, seeds without a value, too few seeds"""
    premises: list[Comparison] = field(default_factory=list)
    """what has to hold for the claim to be testable at all; else it is not decided"""


class _Sides(NamedTuple):
    """A comparison's text, read."""

    left: ast.expr
    right: ast.expr
    less: bool
    """whether it says that the left is smaller"""
    variants: list[str]
    """that it names, by their first mention"""
    texts: tuple[str, str]


def load_claims(experiment: Experiment) -> list[Claim]:
    """Those in claims/ beside the experiment's file that name it, by their files' names. UserError for every mistake in
    one, and for a file there of which cannot be told what experiment it names."""
    found = []
    for path in sorted((experiment.path.parent / "claims").glob("*.yaml")):
        content = read_yaml(path, "claim")
        if not isinstance(content, dict):
            raise UserError(f"{path}: a claim has the keys {', '.join(_TEXTS)}, decides and, if need be, seeds")
        larger = content.pop("larger", None)
        if larger is not None and not (isinstance(larger, dict) and {"experiment"} <= {*larger} <= {*_LARGER}):
            raise UserError(
                f"{path}: larger: a mapping of experiment and, if need be, given and decides, not {larger!r}"
            )
        for form in [content, content | larger] if larger else [content]:
            named = path.parent / _text(path, form, "experiment")
            if not os.path.isfile(named):  # False, too, for a name that is too long
                raise UserError(f"{path}: experiment: there is no {named}")
            if named.resolve() == experiment.path.resolve():
                found.append(_claim(path, form, named, experiment))
    return found


def _claim(path: Path, content: dict, experiment_path: Path, experiment: Experiment) -> Claim:
    known = (*_TEXTS, "seeds", "given", "decides")
    if unknown := [key for key in content if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; a claim has {', '.join(known)}")
    sentence, source, tested_at, _ = (_text(path, content, key) for key in _TEXTS)
    seeds = content.get("seeds", SEEDS)
    if type(seeds) is not int or seeds < 2:
        raise UserError(f"{path}: seeds: {seeds!r} is no integer from 2 on; one seed decides nothing")
    decides = _comparisons(path, "decides", content.get("decides"), experiment)
    given = _comparisons(path, "given", content["given"], experiment) if "given" in content else {}
    return Claim(path, sentence, source, tested_at, experiment_path, seeds, decides, given)


def _comparisons(path: Path, key: str, asked: object, experiment: Experiment) -> dict[str, list[str]]:
    if not isinstance(asked, dict) or not asked:
        raise UserError(f"{path}: {key}: a mapping of measures to comparisons is expected, not {asked!r}")
    found = {}
    for measure, comparisons in asked.items():
        texts = comparisons if isinstance(comparisons, list) else [comparisons]
        if not isinstance(measure, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {key}: {measure!r}: a comparison or a list of them, not {comparisons!r}")
        for text in texts:
            _parse(path, f"{key}: {measure}", text, experiment.variants)
        found[measure] = texts
    return found


def _text(path: Path, content: dict, key: str) -> str:
    if key not in content:
        raise UserError(f"{path}: it lacks {key}")
    if not isinstance(content[key], str) or not content[key].strip():
        raise UserError(f"{path}: {key}: a text is expected, not {content[key]!r}")
    return content[key].strip()


def _parse(path: Path, measure: str, text: str, variants: list[str]) -> _Sides:
    where = f"{path}: {measure}: {text!r}"
    text = " ".join(text.split())
    try:
        match ast.parse(text, mode="eval").body:
            case ast.Compare(left, [ast.Lt() | ast.Gt() as sign], [right]):
                named = dict.fromkeys([*_names(left), *_names(right)])
                texts = ast.unparse(left), ast.unparse(right)
            case _:
                raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{where}: a comparison is {_ALLOWED}") from None
    if unknown := [name for name in named if name not in variants]:
        raise UserError(f"{where}: there is no variant {unknown[0]}; there are {', '.join(variants)}")
    if not named:
        raise UserError(f"{where}: it names no variant; there are {', '.join(variants)}")
    return _Sides(left, right, isinstance(sign, ast.Lt), list(named), texts)


def _names(side: ast.expr) -> Iterator[str]:
    """The variants that a side names. ValueError for what is not allowed in it."""
    match side:
        case ast.Name(name):
            yield name
        case ast.Constant(int() | float() as value) if type(value) is not bool and abs(value) <= 1e300:
            pass
        case ast.UnaryOp(ast.USub(), operand):
            yield from _names(operand)
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right):
            yield from _names(left)
            yield from _names(right)
        case ast.Call(ast.Name("abs"), [_], []) | ast.Call(ast.Name("min" | "max"), [_, _, *_], []):
            for argument in side.args:
                yield from _names(argument)
        case _:
            raise ValueError


def _value(side: ast.expr, values: dict[str, float]) -> float:
    """A side, as `_names` lets it pass, of one seed's values: variant → value. ZeroDivisionError."""
    match side:
        case ast.Name(name):
            return values[name]
        case ast.Constant(int() | float() as value):
            return float(value)
        case ast.UnaryOp(_, operand):
            return -_value(operand, values)
        case ast.Call(ast.Name(name), arguments):
            return _FUNCTIONS[name](*(_value(argument, values) for argument in arguments))
        case ast.BinOp(left, operator, right):
            a, b = _value(left, values), _value(right, values)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
    raise AssertionError(ast.dump(side))


class _Measured(NamedTuple):
    """A comparison's values, before Holm's correction of all."""

    measure: str
    text: str
    sides: _Sides
    seeds: list[int]
    means: dict[str, float]
    left: float
    right: float
    difference: Difference


def judge(results: Results, claims: list[Claim]) -> list[Verdict]:
    """A verdict for each claim, in their order. Of a comparison that no seed has the values for there is a line in
    `problems` alone, and the claim is not decided unless another comparison fails. Holm's correction is over every
    comparison of two seeds or more, those of too few seeds for their claim among them."""
    measured: list[tuple[list[_Measured], list[_Measured]]] = []  # of each claim: under `given`, under `decides`
    problems: list[list[str]] = []
    for claim in claims:
        problems.append([])
        both = (
            [(measure, text) for measure, ts in part.items() for text in ts] for part in (claim.given, claim.decides)
        )
        given, decides = ([_measure(results, claim, *pair, problems[-1]) for pair in pairs] for pairs in both)
        measured.append(([m for m in given if m], [m for m in decides if m]))
    adjusted = iter(holm([m.difference.p for parts in measured for part in parts for m in part]))
    verdicts = []
    for claim, parts, lines in zip(claims, measured, problems, strict=True):
        premises, comparisons = ([_compare(results, claim, m, next(adjusted)) for m in part] for part in parts)
        verdicts.append(_verdict(claim, premises, comparisons, list(dict.fromkeys(lines))))
    return verdicts


def _measure(results: Results, claim: Claim, measure: str, text: str, problems: list[str]) -> _Measured | None:
    """None where no seed has all values. What is missing goes to `problems`."""
    sides = _parse(claim.path, measure, text, results.experiment.variants)
    try:
        values = {variant: results.values(measure, variant, sides.variants) for variant in sides.variants}
    except UserError as error:
        problems.append(str(error))
        return None
    for variant, found in values.items():
        if missing := [seed for seed in results.experiment.seeds if seed not in found]:
            problems.append(f"{measure}: {variant} has no value of {_seeds(missing)}")
    seeds, lefts, rights = [], [], []
    for seed in results.experiment.seeds:
        if all(seed in found for found in values.values()):
            own = {variant: found[seed] for variant, found in values.items()}
            try:
                left, right = _value(sides.left, own), _value(sides.right, own)
            except ZeroDivisionError:
                left = right = math.nan
            if math.isfinite(left - right):
                seeds.append(seed)
                lefts.append(left)
                rights.append(right)
            else:
                problems.append(f"{measure}: {text}: seed {seed} is left out, it has no finite value there")
    if len(seeds) < claim.seeds:
        problems.append(f"{measure}: {text}: {_count(len(seeds))}, and the claim needs {claim.seeds}")
    if not seeds:
        return None
    # Sides that agree to twelve digits are one number, computed in two orders.
    pairs = zip(lefts, rights, strict=True)
    differences = [0.0 if math.isclose(a, b, rel_tol=1e-12) else a - b for a, b in pairs]
    means = {variant: _mean([found[seed] for seed in seeds]) for variant, found in values.items()}
    return _Measured(measure, text, sides, seeds, means, _mean(lefts), _mean(rights), difference(differences))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _compare(results: Results, claim: Claim, m: _Measured, p: float | None) -> Comparison:
    outcome = OPEN
    if p is not None and p < LEVEL and m.difference.n >= claim.seeds:
        outcome = HELD if (m.difference.mean < 0) == m.sides.less else FAILED
    label = _label(m.measure, {measurement.name for measurement in results.experiment.measurements})
    sentence = f"In {label}, {_found(claim, m, p, outcome)}."
    return Comparison(m.measure, m.text, m.means, m.left, m.right, m.seeds, m.difference, p, outcome, sentence)


def _verdict(claim: Claim, premises: list[Comparison], comparisons: list[Comparison], problems: list[str]) -> Verdict:
    outcomes = [comparison.outcome for comparison in comparisons]
    asked = sum(map(len, claim.decides.values()))
    untestable = [premise for premise in premises if premise.outcome != HELD]
    if untestable or len(premises) < sum(map(len, claim.given.values())):
        outcome = OPEN
    elif FAILED in outcomes:
        outcome = FAILED
    else:
        outcome = HELD if outcomes == [HELD] * asked else OPEN
    decisive = ["i" + c.sentence[1:].removesuffix(".") for c in comparisons if c.outcome == outcome]
    if untestable:
        lacking = "; ".join("i" + premise.sentence[1:].removesuffix(".") for premise in untestable)
        decisive = [f"the claim is not testable here, since {lacking}"]
    elif len(comparisons) < asked and outcome == OPEN:
        missing = asked - len(comparisons)
        decisive.append(f"{missing} of its {asked} comparisons could not be made: no seed has the values")
    sentence = f"{outcome.capitalize()}: {'; '.join(decisive)}."
    return Verdict(claim, comparisons, outcome, sentence, problems, premises)


# --- in words ---------------------------------------------------------------------------------------------------------


def _found(claim: Claim, m: _Measured, p: float | None, outcome: str) -> str:
    n, mean, _, low, high, _, detectable = m.difference
    way = f"{'smaller' if mean < 0 else 'larger'} by {_shown(abs(mean))}" if mean else "no difference"
    sides = " and ".join(_side(*of) for of in zip(m.sides[:2], m.sides.texts, (m.left, m.right), strict=True))
    text = f"{sides} ({_count(n)}), {way}"
    if low is None or high is None or p is None:
        return f"{text}, and one seed gives no interval"
    low, high = (-high, -low) if mean < 0 else (low, high)
    interval, adjusted = f"{_shown(low)} to {_shown(high)}", f"p {_probability(p)}"
    numbers = f"{text} (95 % interval {interval}, Holm-adjusted {adjusted})"
    if outcome != OPEN:
        return f"{numbers}, {'as claimed' if outcome == HELD else 'not smaller' if m.sides.less else 'not larger'}"
    if n < claim.seeds:
        return f"{numbers}, from fewer seeds than the {claim.seeds} that the claim needs"
    if low <= 0 <= high:
        text += f", the interval {interval} holds 0"
    else:
        text += f", the interval {interval} does not hold 0, but by Holm's correction {adjusted}"
    if detectable:
        seen = f"a difference of {_shown(detectable)} would have been seen four times out of five"
        text += f", and tested alone, with this spread and {_count(n)}, {seen}"
    return text


def _side(side: ast.expr, text: str, value: float) -> str:
    return f"{text if any(_names(side)) else 'the bound'} is {_shown(value)}"


def _label(measure: str, diagnostics: set[str]) -> str:
    """ "avg kurtosis (step 500)" for activation_kurtosis/avg kurtosis@500."""
    name, _, where = measure.partition("@")
    script, _, value = name.partition("/")
    own = {"min": "least along training", "max": "largest along training", "mean": "mean along training"}
    own |= {"equal_time": "at equal time of training"}
    return (value if script in diagnostics else name) + (f" ({own.get(where, f'step {where}')})" if where else "")


def _shown(value: float) -> str:
    return number(value).replace("-", "−")


def _probability(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.3g}"


def _count(n: int) -> str:
    return f"{n or 'no'} seed{'s' * (n != 1)}"


def _seeds(seeds: list[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
