"""What a run starts from: its own checkpoint, which it resumes, another's weights, or fresh ones.

Everything here only reads, and raises a UserError, naming the key, where the config, the checkpoint and the corpus do
not fit together; train.py writes nothing before all of it has passed.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import (
    assign_weights,
    build_model,
    check_finite,
    feedback_of,
    in_own_memory,
    is_mapping,
    load_model,
    parameter_count,
    read_checkpoint,
    without_weights,
)
from harness.config import Config
from harness.corpus import Corpus
from harness.distributed import Ranks
from harness.errors import UserError
from harness.kl_training import Reference
from harness.parallel import like, own_part
from harness.runfolder import check_kinds, run_files
from harness.tokenizer import different_tokenizers
from kernels.backends import FLOATS
from measure.feedback import apply_feedback
from model import GPT, NORMALIZERS, GPTConfig

# Keys that say how far and where a run goes, how often it looks and where it writes: not which run it is.
# Of a corpus and a reference the content is compared.
_HOW = re.compile(
    r"(evaluation|tracking)\..*|data\.corpus|kl\.reference|"
    r"training\.(max_steps|checkpoint_interval|keep_interval|micro_batch_size|device|compile|"
    r"parallel|checkpoint_activations|nonfinite_limit|deterministic)"
)
_WHERE = (
    "run.name",
    "run.out_dir",
    "training.resume",
    "training.overwrite",
)  # these may change: they say where a checkpoint is found

_FREE = {f.name for f in dataclasses.fields(GPTConfig) if f.metadata.get("free")}  # with init_from, chosen anew

AS_INIT_FROM = "it can only start a run of another name, as its init_from"


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and not math.isnan(x)


# Keys that only a resume reads → whether a value is of the right kind; checkpoint.py has those of every checkpoint.
_SCALER = torch.amp.GradScaler("cpu").state_dict().keys()
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "best_val_loss": _is_number,
    "scaler": lambda x: is_mapping(x, int | float) and (not x or (x.keys() == _SCALER and min(x.values()) >= 0)),
    "skipped": lambda x: is_mapping(x, int) and x.keys() == {"total", "in_a_row"} and min(x.values()) >= 0,
    "corpus": lambda x: all(isinstance(x.get(key), str) for key in ("folder", "sha256")),
}


def checkpoint_to_resume(config: Config) -> dict | None:
    """The checkpoint that this run continues from, or that is evaluated; None for `init_from` or a fresh start."""
    c = config.training
    path = config.folder / "ckpt.pt"
    if c.resume == "never":
        present = run_files(config.folder)
        if present and not (c.overwrite or config.evaluation.only):
            problem = (
                f"{config.folder} already holds a run ({', '.join(present)}): give another run.name, "
                "or --training.overwrite true to replace it"
            )
            raise config.error("training.resume", problem)
        return None
    if not config.evaluation.only:
        check_kinds(config.folder)
    if path.exists():
        checkpoint = read_checkpoint(path)
        needed = ("step", "optimizer", "scaler", "best_val_loss", "config", "corpus", "machine")
        lacking = [key for key in needed if key not in checkpoint]
        wrong = [key for key, fits in _CHECKS.items() if key in checkpoint and not fits(checkpoint[key])]
        if lacking or wrong:
            problem = f"has no {', '.join(lacking)}" if lacking else f"has a {wrong[0]} that no run has written"
            raise config.error("training.resume", f"{path} {problem}: {AS_INIT_FROM}")
        former = checkpoint["config"].get("training", {}).get("init_from", "scratch")
        if config.evaluation.only and c.init_from not in ("scratch", former):
            return None  # not where this run once started from: other weights, asked for by name
        return checkpoint
    if c.resume == "must":
        raise config.error("training.resume", f"there is no {path} to resume")
    best = config.folder / "best.pt"  # that of step 0 alone is left by a kill just before the first ckpt.pt
    if best.exists() and not config.evaluation.only and read_checkpoint(best).get("step") != 0:
        problem = f"{config.folder} holds a best.pt but no ckpt.pt to go on from: give another run.name"
        raise config.error("training.resume", problem)
    return None


def initial_model(config: Config, corpus: Corpus, checkpoint: dict | None, say=print) -> GPT:
    """The GPT of the checkpoint being resumed, or of `init_from`, or a new one.

    With `init_from`, model keys that the config leaves out are taken from there, and those that it sets have to agree.
    """
    init_from = config.training.init_from
    scratch = config.model.gpt_config(corpus.vocab_size)
    feedback, before = config.training.feedback, feedback_of(checkpoint or {}, config.folder / "ckpt.pt")[0]
    if (how := before if feedback == "backprop" else feedback) != "backprop" and scratch.tie_embeddings:
        say(f"tie_embeddings true → false: with feedback {how} the head has weights of its own")
        scratch = dataclasses.replace(scratch, tie_embeddings=False)
    if not checkpoint and init_from == "scratch":
        if config.evaluation.only:
            raise config.error("evaluation.only", f"no {config.folder}/ckpt.pt and no training.init_from to evaluate")
        try:
            needed, there = 4 * parameter_count(scratch), free_memory()
        except ValueError as e:
            raise config.error("model.n_embd", str(e)) from e
        if there is not None and needed > there:
            problem = f"its weights alone take {needed / 1e9:,.1f} GB, and {there / 1e9:,.1f} GB of memory are free"
            raise config.error("model.n_embd", f"{problem}: make the model smaller")
        return with_feedback(GPT(scratch), config, {}, say)

    source = config.folder / "ckpt.pt" if checkpoint else init_from
    model, info = (build_model(checkpoint, source), checkpoint) if checkpoint else load_model(source)
    if differ := different_tokenizers(info.get("corpus", {}), corpus.meta):
        problem = f"{source} was trained with tokenizer {differ[0]}, {corpus.folder} has {differ[1]}"
        key = "data.corpus" if checkpoint else "training.init_from"
        raise config.error(key, f"{problem}: prepare the corpus with the checkpoint's tokenizer")
    check_finite(model, source)
    if feedback != "backprop" and model.config.tie_embeddings:
        if checkpoint:
            problem = f"{feedback} takes a head of its own, and that of {source} is the embedding"
            raise config.error("training.feedback", f"{problem}: start a run of another name with it as init_from")
        say(f"the head begins as a copy of the embedding, which it is in {source}")
        untie_head(model)
    found, wanted = model.config.resolved(), scratch.resolved()
    if init_from != "scratch":
        wanted = {
            k: v for k, v in wanted.items() if f"model.{k}" in config.sources and vars(config.model)[k] is not None
        }
    # A fine-tuning may choose these anew; rotary positions reach as far as one likes. What a normalizer has learned
    # stays while the normalizer does, wherever it was to start.
    free = set() if checkpoint else _FREE
    free = free | {"block_size"} if not checkpoint and model.config.position == "rope" else free
    forgotten = model.normalizer_parameters()
    if wanted.get("normalizer", found["normalizer"]) == found["normalizer"] and forgotten:
        free, forgotten = free - {"sink_init", "ssmax_init"}, {}
    implied = [k for k in found if getattr(model.config, k) is None and getattr(scratch, k) is None]  # by other keys
    differing = [k for k, v in wanted.items() if k not in free and k not in implied and v != found[k]]
    if not checkpoint and "block_size" in differing and wanted["block_size"] < found["block_size"]:
        crop_block_size(model, wanted["block_size"])
        differing.remove("block_size")
    if differing:
        listed = ", ".join(f"{k} is {wanted[k]} in the config and {found[k]} in the checkpoint" for k in differing)
        raise config.error(f"model.{differing[0]}", f"the model differs from {source}: {listed}")
    chosen = with_context(model.config, wanted.get("block_size", model.config.block_size))
    chosen = dataclasses.replace(chosen, **{k: wanted[k] for k in free if k in wanted})
    key = {"sigmoid": "sigmoid_bias", "clipped": "clipped_alpha"}.get(chosen.normalizer, "")
    if key and key not in wanted and getattr(chosen, key) != getattr(scratch, key) and not checkpoint:
        say(f"model.{key} is {getattr(chosen, key):g}, as it is in {source}, whose context is {found['block_size']}")
    weights, rebuilt = model.state_dict(), without_weights(chosen)
    if chosen.normalizer != model.config.normalizer:  # what one normalizer has learned says nothing to another
        starts = NORMALIZERS[chosen.normalizer].parameters
        weights = {name: x for name, x in weights.items() if name not in forgotten}
        weights |= {name: starts[name.rpartition(".")[2]](chosen) for name in rebuilt.normalizer_parameters()}
        if forgotten:
            say(f"what {source} has learned for its normalizer, {model.config.normalizer}, is left out")
    model = assign_weights(rebuilt, weights)  # in the same memory: there is never a second model
    return with_feedback(model, config, checkpoint or {}, say)


def first_shape(config: Config) -> GPTConfig:
    """Of the model that a new run starts with: the config's own, or its init_from's with what it may choose anew."""
    if config.training.init_from != "scratch":
        found = load_model(config.training.init_from)[0].config
        given = {k: v for k, v in vars(config.model).items() if f"model.{k}" in config.sources and v is not None}
        size = given.get("block_size", found.block_size)
        found = with_context(found, size if found.position == "rope" else min(size, found.block_size))
        return dataclasses.replace(found, **{k: given[k] for k in _FREE & given.keys()})
    try:
        return config.model.gpt_config(config.model.vocab_size or Corpus(config.data.corpus, ()).vocab_size)
    except UserError as error:
        raise UserError(f"{error}; or say how many ids it will have, by --model.vocab_size") from error


def free_memory() -> int | None:
    """The bytes that this machine, or the container that this process is in, could give without swapping; None where
    neither says."""
    known = []
    with contextlib.suppress(OSError):
        known += [1024 * int(n) for n in re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())]
    with contextlib.suppress(OSError, ValueError):  # the latter where it is "max"
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=None)


def with_feedback(model: GPT, config: Config, checkpoint: dict, say) -> GPT:
    """The model with the config's feedback: with the matrices of the checkpoint being resumed, or, where that was
    trained by another feedback, or nothing is resumed, with matrices drawn from run.seed."""
    how, before = config.training.feedback, feedback_of(checkpoint, config.folder / "ckpt.pt")
    if checkpoint and how != before[0]:
        say(f"feedback {before[0]} → {how}" + (": its matrices are drawn anew" if how in ("fa", "dfa") else ""))
    matrices = before[1] if how == before[0] else None
    try:
        return apply_feedback(model, how, config.run.seed, matrices)
    except ValueError as e:
        raise UserError(f"{config.folder}/ckpt.pt is not whole: {e}") from e


def untie_head(model: GPT) -> None:
    """Give the head weights of its own, a copy of the token embedding, with which it was one."""
    model.config = dataclasses.replace(model.config, tie_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())


def with_context(config: GPTConfig, block_size: int) -> GPTConfig:
    """The same model for another context. What its normalizer takes from the context stays as it was: its weights were
    trained with that."""
    kept: dict[str, Any] = {"block_size": block_size}
    if config.normalizer == "sigmoid":
        kept["sigmoid_bias"] = config.resolved()["sigmoid_bias"]
    if config.normalizer == "clipped" and config.clipped_by == "context":
        kept["clipped_alpha"] = config.clipped_alpha * block_size / config.block_size
    return dataclasses.replace(config, **kept) if block_size != config.block_size else config


def crop_block_size(model: GPT, block_size: int) -> None:
    """Shorten the context, dropping the later positions. ValueError if it would grow."""
    if not 1 <= block_size <= model.config.block_size:
        raise ValueError(f"cannot crop block_size {model.config.block_size} to {block_size}")
    model.config = with_context(model.config, block_size)
    if model.config.position == "learned":
        model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:block_size].clone())
        model.transformer.wpe.num_embeddings = block_size


def check_resume(config: Config, checkpoint: dict, corpus: Corpus, reference: Reference | None, machine, say) -> None:
    """Print at which step the run goes on and what has changed since the checkpoint, or that it is finished. UserError
    if the corpus or the reference has changed or, of a finished run, any key that made it what it is."""
    if checkpoint["corpus"]["sha256"] != corpus.sha256:
        problem = (
            f"{config.folder}/ckpt.pt was trained on other text ({checkpoint['corpus']['folder']}, sha256 "
            f"{checkpoint['corpus']['sha256'][:12]}…, not {corpus.sha256[:12]}…): start a run of another name, "
            "with --training.init_from if its weights are to be kept"
        )
        raise config.error("data.corpus", problem)
    then, now = checkpoint.get("reference"), reference.identity if reference else None
    if (then and then["sha256"]) != (now and now["sha256"]):
        former, present = (f"{r['path']} (sha256 {r['sha256'][:12]}…)" if r else "no reference" for r in (then, now))
        problem = (
            f"{config.folder}/ckpt.pt was trained beside {former}, not {present}: start a run of another name, "
            "with --training.init_from if its weights are to be kept"
        )
        raise config.error("kl.reference", problem)
    before_by_default = Config().to_dict()  # what a key that a checkpoint is older than stood for
    changed = {}
    for section, entries in config.to_dict().items():
        for key, value in entries.items():
            before = checkpoint["config"].get(section, {}).get(key, before_by_default[section][key])
            if section != "model" and f"{section}.{key}" not in _WHERE and before != value:
                changed[f"{section}.{key}"] = f"{section}.{key} {before} → {value}"
    if "optimizer.name" in changed:
        problem = (
            f"{config.folder}/ckpt.pt holds the state of another optimizer ({changed['optimizer.name']}): start a run "
            "of another name, with --training.init_from if its weights are to be kept"
        )
        raise config.error("optimizer.name", problem)
    step, max_steps = checkpoint["step"], config.training.max_steps
    if step >= max_steps:
        other = [key for key in changed if not _HOW.fullmatch(key)]
        if "training.max_steps" in changed and config.optimizer.decay_steps is None:
            other.append("training.max_steps")  # the learning rate fell to its least at another step
        if other:
            problem = (
                f"{config.folder} is finished, at step {step}, and is of another config: "
                f"{', '.join(changed[key] for key in other)}. Give another run.name, or raise --training.max_steps to "
                "go on from there with the changed config"
            )
            raise config.error(other[0], problem)
        done = (
            f"step {step} of {max_steps}" if step == max_steps else f"at step {step}, training.max_steps is {max_steps}"
        )
        say(f"{config.folder} is finished: {done}. For more, raise --training.max_steps.")
        return
    say(f"resuming {config.folder} from step {step}")
    if changed:
        say(f"changed since the checkpoint: {', '.join(changed.values())}")
    for name, here in machine.items():
        if (before := checkpoint["machine"].get(name)) != here:
            say(f"warning: {name}: {before} then, {here} now: the losses will agree to rounding only, not bit for bit")


def best_so_far(config: Config, checkpoint: dict, windows: int, say) -> float:
    """The validation loss of best.pt, which the next ones have to beat; infinite, and said, where best.pt is lost or
    was measured on other windows. `windows`: how many the whole validation set has."""

    def measured(values: dict) -> str:
        batches = values["evaluation"]["batches"]
        count = windows if batches == "full" else min(windows, batches * values["training"]["batch_size"])
        return f"{count} validation windows" + " of documents" * (values["data"].get("windows") == "documents")

    try:
        best = read_checkpoint(config.folder / "best.pt")
        loss, then = best["best_val_loss"], measured(config.to_dict() | best["config"])
        if not _is_number(loss):
            raise UserError(f"its best_val_loss is {loss!r:.20}")
    except (UserError, KeyError, TypeError) as e:
        if checkpoint["best_val_loss"] < math.inf:
            say(f"best.pt starts anew with the next evaluation: {e}")
        return math.inf
    if then != (now := measured(config.to_dict())):
        say(f"best.pt starts anew with the next evaluation: it is of {then}, not of {now}")
        return math.inf
    return loss


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any],
    path: Path = Path("ckpt.pt"),
    ranks: Ranks | None = None,
) -> None:
    """Give `optimizer` the state that the checkpoint's, read from `path`, had, sharded or not. Only the state: the
    learning rate and the other hyperparameters are the config's, which may have changed since. UserError unless it is
    that of these parameters, each in memory of its own, since the fused steps look at nothing but where a tensor
    begins."""
    saved, found, taken = checkpoint["optimizer"].get("state"), {}, set[int]()
    if "shards" in checkpoint:
        from harness.sharded import optimizer_state  # here: what it imports takes half a second

        saved = optimizer_state(checkpoint, path, optimizer, ranks)  # in memory of its own
    groups = optimizer.state_dict()["param_groups"]
    moments = [_moments(group) for group in groups]
    skipped = checkpoint.get("config", {}).get("training", {}).get("on_nonfinite") == "skip"
    if not saved and (not checkpoint.get("step") or checkpoint.get("scaler") or skipped or () in moments):
        saved, moments = {}, [()] * len(groups)  # there was no step yet by which one has a state
    try:
        for numbered, group, names in zip(groups, optimizer.param_groups, moments, strict=True):
            for number, parameter in zip(numbered["params"], group["params"], strict=True) if names else ():
                own = found[number] = {name: saved[number][name] for name in names}
                if "shards" not in checkpoint:
                    own |= {name: in_own_memory(value.detach(), taken) for name, value in own.items()}
                for name, value in own.items():
                    shape = () if name == "step" else parameter.shape
                    if value.shape != shape or value.dtype not in FLOATS or not own_part(value).isfinite().all():
                        raise ValueError(f"{name} of {value.dtype}, {tuple(value.shape)}, is none of {tuple(shape)}")
                    if value.shape == parameter.shape and "shards" not in checkpoint:
                        own[name] = like(value, parameter)
                if own.get("step", 0) < 0:
                    raise ValueError("a step below 0")
        if len(saved) > len(found) > 0:
            raise ValueError(f"{len(saved)} states of {len(found)} parameters")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        problem = f"missing {e}" if isinstance(e, KeyError) else e
        raise UserError(f"ckpt.pt: its optimizer's state is not of its model ({problem}): {AS_INIT_FROM}") from e
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _moments(group: dict[str, Any]) -> tuple[str, ...]:
    """What an optimizer keeps of each parameter of a group."""
    if "betas" in group:
        return "step", "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if group["momentum"] else ()
