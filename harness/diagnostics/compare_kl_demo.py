"""Why a mean hides outliers, on 60 made-up positions, without a checkpoint: `compare_kl.py --demo`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.diagnostics import Result, entry, write_json
from harness.diagnostics.compare_kl import DIAGNOSTIC, check_tau
from harness.figures import RUN_STYLES, new_figure, print_table, save_figure
from harness.files import check_folder
from measure.divergence import AGGREGATES
from measure.predictions import DIVERGENCES, aggregates, divergences, hinge, hinge_sentence


def demo(argv: list[str]) -> None:
    """Two students of one teacher on 60 positions: one coherently shifted, one caught in a loop at four of them."""
    parser = argparse.ArgumentParser(prog="scripts/compare_kl.py", description=demo.__doc__)
    parser.add_argument("--demo", action="store_true", required=True, help="this one, which takes no checkpoint")
    parser.add_argument("--tau", type=float, default=0.5, metavar="T", help="where the hinge stands; default: 0.5")
    parser.add_argument("--out", type=Path, default=Path("out") / DIAGNOSTIC.name, metavar="DIR", help="%(default)s")
    args = parser.parse_args(argv)
    check_folder(args.out)
    check_tau(args.tau)
    teacher, students = demo_logits()
    values = {name: divergences(teacher, logits, order=0.5)[0] for name, logits in students.items()}
    of_student = {name: aggregates(v) for name, v in values.items()}
    rows = []
    for coherent, loop in zip(*of_student.values(), strict=True):
        ratio = {how: loop[how] / coherent[how] for how in AGGREGATES}
        for student, numbers in (("coherent", coherent), ("loop", loop), ("loop / coherent", ratio)):
            rows.append(
                {"divergence": coherent["divergence"], "student": student, **{h: numbers[h] for h in AGGREGATES}}
            )
    print_table([row | {h: f"{row[h]:.6f}" for h in AGGREGATES} for row in rows], list(rows[0]))
    sentences = [f"{name}: {hinge_sentence(table, args.tau)}" for name, table in of_student.items()]
    print("\n" + "\n".join(sentences))
    reverse = {name: v[list(DIVERGENCES).index("kl_reverse")] for name, v in values.items()}
    tables = {
        "by_position": [
            {"position": t, **{name: v[t].item() for name, v in reverse.items()}} for t in range(len(teacher))
        ],
        "hinge": [{"student": name, **row} for name, table in of_student.items() for row in hinge(table, args.tau)],
    }
    result = Result(rows, {"tau": args.tau, "positions": len(teacher)}, sentences, tables)
    demo_entry = entry(DIAGNOSTIC.name, None, result) | {"arguments": {"demo": True, "tau": args.tau}}
    written = [
        write_json(args.out / f"{DIAGNOSTIC.name}.json", [demo_entry]),
        save_figure(draw_demo(reverse, of_student, args.tau), args.out / f"{DIAGNOSTIC.name}.png"),
    ]
    print("\nwritten: " + ", ".join(map(str, written)))


def demo_logits() -> tuple[Tensor, dict[str, Tensor]]:
    """(60, 200) each: the teacher's, and those of the two students."""
    teacher = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 200)))
    order = teacher.softmax(-1).mean(0).argsort()
    coherent, loop = teacher.clone(), teacher.clone()
    coherent[:, order[100]] += 1.6
    loop[12:16] = -10.0
    loop[12:16, order[3]] = 12.0
    return teacher, {"coherent": coherent, "loop": loop}


def draw_demo(reverse: dict[str, Tensor], of_student: dict[str, list[dict]], tau: float) -> Figure:
    figure, (left, right) = new_figure(1, 2)
    for (name, values), style in zip(reverse.items(), RUN_STYLES, strict=False):
        left.plot(values, label=name, **style | {"marker": ""})
        row = next(r for r in of_student[name] if r["divergence"] == "kl_reverse")
        right.plot(AGGREGATES, [row[how] for how in AGGREGATES], label=name, **style | {"linestyle": ""})
    left.set(title="two students, by position", xlabel="position, from 0", ylabel="KL(student‖teacher), nats")
    left.set_yscale("symlog", linthresh=1e-3)  # not "log": the looping student's KL is 0 elsewhere
    right.axhline(tau, color="#777777", linewidth=0.8)
    right.text(-0.4, tau, f"τ = {tau:g}", va="bottom", fontsize=7.5, color="#444444")
    right.set(title="the mean is blind", yscale="log", ylabel="KL(student‖teacher), nats", xlim=(-0.5, 3.5))
    for ax in (left, right):
        ax.legend()
    return figure
