"""`./run_training.sh` once the environment stands: prepare the corpus if need be, train, say what to do next."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from harness.config import Config
from harness.config_files import main_config, parse_overrides
from harness.corpus import is_prepared
from harness.distributed import LAUNCHER
from harness.errors import UserError, run_cli
from harness.machines import Launcher, Machines, machines_of
from harness.signals import TWICE, heeded

PATHS = ("--run.out_dir", "--data.corpus", "--training.init_from", "--kl.reference")  # the options that take one


def main() -> int:
    here = Path(sys.argv[1])
    arguments, restarts = without_max_restarts(sys.argv[2:])
    arguments = as_typed(arguments, here)
    if arguments and Path(arguments[0]).exists() and not Path(arguments[0]).is_file():
        raise UserError(f"{arguments[0]} is no file, as a config has to be: it is read more than once")
    config = main_config(arguments)
    corpus = Path(config.data.corpus)
    gpus = torch.cuda.device_count() if config.training.device in ("auto", "cuda") else 0
    machines = machines_of(os.environ | restarts, gpus, config.training.batch_size)
    checkpoint = config.folder / "ckpt.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None

    def command() -> list[str]:
        """What an attempt runs. A later one goes on with what an earlier one has saved, also of a run that was to begin
        afresh, which the earlier one has begun."""
        saved = checkpoint.exists() and checkpoint.stat().st_mtime_ns != before
        goes_on = ["--training.resume", "auto", "--training.overwrite", "false"] if saved else []
        return [sys.executable, "train.py", *arguments, *(goes_on if config.training.resume == "never" else [])]

    if machines == Machines():
        prepare(corpus)
        status = run(command(), training=True)
    else:
        status = Launcher(machines).run(command, lambda: prepare(corpus))
    if status == 0 and machines.rank == 0 and not config.evaluation.only:
        if checkpoint.stat().st_mtime_ns != before:
            print("\na sample:", flush=True)
            run([sys.executable, "scripts/sample.py", str(checkpoint), "--max_new_tokens", "300"])
        print(next_steps(config, arguments, here))
    return status


def as_typed(arguments: list[str], here: Path) -> list[str]:
    """The command line of a user who stands in the folder `here`, as it has to be in the repository's: the paths in it
    are relative to `here`. One that is only in the repository is taken from there, and that is said."""
    typed = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[i + 1 : i + 2])
        kind, path = ("hf:", value.removeprefix("hf:")) if value.startswith("hf:") else ("", value)
        if option not in PATHS or value in ("", "scratch") or here.samefile("."):
            continue
        if option == "--run.out_dir" or (here / path).exists():
            path = str(here / path)
        elif Path(path).exists():
            print(f"{option} {value}: it is not in {here}, so that in {Path.cwd()} is taken")
        elif not kind:  # nowhere: the error names the place where the user meant it to be
            path = str(here / path)
        typed[i if equals else i + 1] = f"{option}{equals}{kind}{path}" if equals else kind + path
    return typed


def without_max_restarts(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without torchrun's option `--max-restarts N`, which is no key of a config, and N under its name."""
    rest, found, words = [], {}, iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--max-restarts", "--max_restarts"):
            found["--max-restarts"] = value if equals else next(words, "")
            if not found["--max-restarts"]:
                raise UserError(f"{option} takes a number: how often the ranks are started again after a failure")
        else:
            rest.append(word)
    return rest, found


def prepare(corpus: Path) -> None:
    """Run the corpus's prepare.py if that has not been done. SystemExit where a signal stops it."""
    if is_prepared(corpus):
        return
    script = corpus / "prepare.py"
    if not script.exists():
        raise UserError(f"data.corpus: {corpus} has neither a val.bin nor a prepare.py to make one")
    print(f"preparing {corpus}", flush=True)
    if status := run([sys.executable, str(script)]):
        if status - 128 in heeded():
            raise SystemExit(status)
        raise UserError(f"{script} did not prepare {corpus}: run it yourself, python {script} --help says how")


def run(command: list[str], training: bool = False) -> int:
    """The exit status of `command`. Signals are passed on, those too that come while it is being started. A Ctrl-C
    reaches it from the terminal by itself as well: `training` takes the two for one, and any other is ended."""
    children: list[subprocess.Popen] = []
    early: list[int] = []
    interrupted = False

    def pass_on(number: int, _frame) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            interrupted = True
            time.sleep(0.2)  # if the terminal's has reached and ended it, there is nothing to pass on
            number = signal.SIGINT if training else signal.SIGTERM
        if children:
            children[0].send_signal(number)
        else:
            early.append(number)

    former = {number: signal.signal(number, pass_on) for number in heeded()}
    ours = {LAUNCHER: str(os.getpid())} | ({TWICE: "1"} if training else {})
    children.append(subprocess.Popen(command, env=os.environ | ours))
    for number in early:
        children[0].send_signal(number)
    status = children[0].wait()
    for number, handler in former.items():
        signal.signal(number, handler)
    if interrupted and not training:
        return 128 + signal.SIGINT
    return status if status >= 0 else 128 - status


def next_steps(config: Config, arguments: list[str], here: Path) -> str:
    """What to do after a run, in commands that may be pasted where the user stands, in the folder `here`."""
    folder, changed = config.folder, dict(parse_overrides(arguments[1:]))
    c, decay_steps = config.training, config.optimizer.decay_steps
    changed |= {"training.max_steps": 2 * c.max_steps}
    rate = "at min_lr, where the schedule has ended"
    if c.max_steps <= config.optimizer.warmup_steps:
        rate = "while the learning rate still rises, up to warmup_steps"
    elif decay_steps is None:  # else it would follow max_steps, and the rate rise again
        changed |= {"optimizer.decay_steps": c.max_steps}
    elif decay_steps > c.max_steps:
        rate = f"while the learning rate falls to min_lr at step {decay_steps}"
    kept = [
        f"--{k} {shlex.quote(str(v))}" for k, v in changed.items() if k not in ("training.resume", "training.overwrite")
    ]
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "MAX_RESTARTS")
    machines = [f"{name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name)]
    again = " ".join([*machines, "./run_training.sh", shlex.quote(os.path.relpath(arguments[0])), *kept])
    quoted = shlex.quote(str(folder))
    shards = "shards/ (the optimizer's state), " if (folder / "shards").exists() else ""
    leet = ""
    if config.tracking.wandb != "disabled":
        leet = f"\n  wandb leet {quoted}/wandb                    # the curves, in the terminal"
    there = "" if here.samefile(".") else f"  cd {shlex.quote(str(Path.cwd()))}\n"
    return f"""
{folder}/  ckpt.pt (the latest), best.pt (the best on validation), {shards}metrics.jsonl, config.yaml, wandb/

next:
{there}  source {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate
  python scripts/plot_metrics.py {quoted}      # the curves, as a PNG{leet}
  python scripts/sample.py {quoted}/ckpt.pt    # text from the model
  python scripts/activation_kurtosis.py {quoted}/ckpt.pt    # the outliers; the README has the other diagnostics
  {again}    # train on, {rate}"""


if __name__ == "__main__":
    sys.exit(run_cli(main))
