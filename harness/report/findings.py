"""The page of an experiment: what it asked, what was run, what was found, and on what grounds."""

import csv
import io
import statistics
from collections.abc import Sequence

from harness.experiments.claims import FAILED, HELD, OPEN, Comparison, Verdict
from harness.experiments.results import Results, Run
from harness.report import charts
from harness.report.document import (
    Block,
    Cell,
    Column,
    Download,
    Figure,
    Finding,
    Listing,
    Page,
    Panel,
    Section,
    Table,
    Text,
)
from harness.report.numbers import (
    Measure,
    Point,
    along,
    curve,
    interval,
    long_form,
    measures,
    over_seeds,
    paired,
    probability,
    window,
    with_interval,
    written,
)
from harness.report.setup import provenance, setup
from measure.seeds import POWER

POWER_NOTE = f"with a power of {POWER:g}"
ROWS_OF_A_CURVE = 7  # in the table behind it
MAPS = {
    "sink_rate": "share of sequences in which the head sinks into the first token",
    "first_mass": "attention that the head gives the first token",
    "cos_diag": "cosine of the diagonal’s and the full gradient of the scores",
}
"""columns of the heads' rows → what the colours of their heat maps show"""
BAND = (
    "Bands are 95 % intervals of the mean over seeds (Student’s t); curves of one seed have none. The axes are cut to "
    "the means after the first tenth of training."
)


def page(results: Results, verdicts: Sequence[Verdict], facts: dict) -> Page:
    experiment = results.experiment
    asked = [name for v in verdicts for name in (*(premise.measure for premise in v.premises), *v.claim.decides)]
    shown = measures(results, asked)
    reading = [*READING, *([AT_EQUAL_TIME] if _timed(shown) else [])]
    sections = [
        Section("Setup", "Setup", setup(experiment)),
        Section("Verdicts", "Verdicts", _verdicts(verdicts)),
        Section("Problems", "Problems", _problems(results, facts)),
        Section("Results", "Results", _table(results, shown)),
        Section("Differences", f"Differences to {experiment.baseline}", _differences(results, shown)),
        Section("Curves", "Training curves", _training(results)),
        Section("Along-training", "Along training", _along(results, shown)),
        Section("Heads", "Head by head", _heads(results)),
        Section("Trade-off", "Loss and outliers", _scatter(results, shown)),
        Section("Commands", "How it was made", provenance(experiment, facts)),
        Section("Reading", "How to read it", [Text(text) for text in reading]),
    ]
    byline = [str(facts.get("date") or ""), f"commit {facts['commit']}" if facts.get("commit") else ""]
    byline.append((facts.get("machine") or {}).get("processor") or "")
    return Page(
        experiment.question,
        f"Experiment {experiment.name}",
        " · ".join(filter(None, byline)),
        _lead(verdicts),
        experiment.variants,
        [section for section in sections if section.blocks],
    )


def _lead(verdicts: Sequence[Verdict]) -> str:
    counts = [(sum(v.outcome == outcome for v in verdicts), outcome) for outcome in (HELD, FAILED, OPEN)]
    said = ", ".join(f"{n} {'is ' * (n == 1) or 'are '}{o}" if o == OPEN else f"{n} {o}" for n, o in counts if n)
    n = len(verdicts)
    return f"Of {n} claim{'s' * (n != 1)}, {said}." if verdicts else "No claim is tested here."


READING = (
    "Every run is an ordinary run of train.py. A seed fixes the batches, and the initial weights of variants that have "
    "the same parameters: runs of one seed meet the same batches under every variant, and differences are taken seed "
    "by seed.",
    "A mean ± x is the mean over seeds with half the width of its 95 % interval, by Student’s t with n − 1 degrees of "
    "freedom. The interval tells where the mean over all seeds may lie, not how far single runs scatter. One seed "
    "gives no interval. With two or three seeds an interval is wide, and it rests on the spread being Gaussian.",
    "p is of a two-sided paired t test against 0. Holm’s correction (1979) makes it hold for all comparisons of a "
    "family together: all comparisons of all claims under Verdicts, and the variants of one measure under Differences. "
    "Intervals are not corrected.",
    "The smallest detectable difference is the true difference that this design, with the spread that was found, would "
    "have seen four times out of five at the 5 % level, tested alone. A claim that is not decided may be true and "
    "smaller than that.",
    "A claim held if all its comparisons are significant the way they were claimed; it did not hold if one is "
    "significant the other way; otherwise it is not decided. What was found holds at this size, on this corpus.",
)
AT_EQUAL_TIME = (
    "A value at equal time of training is that at the training time at which the fastest of the variants compared "
    "ends, by the median seconds a step. A slower variant is then in the middle of its schedule, at a higher learning "
    "rate than at its end."
)


# ----------------------------------------------------------------------------------------------------------------------
# Claims and problems


def _verdicts(verdicts: Sequence[Verdict]) -> list[Block]:
    if not verdicts:
        return [Text("No file in experiments/claims/ names this experiment.")]
    return [_finding(verdict) for verdict in verdicts]


