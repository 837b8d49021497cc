"""Train a GPT: `python train.py CONFIG [--section.key value …]`, or the same under torchrun. `--help` lists the keys.

Every random draw is a function of (seed, step, where), so that a run which is killed and started again gives, bit for
bit, the losses and weights of one that never stopped. `train` is the whole story. What it calls stands below it, or in
harness/.
"""

# Before torch, whose import takes seconds: a Ctrl-C meanwhile ends quietly.
from harness.errors import UserError, advising, run_cli

# isort: split
import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.batches import Windows, dropout_seed, prefetch
from harness.checkpoint import FORMAT, save_checkpoint
from harness.config import Config, ModelConfig
from harness.config_files import main_config
from harness.corpus import SPLITS, Corpus
from harness.device import (
    choose_compile,
    choose_dtype,
    deterministic_cost,
    keep_freed_memory,
    make_deterministic,
    now,
    peak_flops,
)
from harness.distributed import Ranks, end_process, join_ranks, one_voice
from harness.evaluation import describe, outlier_metrics, validation_metrics
from harness.files import write_text
from harness.kl_training import Reference
from harness.nonfinite import Skips, check_finite
from harness.optimizers import make_optimizer, schedule_note, set_learning_rates
from harness.parallel import (
    background_saver,
    looked_into,
    on_all_ranks,
    own_part,
    placed,
    recompute_activations,
    settle,
)
from harness.resuming import best_so_far, check_resume, checkpoint_to_resume, initial_model, restore_optimizer
from harness.runfolder import RunFolder, remove_shards
from harness.signals import StopSignals
from harness.streams import unfailing_output
from harness.tracking import Progress, Tracker, watched
from kernels.loss import IGNORED
from measure.feedback import feedback_matrices, feedback_metrics
from measure.moments import whole
from model import GPT, NORMALIZERS, GPTConfig, attention_backend


def main() -> int:
    with one_voice():
        config = main_config(sys.argv[1:])
        ranks = join_ranks(config.training.device)
        writes = ranks.is_main and not config.evaluation.only
        with (
            advising(config),
            unfailing_output(),
            StopSignals(ranks.is_main) as stop,
            RunFolder(config.folder) if writes else contextlib.nullcontext() as folder,
            ranks.finishing(),
        ):
            status = train(config, ranks, folder, stop)
            ranks.leave()  # a signal while one waits for the others changes nothing
        return status


