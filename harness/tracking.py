"""Curves: metrics.jsonl always, wandb beside it, and the progress that a person watches."""

import contextlib
import json
import logging
import math
import os
import secrets
import struct
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.config import Config
from harness.config_files import load_config
from harness.errors import UserError
from harness.files import flush, write_text


class Tracker:
    """Writes a run's metrics: one JSON object a line, each step once, and the same to wandb.

    A resume from step s removes the lines beyond s, since those steps are run again. From wandb nothing can be removed,
    so what it has is not sent again, and what it lacks of the lines up to s is: a process that is killed takes with it
    what wandb had not written yet. `wandb/run.json` keeps the run's id, under which every resume continues. Whatever
    happens to wandb in the meantime, the run goes on.
    """

    def __init__(self, folder: Path, config, resume_step: int | None):
        self.path = folder / "metrics.jsonl"
        kept = read_metrics(self.path, resume_step) if resume_step is not None else []
        last = kept[-1]["step"] if kept else 0
        if resume_step is not None and resume_step - last >= config.tracking.log_interval:
            print(
                f"warning: {self.path} ends at step {last}, the checkpoint is of step {resume_step}: lines are missing"
            )
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self._unwritten = b""  # what a full disk has had no room for

        run_id = known_id(folder) or secrets.token_hex(4)
        try:
            (folder / "wandb").mkdir(exist_ok=True)
            write_text(folder / "wandb" / "run.json", json.dumps({"id": run_id}))
        except OSError as e:
            print(f"wandb: {folder}/wandb cannot be written ({e.strerror}): a resume may be another run there")
        self._run = start_wandb(folder, run_id, config.run.name, config.tracking, config.to_dict())
        if not self._run:
            print("wandb: disabled; the curves are in", self.path)
            return
        self._stored: Collection[int] = range(self._run.starting_step)  # what the server has
        if self._run.offline:
            self._stored = stored_steps(folder, run_id)
        self._sent = 0
        for line in kept:
            self._send(line["step"], {k: v for k, v in line.items() if k != "step"})

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """One line for `step`; a value that is not finite is written as null. What a full disk has no room for is
        written with one of the next lines, or by `sync`."""
        finite = {k: v if v is not None and abs(v) < float("inf") else None for k, v in metrics.items()}
        waiting = bool(self._unwritten)
        self._unwritten += (json.dumps({"step": step} | finite, allow_nan=False) + "\n").encode()
        try:
            self._write()  # before wandb's, so that a resume finds here every step that wandb has seen
        except OSError as e:
            if not waiting:
                tqdm.write(f"warning: {self.path} cannot be written at step {step} ({e.strerror}): tried again later")
        self._send(step, finite)

    def sync(self) -> None:
        """Return once every line is on the disk, as it has to be before a checkpoint of its step is. OSError if that
        cannot be."""
        try:
            self._write()
            flush(self.path)
        except OSError as e:
            e.filename = str(self.path)  # a full disk does not say where
            raise

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _send(self, step: int, metrics: dict[str, float | None]) -> None:
        if self._run and step not in self._stored:
            finite = {k: v for k, v in metrics.items() if v is not None}
            self._try(lambda run: run.log(finite, step=step, commit=True))
            self._sent += 1

    def close(self) -> None:
        self.sync()
        self._file.close()
        self._try(lambda run: run.finish())
        if self._run and self._run.offline:  # whose service does not say that its disk is full
            for _ in range(40):  # it may write for some time after it has said that it is done
                if not (lacking := len(self._stored) + self._sent - len(stored_steps(self.path.parent, self._run.id))):
                    break
                time.sleep(0.25)
            if lacking:
                problem = f"lacks {lacking} steps, its disk may be full; a resume would send them"
                print(f"wandb: {self.path.parent}/wandb {problem}. The curves are in {self.path}")

    def _try(self, call) -> None:
        """`call(run)` for the run on wandb, unless an earlier call has failed."""
        try:
            if self._run:
                call(self._run)
        except Exception as e:  # its service may be killed, its folder be removed, its disk be full
            self._run = None
            with contextlib.suppress(Exception):  # else its own end, when this process ends, fails with a traceback
                sys.modules["wandb"].teardown()
            why = " ".join(str(e).split()) or type(e).__name__
            tqdm.write(f"wandb: stopped: {why}; training goes on, the curves are in {self.path}")