def _finding(verdict: Verdict) -> Finding:
    claim = verdict.claim
    facts = [("source", claim.source), ("tested at", claim.tested_at)]
    table = None
    if verdict.premises or verdict.comparisons:
        columns = [Column("comparison", numeric=False), Column("outcome", numeric=False)]
        columns += [Column("left"), Column("right"), Column("difference", "left − right")]
        columns += [Column(name) for name in ("95 % interval", "p (Holm)", "n")] + [Column("detectable", POWER_NOTE)]
        rows = [_comparison(premise, "given ") for premise in verdict.premises]
        rows += [_comparison(comparison) for comparison in verdict.comparisons]
        table = Table("What decides it", columns, rows)
    return Finding(verdict.outcome, claim.name, claim.sentence, verdict.sentence, facts, table, verdict.problems)


def _comparison(c: Comparison, before: str = "") -> list[Cell]:
    d = c.difference
    return [
        Cell(before + c.text, c.measure),
        Cell(c.outcome, strong=c.outcome != OPEN),
        Cell(written(c.left), key=c.left),
        Cell(written(c.right), key=c.right),
        Cell(written(d.mean), key=d.mean),
        Cell(interval(d.low, d.high), key=d.low),
        Cell(probability(c.p), key=c.p),
        Cell(str(d.n), key=d.n),
        Cell(written(d.detectable), key=d.detectable),
    ]


def _problems(results: Results, facts: dict) -> list[Block]:
    seeds, runs = len(results.experiment.seeds), results.runs
    lines = [f"{run.name}: {run.problem}" for run in runs if run.problem]
    if seeds == 1:
        lines.append("one seed: nothing has an interval, and no difference is tested")
    elif seeds == 2:
        lines.append("two seeds: an interval is 12.7 standard errors to each side, and little can be told from them")
    if str(facts.get("commit")).endswith("-dirty"):
        lines.append(f"the code had changes that commit {str(facts['commit']).removesuffix('-dirty')} does not have")
    if facts.get("earlier"):
        lines.append("it was run more than once, and not all by one commit, machine or day: see How it was made")
    whole = sum(run.problem is None for run in runs)
    text = f"{whole} of {len(runs)} runs are finished and measured."
    return [Text(text), Listing(lines)] if lines else [Text(f"None. {text}")]


# ----------------------------------------------------------------------------------------------------------------------
# At the end of training


def _table(results: Results, shown: Sequence[Measure]) -> list[Block]:
    if not shown:
        none = Text("No run has been trained to its end: there is nothing to show yet.")
        return [none, Download(_csv(results, shown), f"{results.experiment.name}.csv")]
    columns = [Column("variant", numeric=False), Column("n", "seeds")]
    columns += [Column(measure.label, measure.note) for measure in shown]
    timed = _timed(shown)
    columns += [Column("seconds a step", "of training, median over all runs")] * timed
    rows = []
    for variant in results.experiment.variants:
        found = [over_seeds(results, measure.name, variant) for measure in shown]
        n = max((e.n for e in found if e), default=0)
        cells = [Cell(with_interval(e), _fewer(e, n), key=e.mean if e else None) for e in found]
        pace = results.seconds_a_step(variant)
        rows.append([Cell(variant), Cell(str(n), key=n), *cells, *[Cell(written(pace), key=pace)] * timed])
    table = Table("Mean ± half of the 95 % interval over seeds, at the end of training", columns, rows, variants=True)
    return [table, Download(_csv(results, shown), f"{results.experiment.name}.csv")]


def _timed(shown: Sequence[Measure]) -> bool:
    return any(measure.name.endswith("@equal_time") for measure in shown)


def _fewer(found, n: int) -> str:
    """A note of how many seeds a mean is of, where others are of more."""
    return f"n = {found.n}" if found and found.n < n else ""


def _differences(results: Results, shown: Sequence[Measure]) -> list[Block]:
    experiment = results.experiment
    if len(experiment.variants) == 1:
        return [Text("There is one variant alone, and nothing to compare it with.")] if shown else []
    panels, rows = [], []
    for measure in shown:
        if not (found := paired(results, measure.name)):
            continue
        panels.append(charts.differences(measure, found, experiment.variants))
        rows += [
            [
                Cell(variant),
                Cell(measure.full_label),
                Cell(written(d.mean), key=d.mean),
                Cell(interval(d.low, d.high), key=d.low),
                Cell(probability(p), key=p, strong=p is not None and p < 0.05),
                Cell(str(d.n), key=d.n),
                Cell(written(d.detectable), key=d.detectable),
            ]
            for variant, d, p, _ in found
        ]
    if not panels:
        return []
    columns = [Column("variant", numeric=False), Column("measure", numeric=False)]
    columns += [Column(name) for name in ("difference", "95 % interval", "p (Holm)", "n")]
    columns.append(Column("detectable", POWER_NOTE))
    table = Table("Paired differences", columns, rows, variants=True, folded="The differences in figures")
    caption = (
        f"Variant minus {experiment.baseline}, paired by seed, with the 95 % interval and p. A filled mark is a "
        "difference that is significant at 5 % after Holm’s correction over the variants. The ticks below it are the "
        "seeds’ own."
    )
    return [Figure("differences", caption, panels, legend=False, picture=True, table=table)]