def train(config: Config, ranks: Ranks, folder: RunFolder | None, stop: StopSignals) -> int:
    """Train, or only evaluate, as the config says; returns the exit status. `folder` is the run's folder: None on every
    rank but 0, and where nothing is to be written. UserError for whatever does not fit together."""
    c = config.training
    keep_freed_memory()
    device, dtype = ranks.device, choose_dtype(c.dtype, ranks.device)
    use_compile = choose_compile(c.compile, device, c.feedback)
    sharded = c.parallel == "fsdp" and ranks.size > 1
    if c.deterministic:
        make_deterministic()
    if c.parallel == "fsdp" and not sharded and ranks.is_main:
        print("note: training.parallel fsdp: one process alone has all of the model, and nothing to share")
    say = print if ranks.is_main else lambda *_: None
    corpus = Corpus(config.data.corpus, SPLITS if ranks.is_main else (), config.model.vocab_size, lazily=True)
    if corpus.note:
        say(f"note: {corpus.note}")
    micro_batch_size, micro_steps = accumulation(config, ranks.size)
    if micro_batch_size < min(c.micro_batch_size or 0, share := micro_steps * micro_batch_size):
        problem = f"{c.micro_batch_size} does not divide the {share} sequences of a rank"
        say(f"note: training.micro_batch_size: {problem}: it takes {micro_batch_size} at a time")

    # --- what is there already; nothing is written or removed until all of it is known to fit together ----------------
    checkpoint = checkpoint_to_resume(config)
    resumed, start = checkpoint is not None, checkpoint["step"] if checkpoint else 0
    if ranks.share(start) != start:
        raise UserError(f"rank {ranks.rank} sees another {config.folder}/ckpt.pt than rank 0: all need one file system")
    torch.manual_seed(config.run.seed)
    raw_model = initial_model(config, corpus, checkpoint, say)
    for idle in config.idle(raw_model.config):
        say(f"note: {idle}")
    block_size = raw_model.config.block_size
    check_corpus_fits(config, corpus, raw_model.config)
    windows = {split: Windows(corpus, split, block_size, config.data.windows) for split in SPLITS}
    if note := windows["train"].check_training():
        say(note)
    place = functools.partial(placed, ranks=ranks, sharded_in=dtype if sharded else None, use_compile=use_compile)
    reference = None
    if config.kl.reference and not config.evaluation.only:
        reference = Reference(config, raw_model.config, corpus, device, use_compile, place if sharded else None)
    machine = {
        "ranks": ranks.size,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "dtype": str(dtype),
        "attention": attention_kernel(raw_model, device, dtype),
        "torch": str(torch.__version__),
    }
    if checkpoint and not config.evaluation.only:
        check_resume(config, checkpoint, corpus, reference, machine, say)
        if folder:
            remove_shards(folder.path, checkpoint.get("shards"))
        if start >= c.max_steps:
            return 0

    if c.checkpoint_activations:
        recompute_activations(raw_model)
    model: Any = place(raw_model)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    a = raw_model.config
    if NORMALIZERS[a.normalizer].tile is None:
        say(f"{a.normalizer} has no fused form: its attention runs materialized, in O(T²) memory")
    gate = "" if a.gate == "none" else f" with a gate by {a.gate}"
    heads = f"{a.n_head} heads" + (f" on {a.kv_heads} of keys" if a.kv_heads != a.n_head else "")
    feedback = "" if c.feedback == "backprop" else f", feedback {c.feedback}"
    say(
        f"{a.n_layer} layers, {heads}, {a.n_embd} wide, context {a.block_size}: "
        f"{raw_model.num_parameters() / 1e6:.2f}M parameters; {a.normalizer} attention{gate}, {a.backward} backward, "
        f"by the {machine['attention']} kernel{feedback}\n"
        f"{ranks.size} × {device} in {str(dtype).removeprefix('torch.')}{', compiled' if use_compile else ''}"
        f"{', sharded' if sharded else ''}; "
        f"a step is {ranks.size} × {micro_steps} × {micro_batch_size} sequences, {c.batch_size * block_size:,} tokens"
    )

    def evaluate(offsets) -> float:
        """The mean loss, in nats a token, of the validation windows at `offsets`. Every rank gets the same number of
        batches, all of one shape, since the ranks of a sharded model can only run together."""
        filler = np.full(-len(offsets) % (ranks.size * micro_batch_size), len(corpus.tokens["val"]))  # without targets
        batches = np.concatenate([offsets, filler]).reshape(-1, micro_batch_size)
        total = torch.zeros(2, dtype=torch.float64)  # the sum of the losses, the number of targets
        model.eval()
        with torch.no_grad(), autocast:
            for batch in watched(batches[ranks.rank :: ranks.size], "evaluating", ranks.is_main):
                x, y = windows["val"].gather(batch, device)
                loss = model(x, y, with_logits=False)[1]  # no logits, which some models have, until the next batch's
                if targets := int((y != IGNORED).sum()):  # over no targets the loss is NaN
                    total += torch.tensor([loss.item() * targets, targets], dtype=torch.float64)
        model.train()
        loss_sum, targets = ranks.sum(total).tolist()
        return loss_sum / targets

    every_window = some_windows = windows["val"].validation()
    if config.evaluation.batches != "full":
        some_windows = windows["val"].validation(config.evaluation.batches * c.batch_size)
    if config.evaluation.only:
        if not math.isfinite(loss := evaluate(every_window)):
            raise UserError(f"the loss on the whole validation set is {loss}: try --training.dtype float32")
        source = f"{config.folder}/ckpt.pt, step {start}" if resumed else c.init_from
        say(f"{source}, the whole validation set: {describe(validation_metrics(loss, windows['val']))}")
        return 0

    if reference:
        say(reference.describe())
    optimizer = make_optimizer(raw_model, config.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    best_val_loss = best_so_far(config, checkpoint, len(every_window), say) if checkpoint else math.inf
    if c.deterministic and device.type == "cuda":
        say(deterministic_cost(raw_model, windows["val"].gather(some_windows[:1], device), autocast))
        optimizer.zero_grad()
    skips = Skips(config, checkpoint and checkpoint.get("skipped"))
    if checkpoint:
        restore_optimizer(optimizer, checkpoint, config.folder / "ckpt.pt", ranks)
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    del checkpoint  # its tensors are the model's and the optimizer's now
    wrapped = model if sharded or ranks.size == 1 else on_all_ranks(model, ranks)
    if wrapped is not model:
        offsets = windows["train"].training(config.run.seed, 0, micro_batch_size)
        settle(wrapped, windows["train"].gather(offsets, device), autocast)
    peak, peak_source = peak_flops(device, dtype)
    say(f"MFU is a share of {peak * ranks.size / 1e12:.3g} TFLOP/s, from {peak_source}")
    if note := schedule_note(config):
        say(note)

    tracker = progress = None  # like the folder, they are rank 0's
    if folder:
        config.model = ModelConfig(**dataclasses.asdict(raw_model.config))
        with folder.cleared() if c.resume == "never" else contextlib.nullcontext():
            write_text(folder.path / "config.yaml", config.to_yaml())
            tracker = Tracker(folder.path, config, start if resumed else None)
        progress = Progress(c.max_steps, start)
    saver = background_saver(config.folder, ranks) if sharded else None

    def save(step: int, best: bool) -> None:
        """Write ckpt.pt and, without the optimizer's state, best.pt. Every rank calls this, since each writes its share
        of a sharded model; of any other, rank 0 writes all."""
        norms = torch._foreach_norm([own_part(p) for p in raw_model.parameters()])
        if ranks.max(not all(norm.isfinite() for norm in norms)):
            raise UserError(f"step {step}: its update left weights that are not finite; the last checkpoint is kept")
        if tracker:
            tracker.sync()
        checkpoint = {
            "format": FORMAT,
            "feedback": feedback_matrices(raw_model),
            "model_args": dataclasses.asdict(raw_model.config),
            "step": step,
            "best_val_loss": best_val_loss,
            "config": config.to_dict(),
            "corpus": corpus.tokenizer.describe() | {"folder": config.data.corpus, "sha256": corpus.sha256},
            "reference": reference and reference.identity,
            "machine": machine,
            "scaler": scaler.state_dict(),
            "skipped": dict(skips.count),
        }
        paths: list[Path] = []
        if folder and best:  # first: a kill in between leaves no ckpt.pt that speaks of a best.pt not written
            paths.append(folder.best)
        if folder and c.keep_interval and step and step % c.keep_interval == 0:
            paths.append(folder.kept(step))
        if folder:
            paths.append(folder.checkpoint)
        if saver:
            saver.save(raw_model, optimizer, checkpoint, paths)
            return
        checkpoint["model"], state = raw_model.state_dict(), {"optimizer": optimizer.state_dict()}
        for path in paths:
            save_checkpoint(path, checkpoint if path.name == "best.pt" else checkpoint | state)
        if folder:
            remove_shards(folder.path)

    def measure(step: int) -> tuple[dict[str, float | None], bool]:
        """What an evaluation measures, the same on every rank, and whether its loss is the lowest so far."""
        nonlocal best_val_loss
        loss = evaluate(some_windows)
        best = loss < best_val_loss  # a fair comparison: the windows are the same every time
        best_val_loss = min(loss, best_val_loss)
        metrics = validation_metrics(loss, windows["val"])
        if progress:
            progress.say(f"step {step}: {describe(metrics)}")
        if step == c.max_steps:  # over the whole set, another quantity than over some: under a name of its own
            if len(some_windows) < len(every_window):
                loss = evaluate(every_window)
                if progress:
                    progress.say(f"the whole validation set: {describe(validation_metrics(loss, windows['val']))}")
            metrics |= validation_metrics(loss, windows["val"], "val_full")
        with looked_into(sharded, autocast):
            outliers = outlier_metrics(raw_model, windows, device) if config.evaluation.kurtosis else {}
        return metrics | outliers | feedback_metrics(raw_model), best

    if not resumed:
        measured, best = measure(0)
        if tracker:
            tracker.log(0, measured)
        save(0, best)

    # --- the loop -----------------------------------------------------------------------------------------------------
    stop.defer()  # a step has something to save
    batches = training_batches(config, windows["train"], start, ranks, micro_steps, micro_batch_size)
    batches = prefetch(batches) if device.type == "cuda" else batches
    unchecked = []  # (step, metrics, gradient norm, skipped) of steps not looked at yet: a look waits for the device
    clock, clock_step = now(device), start
    for step in range(start + 1, c.max_steps + 1):
        lr = set_learning_rates(optimizer, step, config)
        means: dict[str, Any] = {}  # over the micro-steps: train/loss and, beside a reference, kl/…
        for micro_step in range(micro_steps):
            x, y, weight = next(batches)
            if raw_model.config.dropout:
                torch.manual_seed(dropout_seed(config.run.seed, step, ranks.rank, micro_step))
            last = micro_step == micro_steps - 1  # copies' gradients are averaged over the ranks once a step
            with contextlib.nullcontext() if wrapped is model or last else wrapped.no_sync():
                with autocast:
                    logits, loss = wrapped(x, y, with_logits=reference is not None)
                    loss = loss * weight
                    penalty, kl = reference.penalty(x, logits, y) if reference else (0.0, {})
                    del logits  # the largest tensor of all, which nothing from here on reads
                scaler.scale((loss + penalty) / micro_steps).backward()
            for name, value in {"train/loss": loss.detach(), **kl}.items():
                means[name] = means.get(name, 0.0) + value / micro_steps
        scaler.unscale_(optimizer)
        clip = config.optimizer.grad_clip or math.inf
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), clip))
        if not (skipped := skips.skip(step, grad_norm, progress.say if progress else say)):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=wrapped is model)  # see on_all_ranks
        unchecked.append((step, means, grad_norm, skipped))

        stopping = ranks.max(stop.requested)
        evaluating = step % config.evaluation.interval == 0 or step == c.max_steps
        intervals = (c.checkpoint_interval, c.keep_interval or c.max_steps, c.max_steps)
        saving = stopping or any(step % interval == 0 for interval in intervals)
        logging = step % config.tracking.log_interval == 0 or evaluating
        if progress:
            progress.step()
        if not (logging or saving):
            continue

        metrics, best = check_finite(unchecked, ranks, scaler.is_enabled()), False
        if logging:
            seconds = (now(device) - clock) / (step - clock_step)
            tokens_per_second = c.batch_size * block_size / seconds
            metrics |= skips.metrics() | {
                "train/lr": lr,
                "train/grad_norm": grad_norm.item(),
                "train/tokens_per_second": tokens_per_second,
                "train/mfu": raw_model.flops_per_token() * tokens_per_second / (peak * ranks.size),
            }
            if progress:
                progress.report(step, metrics["train/loss"], tokens_per_second, seconds)
            measured = {}
            if evaluating:
                measured, best = measure(step)
            if tracker:
                tracker.log(step, {**metrics, **measured})
        if saving or best:
            save(step, best)
        clock, clock_step = now(device), step
        if stopping:
            break

    if saver:
        saver.wait()
    if tracker and progress:
        progress.close()
        tracker.close()
    if stopping and step < c.max_steps:
        say(f"stopped at step {step} of {c.max_steps} and saved {config.folder}/ckpt.pt: the same command continues")
        return 128 + stopping
    return 0


