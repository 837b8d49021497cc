"""Train a GPT: `python train.py CONFIG [--section.key value …]`, or the same under torchrun. `--help` lists the keys.

Every random draw is a function of (seed, step, where), so that a run which is killed and started again gives, bit for
bit, the losses and weights of one that never stopped. `train` is the whole story; what it calls stands below it.
"""

import contextlib
import dataclasses
import math
import signal
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from harness.batches import dropout_seed, gather, prefetch, training_offsets, validation_offsets
from harness.checkpoint import load_model, read_checkpoint, save_checkpoint
from harness.config import Config, ModelConfig, main_config
from harness.corpus import Corpus
from harness.device import choose_dtype, keep_freed_memory, now, peak_flops
from harness.distributed import Ranks, join_ranks
from harness.errors import UserError, run_cli
from harness.probe import attention_kurtosis, weight_kurtosis
from harness.runfolder import RunFolder, run_files, write_text
from harness.tracking import Progress, Tracker
from model import GPT, GPTConfig


def main() -> int:
    config = main_config(sys.argv[1:])
    ranks = join_ranks(config.training.device)
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.leave)
        writes = ranks.is_main and not config.evaluation.only
        return train(config, ranks, stack.enter_context(RunFolder(config.folder)) if writes else None)


def train(config: Config, ranks: Ranks, folder: RunFolder | None) -> int:
    """The exit status. `folder` is the run's, on rank 0."""
    c = config.training
    keep_freed_memory()
    device, dtype = ranks.device, choose_dtype(c.dtype, ranks.device)
    say = print if ranks.is_main else lambda *_: None
    corpus = Corpus(config.data.corpus, verify=ranks.is_main)
    micro_batch_size, micro_steps = accumulation(config, ranks.size)

    # What is there already. Nothing is written or removed until all of it is known to fit together.
    checkpoint = checkpoint_to_resume(config)
    start = checkpoint["step"] if checkpoint else 0
    if start >= c.max_steps and not config.evaluation.only:
        say(f"{config.folder} is finished: step {start} of {c.max_steps}. For more, raise --training.max_steps.")
        return 0
    torch.manual_seed(config.run.seed)
    raw_model = build_model(config, corpus, checkpoint).to(device)
    check_corpus_fits(config, corpus, raw_model.config)
    block_size = raw_model.config.block_size

    use_compile = device.type == "cuda" if c.compile == "auto" else c.compile
    model = torch.compile(raw_model) if use_compile else raw_model
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    a = raw_model.config
    say(
        f"{a.n_layer} layers, {a.n_head} heads, {a.n_embd} wide, context {a.block_size}: "
        f"{raw_model.num_parameters() / 1e6:.2f}M parameters; {a.normalizer} attention, {a.backward} backward\n"
        f"{ranks.size} × {device} in {str(dtype).removeprefix('torch.')}{', compiled' if use_compile else ''}; "
        f"a step is {ranks.size} × {micro_steps} × {micro_batch_size} sequences, {c.batch_size * block_size:,} tokens"
    )

    def evaluate(offsets) -> float:
        """The mean loss, in nats a token, of the validation windows at `offsets`, shared out among the ranks."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # Σ loss, targets
        batches = [offsets[i : i + micro_batch_size] for i in range(0, len(offsets), micro_batch_size)]
        with torch.no_grad(), autocast:
            for batch in batches[ranks.rank :: ranks.size]:
                x, y = gather(corpus.tokens["val"], batch, block_size, device)
                _, loss = model(x, y)
                targets = int((y >= 0).sum())
                total += torch.tensor([loss.item() * targets, targets], dtype=torch.float64)
        model.train()
        loss_sum, targets = ranks.sum(total).tolist()
        return loss_sum / targets

    def validation_metrics(loss: float) -> dict[str, float]:
        metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700))}
        if bytes_per_token := corpus.bytes_per_token["val"]:
            metrics["val/bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return metrics

    every_window = validation_offsets(len(corpus.tokens["val"]), block_size)
    windows = every_window
    if config.evaluation.batches != "full":
        windows = validation_offsets(len(corpus.tokens["val"]), block_size, config.evaluation.batches * c.batch_size)
    if config.evaluation.only:
        say(f"the whole validation set: {describe(validation_metrics(evaluate(every_window)))}")
        return 0

    optimizer = torch.optim.AdamW(
        raw_model.parameter_groups(config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    best_val_loss = math.inf
    if checkpoint:
        # The state alone: the hyperparameters are the config's, which may have changed.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        scaler.load_state_dict(checkpoint["scaler"])
        best_val_loss = checkpoint["best_val_loss"]
        report_resume(config, checkpoint, corpus, ranks.size, say)
    wrapped = model if ranks.size == 1 else DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    peak, peak_source = peak_flops(device, dtype)
    say(f"MFU is a share of {peak * ranks.size / 1e12:.3g} TFLOP/s, from {peak_source}")

    tracker = progress = None
    if ranks.is_main:
        if c.resume == "never":
            folder.clear()
        config.model = ModelConfig(**dataclasses.asdict(raw_model.config))
        write_text(folder.path / "config.yaml", config.to_yaml())
        tracker = Tracker(folder.path, config, start if checkpoint else None)
        progress = Progress(c.max_steps, start)

    def save(path, step: int, with_optimizer: bool = True) -> None:
        save_checkpoint(
            path,
            {
                "format": 1,
                "model": raw_model.state_dict(),
                "model_args": dataclasses.asdict(raw_model.config),
                "step": step,
                "best_val_loss": best_val_loss,
                "config": config.to_dict(),
                "corpus": {k: corpus.meta.get(k) for k in ("tokenizer", "vocabulary")}
                | {"folder": config.data.corpus, "sha256": corpus.sha256},
                "ranks": ranks.size,
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
            }
            | ({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()} if with_optimizer else {}),
        )

    def evaluation_metrics(step: int) -> dict[str, float | None]:
        """Everything that is measured at an evaluation; writes best.pt if this one is the best so far."""
        nonlocal best_val_loss
        loss = evaluate(windows)
        metrics = validation_metrics(loss)
        if step == c.max_steps and len(windows) < len(every_window):
            metrics = validation_metrics(evaluate(every_window))
        if loss < best_val_loss:  # on the same windows every time
            best_val_loss = loss
            if ranks.is_main and step > 0:
                save(folder.best, step, with_optimizer=False)
        if config.evaluation.kurtosis and ranks.is_main:
            metrics |= kurtosis_metrics(raw_model, corpus, device)
        return metrics

    if not checkpoint:
        metrics = evaluation_metrics(0)
        if ranks.is_main:
            tracker.log(0, metrics)
            progress.say(f"step 0: {describe(metrics)}")

    # --- the loop -----------------------------------------------------------------------------------------------------
    stop = StopSignals()
    batches = training_batches(config, corpus, block_size, start, ranks, micro_steps, micro_batch_size)
    batches = prefetch(batches) if device.type == "cuda" else batches
    unchecked = []  # (step, loss, gradient norm) since the last look: looking waits for the device
    clock, clock_step = now(device), start
    for step in range(start + 1, c.max_steps + 1):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            x, y = next(batches)
            if raw_model.config.dropout:
                torch.manual_seed(dropout_seed(config.run.seed, step, ranks.rank, micro_step))
            last = micro_step == micro_steps - 1  # gradients are averaged over the ranks once a step
            with contextlib.nullcontext() if ranks.size == 1 or last else wrapped.no_sync():
                with autocast:
                    _, micro_loss = wrapped(x, y)
                scaler.scale(micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.optimizer.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        unchecked.append((step, loss, grad_norm))

        stopping = ranks.any(stop.requested is not None)
        evaluating = step % config.evaluation.interval == 0 or step == c.max_steps
        saving = step % c.checkpoint_interval == 0 or step == c.max_steps or stopping
        logging = step % config.tracking.log_interval == 0 or evaluating
        if ranks.is_main:
            progress.step()
        if not (logging or saving):
            continue

        loss = check_finite(unchecked, ranks, scaler.is_enabled())
        if logging:
            seconds = (now(device) - clock) / (step - clock_step)
            tokens_per_second = c.batch_size * block_size / seconds
            metrics = {
                "train/loss": loss,
                "train/lr": lr,
                "train/grad_norm": grad_norm.item(),
                "train/tokens_per_second": tokens_per_second,
                "train/mfu": raw_model.flops_per_token() * tokens_per_second / (peak * ranks.size),
            }
            if ranks.is_main:
                progress.report(step, loss, tokens_per_second, seconds)
            if evaluating:
                metrics |= (found := evaluation_metrics(step))
                if ranks.is_main:
                    progress.say(f"step {step}: {describe(found)}")
            if ranks.is_main:
                tracker.log(step, metrics)
        if saving and ranks.is_main:
            save(folder.checkpoint, step)
        clock, clock_step = now(device), step
        if stopping:
            break

    if ranks.is_main:
        progress.close()
        tracker.close()
    if stop.requested and step < c.max_steps:
        say(
            f"stopped at step {step} of {c.max_steps} and saved {folder.checkpoint}: the same command continues from it"
        )
        return 128 + stop.requested
    return 0


def accumulation(config: Config, ranks: int) -> tuple[int, int]:
    """(sequences a device holds at a time, micro-steps a step)."""
    c = config.training
    share, rest = divmod(c.batch_size, ranks)
    if rest or not share:
        raise config.error("training.batch_size", f"{c.batch_size} sequences cannot be shared out among {ranks} ranks")
    micro_batch_size = min(c.micro_batch_size or share, share)
    if share % micro_batch_size:
        problem = f"{micro_batch_size} does not divide the {share} sequences that each device has in a step"
        raise config.error("training.micro_batch_size", problem)
    return micro_batch_size, share // micro_batch_size


def checkpoint_to_resume(config: Config) -> dict | None:
    """The checkpoint that this run continues from; None if it starts afresh."""
    c = config.training
    path = config.folder / "ckpt.pt"
    if c.resume == "never":
        held = run_files(config.folder)
        if held and not (c.overwrite or config.evaluation.only):
            problem = (
                f"{config.folder} already holds a run ({', '.join(held)}): give another run.name, "
                "or --training.overwrite true to replace it"
            )
            raise config.error("training.resume", problem)
        return None
    if path.exists():
        return read_checkpoint(path)
    if c.resume == "must":
        raise config.error("training.resume", f"there is no {path} to resume")
    return None


def build_model(config: Config, corpus: Corpus, checkpoint: dict | None) -> GPT:
    """The GPT to train: of the checkpoint being resumed, of `init_from`, or new. Where a checkpoint has a say, keys of
    the model section that the config leaves out are the checkpoint's, and those it sets have to agree."""
    wanted = {k: v for k, v in vars(config.model).items() if f"model.{k}" in config.sources and v is not None}
    if not checkpoint and config.training.init_from == "scratch":
        return GPT(GPTConfig(**vars(config.model) | {"vocab_size": config.model.vocab_size or corpus.vocab_size}))

    source = config.folder / "ckpt.pt" if checkpoint else config.training.init_from
    model, _ = load_model(source)
    found = dataclasses.asdict(model.config)
    free = () if checkpoint else ("dropout", "normalizer", "backward")  # a fine-tuning may choose these anew
    differing = [k for k, v in wanted.items() if k not in free and v != found[k]]
    if not checkpoint and "block_size" in differing and wanted["block_size"] < found["block_size"]:
        model.crop_block_size(wanted["block_size"])
        differing.remove("block_size")
    if differing:
        listed = ", ".join(f"{k} is {wanted[k]} in the config and {found[k]} in the checkpoint" for k in differing)
        raise config.error(f"model.{differing[0]}", f"the model differs from {source}: {listed}")
    chosen = {k: wanted[k] for k in free if k in wanted}
    rebuilt = GPT(dataclasses.replace(model.config, **chosen))
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def check_corpus_fits(config: Config, corpus: Corpus, model: GPTConfig) -> None:
    if corpus.vocab_size > model.vocab_size:
        problem = f"{model.vocab_size} ids are too few for {corpus.folder}, which has {corpus.vocab_size}"
        raise config.error("model.vocab_size", problem)
    for split, tokens in corpus.tokens.items():
        if len(tokens) <= model.block_size:
            problem = f"{model.block_size} is longer than {corpus.folder / split}.bin, which has {len(tokens)} tokens"
            raise config.error("model.block_size", problem)