def _scatter(results: Results, shown: Sequence[Measure]) -> list[Block]:
    outliers = next((m for m in shown if "kurtosis" in m.name and "@" not in m.name), None)
    loss = next((m for m in shown if m.name in ("val_full/loss", "val/loss")), None)
    if not outliers or not loss or not (panel := charts.scatter(results, outliers, loss)):
        return []
    rows = []
    for run in results.runs:
        x, y = run.last.get(outliers.name), run.last.get(loss.name)
        if x is not None and y is not None:
            seed = run.cell.seed
            rows.append(
                [Cell(run.cell.variant), Cell(str(seed), key=seed), Cell(written(x), key=x), Cell(written(y), key=y)]
            )
    columns = [Column("variant", numeric=False), Column("seed"), Column(outliers.label), Column(loss.label)]
    table = Table("Run by run", columns, rows, variants=True, folded="The runs in figures")
    return [Figure("loss_and_outliers", "A mark a run: every variant and seed.", [panel], table=table)]


# ----------------------------------------------------------------------------------------------------------------------
# Along training


def _training(results: Results) -> list[Block]:
    if not (panels := charts.training_curves(results)):
        return []
    caption, variants = BAND, results.experiment.variants
    if (width := window(results, "train/loss")) > 1:
        caption += f" Each mark of the training loss is the mean of {width} that were logged."
    curves = {v: curve(results, "val/loss", v) for v in variants}
    table = _behind("Validation loss, nats a token", "step", [("", curves)], variants)
    return [Figure("training", caption, panels, picture=True, table=table)]


def _along(results: Results, shown: Sequence[Measure]) -> list[Block]:
    if not (there := along(results, shown)):
        return []
    variants = results.experiment.variants
    panels = charts.along_training(results, there)
    curves = [(measure.label, {v: curve(results, measure.base, v) for v in variants}) for measure in there]
    table = _behind("Along training", "measure, step", curves, variants)
    return [Figure("along", BAND, panels, table=table)]


def _behind(
    caption: str, first: str, curves: Sequence[tuple[str, dict[str, list[Point]]]], variants: Sequence[str]
) -> Table:
    """The table behind curves: a few of their steps."""
    rows = []
    for label, of in curves:
        steps = sorted({point.step for points in of.values() for point in points})
        chosen = sorted(
            {steps[round(i * (len(steps) - 1) / (ROWS_OF_A_CURVE - 1))] for i in range(ROWS_OF_A_CURVE)}
            if steps
            else ()
        )
        for step in chosen:
            at = [next((p.estimate for p in of[v] if p.step == step), None) for v in variants]
            name = ", ".join(filter(None, (label, f"step {step:g}")))
            rows.append([Cell(name), *(Cell(with_interval(e), key=e.mean if e else None) for e in at)])
    columns = [Column(first, numeric=False), *(Column(variant) for variant in variants)]
    return Table(caption, columns, rows, folded="The curves in figures")


def _heads(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for column, meaning in MAPS.items():
        panels, ends = charts.head_maps(results, column, _mean_of_heads)
        if panels:
            blocks.append(_map(results, column, meaning, panels, ends))
    return blocks


def _map(results: Results, column: str, meaning: str, panels: Sequence[Panel], ends: Sequence[float]) -> Figure:
    variants = results.experiment.variants
    means = {v: _mean_of_heads(results.of(v), column) for v in variants}
    places = sorted({place for found in means.values() for place in found})
    rows = [
        [Cell(f"layer {i}, head {j}", key=i * 10**4 + j)]
        + [Cell(written(means[v].get((i, j))), key=means[v].get((i, j))) for v in variants]
        for i, j in places
    ]
    columns = [Column("head", numeric=False), *(Column(v) for v in variants)]
    table = Table(meaning, columns, rows, folded=f"{column} in figures")
    scale = (f"{column}, the mean over seeds: {meaning}", written(ends[0]), written(ends[1]))
    return Figure(f"heads_{column}", "", panels, False, scale, table=table)


def _mean_of_heads(runs: Sequence[Run], column: str) -> dict[tuple[int, int], float]:
    """(layer, head) → the mean of the column over the runs that have it."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        for row in run.heads:
            if isinstance(value := row.get(column), int | float):
                found.setdefault((row["layer"], row["head"]), []).append(value)
    return {place: statistics.fmean(values) for place, values in found.items()}


def _csv(results: Results, shown: Sequence[Measure]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "measure", "value"])
    writer.writerows([variant, seed, name, repr(value)] for variant, seed, name, value in long_form(results, shown))
    return text.getvalue()