def accumulation(config: Config, ranks: int) -> tuple[int, int]:
    """(sequences that a device holds at a time, micro-steps a step). UserError if the ranks cannot share a batch."""
    c = config.training
    share, rest = divmod(c.batch_size, ranks)
    if rest or not share:
        raise config.error("training.batch_size", f"{c.batch_size} sequences cannot be shared out among {ranks} ranks")
    most = min(c.micro_batch_size or share, share)
    micro_batch_size = next(n for n in range(most, 0, -1) if share % n == 0)
    return micro_batch_size, share // micro_batch_size


def attention_kernel(model: GPT, device, dtype) -> str:
    """Which backend computes a training step's attention; see attention_backend."""
    c = model.config
    normalizer = NORMALIZERS[c.normalizer]
    keys = c.block_size + ("null_key" in normalizer.parameters)
    shapes = [(1, c.n_head, c.block_size, c.head_size), (1, c.kv_heads, keys, c.head_size)]
    q, k = (torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
    stock = c.backward == "full" and normalizer.null_logit is None
    return attention_backend(q, k, c.dropout, stock, normalizer.tile)


def check_corpus_fits(config: Config, corpus: Corpus, model: GPTConfig) -> None:
    if corpus.vocab_size > model.vocab_size:
        problem = f"{model.vocab_size} ids are too few for {corpus.folder}, which has {corpus.vocab_size}"
        raise config.error("model.vocab_size", problem)
    for split, tokens in corpus.tokens.items():
        if len(tokens) <= model.block_size and config.data.windows == "stream":
            problem = f"{model.block_size} is longer than {corpus.folder / split}.bin, which has {len(tokens)} tokens"
            raise config.error("model.block_size", problem)


def training_batches(config, windows: Windows, start, ranks, micro_steps, micro_batch_size):
    """(x, y, weight) of every micro-step after step `start`: this rank's slices of the global batch of each step, which
    is the same whatever the number of ranks and micro-steps. The mean over them of weight · mean loss is the mean loss
    of the global batch, however unequally its targets fall to them: weight is 1 where windows are full."""
    for step in range(start + 1, config.training.max_steps + 1):
        offsets = windows.training(config.run.seed, step, config.training.batch_size)
        parts = offsets.reshape(micro_steps, ranks.size, micro_batch_size)
        mean = windows.targets(offsets).sum() / (micro_steps * ranks.size)
        for own in parts[:, ranks.rank]:
            yield *windows.gather(own, ranks.device), windows.targets(own).sum() / mean


if __name__ == "__main__":
    end_process(lambda: run_cli(main))