def report_resume(config: Config, checkpoint: dict, corpus: Corpus, ranks: int, say) -> None:
    """Say where the run goes on and what differs from then. UserError if that is the corpus."""
    if checkpoint["corpus"]["sha256"] != corpus.sha256:
        problem = (
            f"{config.folder}/ckpt.pt was trained on other text ({checkpoint['corpus']['folder']}, sha256 "
            f"{checkpoint['corpus']['sha256'][:12]}…, not {corpus.sha256[:12]}…): start a run of another name, "
            "with --training.init_from if its weights are to be kept"
        )
        raise config.error("data.corpus", problem)
    say(f"resuming {config.folder} from step {checkpoint['step']}")
    former, changed = checkpoint["config"], []
    for section, entries in config.to_dict().items():
        for key, value in entries.items():
            before = former.get(section, {}).get(key, value)
            if section != "model" and key not in ("resume", "overwrite", "out_dir", "name") and before != value:
                changed.append(f"{section}.{key} {before} → {value}")
    if changed:
        say(f"changed since the checkpoint: {', '.join(changed)}")
    for name, before, here in (
        ("ranks", checkpoint["ranks"], ranks),
        ("threads", checkpoint["threads"], torch.get_num_threads()),
        ("PyTorch", checkpoint["torch"], str(torch.__version__)),
    ):
        if before != here:
            say(f"warning: {name}: {before} then, {here} now: the losses will agree to rounding only, not bit for bit")


