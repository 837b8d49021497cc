"""Curves: metrics.jsonl always, wandb beside it, and the progress that a person watches."""

import json
import math
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.config import Config, load_config
from harness.errors import UserError
from harness.files import write_text


class Tracker:
    """Writes a run's metrics: one JSON object a line, each step once, and the same to wandb.

    A resume from step s removes the lines beyond s, since those steps are run again. From wandb nothing can be removed,
    so steps that it has already seen are not sent again: `wandb/run.json` keeps the run's id, under which every resume
    continues, and the last step sent.
    """

    def __init__(self, folder: Path, config, resume_step: int | None):
        self.path = folder / "metrics.jsonl"
        lines = self._read()
        self._wandb_state = folder / "wandb" / "run.json"
        state = json.loads(self._wandb_state.read_text()) if self._wandb_state.exists() else {}
        self._wandb_id = state.get("id") or secrets.token_hex(4)
        self._wandb_seen = max([state.get("last_step", -1)] + [line["step"] for line in lines])
        self._wandb_state.parent.mkdir(exist_ok=True)
        write_text(self._wandb_state, json.dumps({"id": self._wandb_id, "last_step": self._wandb_seen}))

        kept = [line for line in lines if resume_step is not None and line["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._run = start_wandb(folder, self._wandb_id, config.run.name, config.tracking, config.to_dict())
        if not self._run:
            print("wandb: disabled; the curves are in", self.path)

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the last line, cut off by a kill: its step is run again
                break
        return lines

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """One line for `step`; a value that is not finite is written as null."""
        finite = {k: v if v is not None and abs(v) < float("inf") else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        self._file.flush()  # before wandb's, so that a resume finds here every step that wandb has seen
        if self._run and step > self._wandb_seen:
            self._run.log({k: v for k, v in finite.items() if v is not None}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._run:
            self._run.finish()


def start_wandb(folder: Path, run_id: str, name: str | None, tracking, config: dict):
    """The wandb run of that id, begun or continued, in `folder`; None if wandb is disabled. Says which in one line."""
    mode, reason = wandb_mode(tracking)
    if mode == "disabled":
        return None
    import wandb  # here: it takes a second

    def start(mode: Any):
        return wandb.init(
            mode=mode,
            dir=folder,
            project=tracking.project,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            settings=wandb.Settings(silent=mode == "offline", console="off"),
        )

    try:
        if mode == "auto":
            wandb.setup(wandb.Settings(silent=True))
            logged_in = wandb.login(prompt=False)
            mode, reason = ("online", "logged in") if logged_in else ("offline", "not logged in")
        run = start(mode)
    except wandb.errors.Error as e:  # no network, a stale key: not worth a run
        if tracking.wandb != "auto":
            raise UserError(f"tracking.wandb: {mode}: {e}; auto would fall back to offline") from e
        mode, reason = "offline", f"cannot go online: {e}"
        run = start(mode)
    print(f"wandb: {mode} ({' '.join(reason.split())}), run {run_id} in {folder}/wandb")
    return run


def wandb_mode(tracking) -> tuple[str, str]:
    """auto, online, offline or disabled; and what says so."""
    if tracking.wandb == "auto" and "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"], "WANDB_MODE"
    return tracking.wandb, "as configured"


def wandb_run(folder: Path) -> tuple[str, Config]:
    """The id and the config of the run that trained the checkpoint in `folder`; UserError where there is none, or where
    wandb is disabled."""
    state = folder / "wandb" / "run.json"
    if not state.exists():
        raise UserError(f"--wandb: {folder} has no wandb/run.json, so its run on wandb is not known; leave --wandb out")
    config = load_config([str(folder / "config.yaml")])
    if wandb_mode(config.tracking)[0] == "disabled":
        raise UserError(f"--wandb: {folder}/config.yaml or WANDB_MODE disables wandb; leave --wandb out")
    return json.loads(state.read_text())["id"], config


def log_diagnostic(folder: Path, name: str, summary: Mapping[str, float | None], picture: Path) -> None:
    """Add a diagnostic's summary and picture to the wandb run that trained the checkpoint in `folder`."""
    run_id, config = wandb_run(folder)
    run = start_wandb(folder, run_id, config.run.name, config.tracking, config.to_dict())
    import wandb

    finite = {key: value for key, value in summary.items() if value is not None and math.isfinite(value)}
    run.summary.update({f"{name}/{key}": value for key, value in finite.items()})
    run.summary[f"{name}/picture"] = wandb.Image(str(picture))
    run.finish()


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a plain line now and then."""

    def __init__(self, total: int, done: int):
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._total = total

    def step(self) -> None:
        self._bar.update()

    def report(self, step: int, loss: float, tokens_per_second: float, seconds_a_step: float) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s")
            return
        left = int((self._total - step) * seconds_a_step)
        self.say(
            f"step {step}/{self._total}: loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        tqdm.write(text) if not self._bar.disable else print(text, flush=True)

    def close(self) -> None:
        self._bar.close()
