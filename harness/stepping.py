"""A training step under the clock: train.py's own, or the same model stepped as nanoGPT's loop does it."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.batches import Windows, prefetch
from harness.config import Config
from harness.corpus import Corpus
from harness.device import (
    choose_compile,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    make_deterministic,
    peak_flops,
    peak_memory,
)
from harness.kl_training import Reference
from harness.optimizers import make_optimizer, set_learning_rates
from harness.parallel import recompute_activations
from harness.timing import Laps
from kernels.backends import use_backend
from kernels.loss import IGNORED
from measure.feedback import apply_feedback
from model import GPT

PHASES = ("data", "forward", "kl", "backward", "optimizer")


class Stepper:
    """One config's model, data and optimizer, with a lap of the clock for each phase of a step.

    As `nanogpt`, the baseline: PyTorch's own attention (softmax, full backward, whatever the config says) and
    cross-entropy over the logits, batches from the main thread; on CUDA compiled, with autocast and fused AdamW, else
    eager in float32 and AdamW not fused (Karpathy 2022). `mode` is torch.compile's, where the model is compiled.
    """

    def __init__(self, config: Config, nanogpt: bool = False, mode: str | None = None):
        self.config, c, how = config, config.training, config.optimizer
        self.device = choose_device(c.device)
        on_gpu = self.device.type == "cuda"
        self.dtype = choose_dtype(c.dtype, self.device) if on_gpu or not nanogpt else torch.float32
        self.corpus = Corpus(config.data.corpus, (), config.model.vocab_size)
        shape = config.model.gpt_config(self.corpus.vocab_size)
        feedback = "backprop" if nanogpt else c.feedback
        if feedback != "backprop":
            shape = replace(shape, tie_embeddings=False)
        if nanogpt:
            shape, how = replace(shape, normalizer="softmax", backward="full"), replace(how, name="adamw")
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        else:
            keep_freed_memory()
        torch.manual_seed(config.run.seed)
        self.raw_model = apply_feedback(GPT(shape), feedback, config.run.seed).to(self.device)
        if c.deterministic:
            make_deterministic()
        if c.checkpoint_activations and not nanogpt:
            recompute_activations(self.raw_model)
        model = NanoGPT(self.raw_model) if nanogpt else self.raw_model
        use_compile = on_gpu if nanogpt else choose_compile(c.compile, self.device, c.feedback)
        self.eager, self.model = model, torch.compile(model, mode=mode) if use_compile else model
        self.backend = functools.partial(use_backend, "stock") if nanogpt else contextlib.nullcontext
        self.reference = None
        if config.kl.reference:
            self.reference = Reference(config, self.raw_model.config, self.corpus, self.device, use_compile)
        self.optimizer = make_optimizer(self.raw_model, how, fused=on_gpu or not nanogpt)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        most = min(c.micro_batch_size or c.batch_size, c.batch_size)
        self.micro_batch_size = next(n for n in range(most, 0, -1) if c.batch_size % n == 0)
        batches = self._batches()
        self.batches = prefetch(batches) if on_gpu and not nanogpt else batches

    def run(self, steps: int) -> list[dict[str, float]]:
        """Seconds of each phase, for each of so many steps. Nothing waits for the device until all are queued."""
        laps = [self._step() for _ in range(steps)]
        return [dict.fromkeys(PHASES, 0.0) | each.seconds() for each in laps]

    def losses(self, steps: int) -> list[float]:
        """The training loss of each of the first steps, in nats a token, at the learning rates of train.py, which draws
        the same weights and batches. For a Stepper that has not run yet."""
        losses = []
        for step in range(1, steps + 1):
            set_learning_rates(self.optimizer, step, self.config)
            self._step()
            losses.append(self.loss)
        return torch.stack(losses).tolist()

    def _step(self) -> Laps:
        laps, micro_steps = Laps(self.device), self.config.training.batch_size // self.micro_batch_size
        self.loss = torch.zeros((), device=self.device)
        for _ in range(micro_steps):
            x, y = next(self.batches)
            laps.end("data")
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), self.backend():
                logits, loss = self.model(x, y, with_logits=self.reference is not None)
                laps.end("forward")
                self.loss += loss.detach() / micro_steps
                if self.reference:
                    loss = loss + self.reference.penalty(x, logits, y)[0]
                    del logits  # which the next forward pass would find still there
                    laps.end("kl")
            self.scaler.scale(loss / micro_steps).backward()
            laps.end("backward")
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.config.optimizer.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        laps.end("optimizer")
        return laps

    def _batches(self):
        c = self.config
        windows = Windows(self.corpus, "train", self.raw_model.config.block_size, c.data.windows)
        for step in itertools.count(1):
            offsets = windows.training(c.run.seed, step, c.training.batch_size)
            for own in offsets.reshape(-1, self.micro_batch_size):
                yield windows.gather(own, self.device)

    def compiled_error(self) -> float | None:
        """‖g′ − g‖ / ‖g‖, where g and g′ are a parameter's gradients from one micro-batch, the model run eagerly with
        the loss over all logits, and as it trains, compiled: the largest over all parameters. None where nothing is
        compiled; NaN where neither model's gradient is finite, infinite where one of the two is."""
        if self.model is self.eager:
            return None
        batch = next(self.batches)
        expected = self.gradients(self.eager, batch, with_logits=True)[1]
        found = self.gradients(self.model, batch, with_logits=False)[1]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # the eager form is not what is measured
        finite = [all(bool(x.isfinite().all()) for x in own.values()) for own in (expected, found)]
        if not all(finite):
            return math.inf if any(finite) else math.nan
        return max(relative_errors(expected, found).values())

    def gradients(
        self, model: Callable, batch: tuple[Tensor, Tensor], with_logits: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch (x, y), and each parameter's gradient by name: `model` is `self.eager`, or
        `self.model`, as it trains."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), self.backend():
            loss = model(*batch, with_logits=with_logits)[1]
        named = dict(self.raw_model.named_parameters())
        return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def describe(self) -> dict:
        """dtype; a step's tokens and FLOPs (see GPT.flops_per_token); the device's peak rate; peak_bytes since the
        process began, of the GPU's memory or of the process."""
        tokens = self.config.training.batch_size * self.raw_model.config.block_size
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": tokens,
            "flops": self.raw_model.flops_per_token() * tokens,
            "peak_flops": peak_flops(self.device, self.dtype)[0],
            "peak_bytes": peak_memory(self.device),
        }

    def release(self) -> None:
        """Give the GPU's memory that lies idle to whoever comes next."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def relative_errors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """‖b − a‖ / ‖a‖ for each tensor a of those expected: 0 where the two are alike, infinite where only a is zero."""
    differences = {name: (found[name] - a).norm() for name, a in expected.items()}
    return {name: (d / expected[name].norm()).item() if d else 0.0 for name, d in differences.items()}


class NanoGPT(nn.Module):
    """A GPT whose loss is nanoGPT's: cross-entropy over all logits at once, in what autocast makes of it."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, targets: Tensor, with_logits: bool = True) -> tuple[Tensor, Tensor]:
        logits = self.gpt.lm_head(self.gpt.features(idx))  # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=IGNORED)