def learning_rate(step: int, config: Config) -> float:
    """Of step 1, 2, …: a linear warm-up, a half cosine from lr to min_lr at decay_steps, then min_lr."""
    c = config.optimizer
    done, decay_steps = step - 1, c.decay_steps or config.training.max_steps
    if done < c.warmup_steps:
        return c.lr * step / (c.warmup_steps + 1)
    if done >= decay_steps:
        return c.min_lr
    progress = (done - c.warmup_steps) / (decay_steps - c.warmup_steps)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.lr - c.min_lr)


def training_batches(config, corpus, block_size, start, ranks, micro_steps, micro_batch_size):
    """(x, y) of every micro-step after step `start`: this rank's slices of the global batch of each step, which is the
    same whatever the number of ranks and micro-steps."""
    tokens = corpus.tokens["train"]
    for step in range(start + 1, config.training.max_steps + 1):
        offsets = training_offsets(config.run.seed, step, len(tokens), block_size, config.training.batch_size)
        for own in offsets.reshape(micro_steps, ranks.size, micro_batch_size)[:, ranks.rank]:
            yield gather(tokens, own, block_size, ranks.device)


def check_finite(unchecked: list, ranks, scaled: bool) -> float:
    """The latest step's loss, averaged over the ranks. UserError names the first step that was not finite."""
    steps = [step for step, _, _ in unchecked]
    losses, norms = torch.stack([torch.stack([loss, norm.float()]) for _, loss, norm in unchecked]).cpu().unbind(1)
    losses = ranks.sum(losses) / ranks.size
    # With a float16 scaler an infinite gradient is a step skipped, not a model lost.
    good = losses.isfinite() & (norms.isfinite() | scaled)
    unchecked.clear()
    if not good.all():
        i = int(good.long().argmin())
        raise UserError(
            f"step {steps[i]}: loss {losses[i].item()}, gradient norm {norms[i].item()}: not finite; stopped, and the "
            "last checkpoint is kept. A lower optimizer.lr or a longer warm-up may help"
        )
    return losses[-1].item()


def kurtosis_metrics(model: GPT, corpus: Corpus, device) -> dict[str, float | None]:
    """Excess kurtosis of each weight matrix, and of the attention probabilities on the same few windows every time."""
    metrics = {f"weight_kurtosis/{name}": value for name, value in weight_kurtosis(model).items()}
    model.eval()
    for split, tokens in corpus.tokens.items():
        offsets = validation_offsets(len(tokens) - model.config.block_size, model.config.block_size, count=8)
        x, _ = gather(tokens, offsets, model.config.block_size, device)
        metrics[f"activation_kurtosis/{split}/attention"] = attention_kurtosis(model, x)
    model.train()
    return metrics


def describe(metrics: dict[str, float]) -> str:
    names = {"val/loss": "val loss", "val/perplexity": "perplexity", "val/bits_per_byte": "bits per byte"}
    return ", ".join(f"{names[k]} {v:.4f}" for k, v in metrics.items() if k in names)


class StopSignals:
    """SIGINT and SIGTERM ask for an end after this step; a second Ctrl-C ends at once."""

    def __init__(self):
        self.requested: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, _frame) -> None:
        if number == signal.SIGINT == self.requested:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.requested = self.requested or number
        print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