def read_metrics(path: Path, last: int) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the step `last`; none where there is no file. A last line that a kill has cut
    off is left out: its step is run again. UserError for any other line that is not as it was written."""
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for number, text in enumerate(texts, 1):
        if lines and lines[-1]["step"] >= last:  # all that follows is run again
            break
        try:
            line = json.loads(text)
            if not line["step"] > (lines[-1]["step"] if lines else -1):
                raise ValueError("its step is not beyond the one before")
        except (ValueError, KeyError, TypeError, RecursionError) as e:  # no UTF-8, no JSON, or JSON of something else
            if number == len(texts):
                break
            problem = f"{path}, line {number} is not what was written ({e}): nothing was changed"
            raise UserError(f"{problem}. Mend that line, or remove it, and run this again") from e
        if line["step"] > last:
            break
        lines.append(line)
    return lines


def start_wandb(folder: Path, run_id: str, name: str | None, tracking, config: dict):
    """The wandb run of that id, begun or continued, in `folder`; None if wandb is disabled or cannot start. Says which
    in one line. UserError where the config wants it online and that cannot be."""
    mode, reason = wandb_mode(tracking)
    if mode == "disabled":
        return None
    logging.raiseExceptions = False  # else a full disk gives a traceback for each line of wandb's log

    def start(mode: Any):
        import wandb  # here: it takes a second

        return wandb.init(
            mode=mode,
            dir=folder,
            project=tracking.project,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            # What is not flushed yet is lost where the process is killed; by default that is 15 seconds.
            # Nor may a server that does not answer hold up the run: by default it is waited for 90 seconds at the start
            # and, at the end, until it has everything. What it lacks then is in the folder, for `wandb sync`.
            settings=wandb.Settings(
                silent=mode == "offline",
                console="off",
                x_transaction_log_flush_interval=1,
                init_timeout=90 if tracking.wandb == "online" else 20,
                finish_timeout=60,
                finish_timeout_raises=True,
            ),
        )

    try:
        if mode == "auto":
            import wandb

            wandb.setup(wandb.Settings(silent=True))
            logged_in = wandb.login(prompt=False)
            mode, reason = ("online", "logged in") if logged_in else ("offline", "not logged in")
        run = start(mode)
    except Exception as e:  # no network, a stale key, no wandb, a variable that it does not understand: not worth a run
        if tracking.wandb == "online":
            raise UserError(f"tracking.wandb: online: {e}; auto would go on without it") from e
        mode, reason = "offline", f"cannot go online: {e}"
        with contextlib.suppress(Exception):  # there may be no wandb
            sys.modules["wandb"].teardown()  # else its service still holds the run that could not start
        try:
            run = start(mode)
        except Exception as e:
            print(f"wandb: cannot start: {' '.join(str(e).split())}")
            return None
    print(f"wandb: {mode} ({' '.join(reason.split())}), run {run_id} in {folder}/wandb")
    return run


def wandb_mode(tracking) -> tuple[str, str]:
    """auto, online, offline or disabled; and what says so. What wandb would stumble over in its variables is mended: a
    value without the blanks around it is what was meant, an empty one says nothing, and a mode that does not exist may
    have been meant to keep the run to itself."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        if value := os.environ[name].strip():
            os.environ[name] = value
        else:
            del os.environ[name]
    if tracking.wandb != "auto" or "WANDB_MODE" not in os.environ:
        return tracking.wandb, "as configured"
    wanted = os.environ["WANDB_MODE"]
    modes = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    os.environ["WANDB_MODE"] = modes.get(wanted.lower(), "offline")
    known = wanted.lower() in modes
    return os.environ["WANDB_MODE"], "WANDB_MODE" if known else f"WANDB_MODE={wanted} is no mode of wandb's"


def known_id(folder: Path) -> str | None:
    """The id of the run in `folder`: that of wandb/run.json or, where this cannot be read, of wandb's own files."""
    try:
        return json.loads((folder / "wandb" / "run.json").read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return next((file.stem.removeprefix("run-") for file in folder.glob("wandb/*/run-*.wandb")), None)


def stored_steps(folder: Path, run_id: str) -> set[int]:
    """The steps of that run in wandb's files in `folder`, as far as these can be read. They are logs in LevelDB's
    format: a header of 7 bytes, then blocks of 32 KiB with chunks of records; a chunk is a checksum (4 bytes), a length
    (2), a kind (1: a whole record, 2, 3, 4: its first, middle and last part) and the data."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # protobuf makes it at import

    steps = set()
    for file in folder.glob(f"wandb/*/run-{run_id}.wandb"):
        content, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            left = 32768 - at % 32768
            length, kind = struct.unpack_from("<HB", content, at + 4)
            if left < 7 or not kind:  # the rest of the block is padding
                at += left
                continue
            record = (record if kind in (3, 4) else b"") + content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4) and at <= len(content):
                with contextlib.suppress(Exception):  # torn by a kill
                    parsed = Record.FromString(record)
                    steps |= {parsed.history.step.num} if parsed.HasField("history") else set()
    return steps


def wandb_run(folder: Path) -> tuple[str, Config]:
    """The id and the config of the run that trained the checkpoint in `folder`; UserError where there is none, or where
    wandb is disabled."""
    if (run_id := known_id(folder)) is None:
        raise UserError(f"--wandb: {folder} has no wandb/run.json, so its run on wandb is not known; leave --wandb out")
    config = load_config([str(folder / "config.yaml")])
    if wandb_mode(config.tracking)[0] == "disabled":
        raise UserError(f"--wandb: {folder}/config.yaml or WANDB_MODE disables wandb; leave --wandb out")
    return run_id, config


def log_diagnostic(folder: Path, name: str, summary: Mapping[str, float | None], picture: Path) -> None:
    """Add a diagnostic's summary and picture to the wandb run that trained the checkpoint in `folder`."""
    run_id, config = wandb_run(folder)
    latest = folder / "wandb" / "latest-run"
    training = os.readlink(latest) if latest.is_symlink() else None
    run = start_wandb(folder, run_id, config.run.name, config.tracking, config.to_dict())
    if run is None:
        return
    import wandb

    finite = {key: value for key, value in summary.items() if value is not None and math.isfinite(value)}
    run.summary.update({f"{name}/{key}": value for key, value in finite.items()})
    run.summary[f"{name}/picture"] = wandb.Image(str(picture))
    run.finish()
    if training:  # what `wandb leet` opens: the curves, not this part of the run, which has none
        latest.unlink(missing_ok=True)
        latest.symlink_to(training)


def watched(batches: Sequence | np.ndarray, what: str, shown: bool = True) -> Iterator:
    """Each of the batches, under a bar of their own on a terminal; elsewhere with a line every 10 seconds."""
    bar = shown and sys.stderr.isatty()
    last = perf_counter()
    for done, batch in enumerate(tqdm(batches, desc=what, unit="batch", leave=False, disable=not bar)):
        if shown and not bar and perf_counter() - last > 10:
            print(f"{what}: {done} of {len(batches)} batches", flush=True)
            last = perf_counter()
        yield batch


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
