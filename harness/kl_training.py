"""Training beside a frozen reference model: the section `kl` of a config.

The reference sees the batches that the model sees, and how far their next-token distributions lie apart is added to the
loss: as a barrier, which leaves the model free until an aggregate of the per-position KL exceeds tau, or to distill
(Hinton, Vinyals & Dean 2015, whose factor temperature² keeps the gradient's size whatever the temperature). Aggregates
are over the positions of a sequence and then averaged over sequences: micro-steps and ranks change nothing.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.checkpoint import check_finite, load_model
from harness.config import Config
from harness.corpus import Corpus
from harness.errors import UserError
from harness.tokenizer import different_tokenizers
from kernels.loss import IGNORED
from measure.divergence import AGGREGATES, aggregate, kl_divergence
from model import GPT, GPTConfig


class Reference:
    """The model that `kl.reference` names, in eval mode and without gradients, and the penalty on leaving it.

    model, corpus   what is trained, and on what; UserError if the reference is not of the same vocabulary
    place           puts it onto the device where that is not done whole: sharded over ranks
    identity        {"path", "sha256"}, which checkpoints record
    """

    def __init__(
        self,
        config: Config,
        model: GPTConfig,
        corpus: Corpus,
        device: torch.device,
        use_compile: bool = False,
        place: Callable[[GPT], Callable] | None = None,
    ):
        c = self.config = config.kl
        self._padded = config.data.windows == "documents"
        assert c.reference is not None  # without one, no Reference is made
        try:
            reference, info = load_model(c.reference, "cpu" if place else device)
            check_finite(reference, c.reference)
        except UserError as e:
            raise config.error("kl.reference", str(e)) from e
        if problem := mismatch(reference.config, model, info.get("corpus", {}), corpus):
            raise config.error("kl.reference", f"{c.reference} {problem}")
        reference.requires_grad_(False)
        self.identity = {"path": c.reference, "sha256": fingerprint(reference)}
        self.direction = c.direction or ("reverse" if c.mode == "barrier" else "forward")
        self.temperature = c.temperature if c.mode == "distill" else 1.0
        self._model: Callable = torch.compile(reference) if use_compile and not place else reference
        if place:
            self._model = place(reference)
        # Compiled, the KL does not make several tensors of the size of the logits.
        self._position_kl: Callable = torch.compile(position_kl) if use_compile else position_kl

    def penalty(self, idx: Tensor, logits: Tensor, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """idx (B, T), the model's logits for it (B, T, V) and, where windows are padded, its targets (B, T) → what is
        added to the mean loss, and the metrics kl/…: the mean over the B sequences of each aggregate over the positions
        that have a target, and the penalty. Scalars; the metrics have no gradient."""
        c = self.config
        with torch.no_grad():
            reference_logits, _ = self._model(idx)
        kl = self._position_kl(logits, reference_logits, self.direction, self.temperature)  # (B, T)
        texts = [kl]
        if self._padded and targets is not None:  # texts that differ in length, each by itself
            texts = [row[scored][None] for row, scored in zip(kl, targets != IGNORED, strict=True)]

        def over_positions(how: str) -> Tensor:
            return torch.cat([aggregate(text, how) for text in texts])

        if c.mode == "barrier":
            penalty = c.weight * F.relu(over_positions(c.aggregate) - c.tau).mean()
        else:
            penalty = c.weight * c.temperature**2 * over_positions("mean").mean()
        metrics = {f"kl/{how}": over_positions(how).detach().mean() for how in AGGREGATES}
        return penalty, metrics | {"kl/penalty": penalty.detach()}

    def describe(self) -> str:
        """The penalty as a formula."""
        c, between = self.config, "reference‖model" if self.direction == "forward" else "model‖reference"
        if c.mode == "barrier":
            what = f"mean over sequences of relu({c.aggregate} KL({between}) − {c.tau:g})"
        else:
            what = f"{c.temperature:g}² · mean KL({between}) at temperature {c.temperature:g}"
        return (
            f"added to the loss: {c.weight:g} · {what}; reference {c.reference}, sha256 {self.identity['sha256'][:12]}…"
        )


def position_kl(logits: Tensor, reference_logits: Tensor, direction: str, temperature: float = 1.0) -> Tensor:
    """The KL divergence, in nats, of the next-token distributions at a temperature: twice (…, V) → (…), in float32 at
    least. forward is KL(reference‖model), reverse KL(model‖reference); ValueError for any other direction."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction!r}: choose forward or reverse")
    log_p, log_q = (
        F.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, dim=-1)
        for x in (logits, reference_logits)
    )
    return kl_divergence(log_q, log_p) if direction == "forward" else kl_divergence(log_p, log_q)


def mismatch(reference: GPTConfig, model: GPTConfig, trained_on: dict, corpus: Corpus) -> str | None:
    """Why a reference, trained on the corpus that its checkpoint describes, cannot be compared with the model."""
    if reference.vocab_size != model.vocab_size:
        return f"has {reference.vocab_size} token ids and the model {model.vocab_size}: a KL needs equal vocabularies"
    if reference.block_size < model.block_size:
        return f"has a context of {reference.block_size} tokens, shorter than the model's {model.block_size}"
    if differ := different_tokenizers(trained_on, corpus.meta):
        theirs, ours = differ
        return f"was trained with tokenizer {theirs}, {corpus.folder} has {ours}: a KL needs equal vocabularies"
    return None


def fingerprint(model: GPT) -> str:
    """The sha256 of what a model computes, whatever file it is in: of its weights, and of the config's fields that the
    weights' shapes do not tell. A field that was added later counts only where it is not at its default, so that the
    hashes in older checkpoints stay valid."""
    c = model.config
    digest = hashlib.sha256(f"{c.n_head} {c.normalizer} {c.activation}".encode())
    for field in dataclasses.fields(c):
        hashed = field.name in ("n_head", "normalizer", "activation") or field.metadata.get("in_weights")
        hashed = hashed or field.metadata.get("constant")
        if not hashed and field.metadata.get("forward", True) and (value := getattr(c, field.name)) != field.default:
            digest.update(f"{field.name} {value!r}".encode())
    if constants := model.transformer.h[0].attn.constants:
        digest.update(f"{constants}".encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
