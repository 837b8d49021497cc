"""The plan's sums are what PyTorch allocates: on a CPU by its profiler, on an H100 by the reports in benchmarks/."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config import Config, KLConfig, OptimizerConfig, TrainingConfig
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.distributed import Ranks
from harness.errors import UserError
from harness.kl_training import Reference
from harness.optimizers import make_optimizer
from harness.parallel import on_all_ranks, own_part, placed, recompute_activations
from harness.planning import Plan, ways_to_fit
from measure.feedback import apply_feedback, feedback_layers
from model import GPT, GPTConfig
from tests.helpers import ROOT, allocated, random_ids, save_model, tiny_corpus
from tests.processes import TrainingRun, finished, on_ranks

SHAPE = {"block_size": 128, "vocab_size": 256, "n_layer": 3, "n_head": 4, "n_embd": 128, "bias": False}
LLAMA = {"n_kv_head": 2, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": False}
GATED = {"qk_norm": True, "gate": "element", "normalizer": "ssmax"}
AGAIN = {"checkpoint_activations": True}
TWICE = {"batch_size": 8}  # two micro-steps: the gradients of the first are there in the second
BFLOAT16 = {"dtype": "bfloat16"}


def config_of(training: dict | None = None, optimizer: str = "adamw", reference: str | None = None) -> Config:
    given = {"batch_size": 4, "micro_batch_size": 4, "dtype": "float32"} | (training or {})
    kl = KLConfig(reference=reference, mode="distill")
    return Config(training=TrainingConfig(**given), optimizer=OptimizerConfig(name=optimizer), kl=kl)


def measured(plan: Plan, ranks: Ranks | None = None, reference: Reference | None = None) -> int:
    """Bytes at the peak of a step as train.py takes it, after a first one."""
    c, torch_dtype = plan.config.training, plan.dtype
    model = apply_feedback(GPT(plan.shape), c.feedback)
    if plan.recomputed:
        recompute_activations(model)
    if ranks:
        placed(model, ranks, sharded_in=torch_dtype if plan.sharded else None, use_compile=False)
    wrapped = model if plan.sharded or not ranks else on_all_ranks(model, ranks)
    optimizer = make_optimizer(model, plan.config.optimizer)
    tokens = random_ids(plan.batch, plan.shape.block_size + 1, vocab_size=plan.shape.vocab_size)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        for micro_step in range(plan.micro_steps):
            last = micro_step == plan.micro_steps - 1
            with contextlib.nullcontext() if wrapped is model or last else wrapped.no_sync():
                with torch.autocast("cpu", torch_dtype, enabled=torch_dtype != torch.float32):
                    logits, loss = wrapped(x, y, with_logits=reference is not None)
                    penalty = reference.penalty(x, logits, y)[0] if reference else 0.0
                    del logits
                (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=wrapped is model)

    step()
    if ranks:
        step()  # before which DDP makes its buckets anew
    state = [t for of_one in optimizer.state.values() for t in of_one.values() if isinstance(t, Tensor)]
    held = [own_part(t) for t in (*model.parameters(), *model.buffers(), *state)]
    if plan.micro_steps == 1:  # else the second micro-step has the error of the first
        held += next((layer.error.values() for layer in feedback_layers(model).values()), ())  # all layers share it
    copies = 1 + (wrapped is not model) + (reference is not None)  # DDP's gradients, a reference of the same shape
    weights = sum(own_part(p).nbytes for p in model.parameters())
    assert c.parallel == "ddp" or plan.sharded
    return sum(t.nbytes for t in held) + (copies - 1) * weights + x.nbytes + y.nbytes + allocated(step)


@pytest.mark.parametrize(
    ("shape", "training", "optimizer", "moment"),
    [
        ({}, {}, "adamw", "the loss"),
        ({"vocab_size": 2048, "bias": True}, TWICE, "adamw", "the loss"),
        ({"normalizer": "softmax1"}, BFLOAT16, "adamw", "the loss"),
        (LLAMA, {}, "adamw", "the loss"),
        (LLAMA | {"gate": "head"}, TWICE | BFLOAT16, "adamw", "the loss"),
        (LLAMA, AGAIN, "adamw", "the first block, MLP"),
        ({}, AGAIN | TWICE | BFLOAT16, "adamw", None),
        (GATED, BFLOAT16, "adamw", "the loss"),
        ({"normalizer": "kvbias", "parallel_residual": True}, {}, "adamw", "the loss"),
        ({"normalizer": "clipped"}, BFLOAT16, "adamw", "the loss"),
        ({"normalizer": "entmax15"}, TWICE, "adamw", "the loss"),
        ({"normalizer": "sink", "dropout": 0.1}, {}, "adamw", "the loss"),
        ({"dropout": 0.1}, BFLOAT16, "adamw", "the loss"),
        ({}, {"feedback": "fa"}, "adamw", None),
        ({}, {"feedback": "fa"} | BFLOAT16, "adamw", "the loss"),
        ({"vocab_size": 2048}, {"feedback": "dfa"}, "adamw", "the loss, backward"),
        ({}, {"feedback": "dfa"} | TWICE | BFLOAT16, "adamw", None),
        ({"block_size": 16}, {"batch_size": 1}, "sgd", "the optimizer's step"),
        ({"block_size": 16}, {"batch_size": 1}, "muon", "the optimizer's step"),
        ({"vocab_size": 4096, "block_size": 16}, {"batch_size": 1}, "adamw", "the embedding"),
    ],
)
def test_the_peak_of_a_step_is_what_is_allocated(shape, training, optimizer, moment):
    plan = Plan(config_of(training, optimizer), GPTConfig(**SHAPE | shape), device="cpu")
    # Left out are tensors of a number a token or a row, and dropout's and checkpoints' states of the generator.
    assert plan.peak_bytes == pytest.approx(measured(plan), rel=0.01)
    assert moment in (None, plan.peak[0])


def test_the_logits_that_a_reference_needs_are_counted(tmp_path):
    corpus = Corpus(tiny_corpus(tmp_path / "corpus", letters=None))
    shape = GPTConfig(**SHAPE)
    config = config_of(reference=str(save_model(GPT(shape), tmp_path / "reference.pt", tmp_path / "corpus")))
    plan = Plan(config, shape, device="cpu")
    found = measured(plan, reference=Reference(config, shape, corpus, torch.device("cpu")))
    assert plan.peak_bytes == pytest.approx(found, rel=0.01)


def watch_logits() -> None:
    def penalty(self, idx, logits, *rest, penalty=Reference.penalty):
        storage = StorageWeakRef(logits.untyped_storage())

        def check(_) -> None:
            assert storage.expired(), "the logits are still there"

        logits.register_hook(check)  # called in the backward pass, when their gradient is there
        return penalty(self, idx, logits, *rest)

    Reference.penalty = penalty


def test_training_goes_back_without_the_logits(training_folder):
    finished("reference", "--training.max_steps", "1")
    beside = ("--kl.reference", "out/reference/ckpt.pt", "--training.max_steps", "2")
    run = TrainingRun("beside", *beside, inject=watch_logits)
    assert run.wait() == 0, run.output()


class Sent(TorchDispatchMode):
    """The bytes that this rank would send to the others by rings."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.bytes, self._others = 0, ranks.size - 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        share = {torch.ops.c10d._allgather_base_.default: 1, torch.ops.c10d._reduce_scatter_base_.default: 0}
        if function in share:
            self.bytes += self._others * args[share[function]].nbytes
        return function(*args, **(kwargs or {}))


def on_two_ranks(ranks: Ranks) -> None:
    shape = {"n_layer": 4, "block_size": 256}
    fsdp = {"parallel": "fsdp"}
    for how in ({}, {"batch_size": 16}, fsdp, fsdp | {"batch_size": 16}, fsdp | {"feedback": "dfa"}):
        plan = Plan(config_of({"batch_size": 8} | how), GPTConfig(**SHAPE | shape), ranks.size, "cpu")
        with Sent(ranks) as sent:
            found = measured(plan, ranks)
        within = 0.05 if plan.sharded else 0.01  # gloo lets go of what FSDP sent when it likes
        assert plan.peak_bytes == pytest.approx(found, rel=within), how
        if plan.sharded:  # three steps
            assert sent.bytes == pytest.approx(3 * sum(plan.moved.values()), rel=1e-3)


def test_two_ranks_allocate_and_send_what_the_plan_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_ranks(2, on_two_ranks)


def test_an_h100_had_that_peak():
    report = json.loads((ROOT / "benchmarks/2026-11-27_nvidia-h100-80gb-hbm3-2.json").read_text())
    rows = [row for section in report["sections"] for row in section.get("rows", []) if "peak GiB" in row]
    compared = 0
    for row in rows:
        variant, _, batch = row["variant"].partition(", ")
        if variant.startswith("nanoGPT"):
            continue
        normalizer, backward = variant.split("/")
        batch = batch.removesuffix(" at a time") or 16
        how = {"model.normalizer": normalizer, "model.backward": backward, "training.micro_batch_size": batch}
        options = [
            word for key, value in (how | {"training.batch_size": 64}).items() for word in (f"--{key}", str(value))
        ]
        config = load_config([str(ROOT / "configs/gpt2_124m_softmax.yaml"), *options])
        plan = Plan(config, config.model.gpt_config(50304))
        assert plan.peak_bytes / 2**30 == pytest.approx(row["peak GiB"], rel=0.02), row["variant"]
        compared += 1
    assert compared > 5


EIGHT_BILLION = GPTConfig(
    **LLAMA | {"n_kv_head": 8, "n_head": 32, "n_embd": 4096, "n_layer": 32, "n_inner": 14336, "bias": False},
    block_size=8192,
    vocab_size=128256,
)


@pytest.mark.parametrize("gpus", [1, 16])
def test_what_is_advised_fits_and_one_step_further_does_not(gpus):
    limit = 72 * 2**30
    plan = Plan(config_of({"batch_size": 64, "micro_batch_size": 4, "dtype": "auto"}), EIGHT_BILLION, gpus)
    assert plan.peak_bytes > limit
    found = ways_to_fit(plan, limit)
    assert found
    for way in found:
        assert way.peak_bytes <= limit
        share = way.batch * way.micro_steps
        larger = [n for n in range(way.batch + 1, share + 1) if share % n == 0]
        assert not larger or way.changed(batch=larger[0]).peak_bytes > limit
        assert way.config.training.parallel == "fsdp"  # 8 billion parameters fit on no device by themselves
    if gpus == 1:
        halved = found[0].changed(found[0].gpus // 2)
        assert halved.largest(limit) is None


@pytest.mark.parametrize(
    ("size", "gpus", "nearest"),
    [
        (4, 3, "2 or 4 they can, or 3 or 6 among 3"),
        (4, 9, "4 they can, or 9 among 9"),
        (480, 64, "60 or 80 they can, or 448 or 512 among 64"),
    ],
)
def test_ranks_that_cannot_share_a_batch_are_refused_with_those_that_can(size, gpus, nearest):
    problem = f"training.batch_size: {size} sequences cannot be shared out among {gpus} devices: among {nearest}$"
    with pytest.raises(UserError, match=problem):
        Plan(config_of({"batch_size": size}), GPTConfig(**SHAPE), gpus)


def test_a_block_computed_again_and_a_reference_are_another_pass_each():
    shape = GPTConfig(**SHAPE)
    once = Plan(config_of(TWICE), shape, gpus=2).flops
    assert once == GPT(shape).flops_per_token() * 4 * 128
    assert Plan(config_of(TWICE | AGAIN), shape, gpus=2).flops == pytest.approx(once * 4 / 3)
    assert Plan(config_of(TWICE | AGAIN, reference="ckpt.pt"), shape, gpus=2).flops == pytest.approx(once * 5 / 3)


def test_the_device_is_the_configs_and_cuda_where_it_says_auto():
    found = {
        given: Plan(config_of({"device": given}), GPTConfig(**SHAPE)).device for given in ("auto", "cuda:1", "cpu")
    }
    assert found == {"auto": "cuda", "cuda:1": "cuda", "cpu": "cpu"}
    assert not Plan(config_of({"feedback": "dfa"}), GPTConfig(**SHAPE)).compiled  # on no device
    with pytest.raises(UserError, match=r"training.device: mps: a plan is for cuda or cpu"):
        Plan(config_of({"device": "mps"}), GPTConfig(**SHAPE))


def test_a_ring_sends_everything_but_one_share_twice():
    plan = Plan(config_of({"batch_size": 8}), GPTConfig(**SHAPE), gpus=4)
    assert math.isclose(sum(plan.moved.values()), 2 * 3 / 4 * 4 * plan.parameters)
    alone = replace(plan.config.training, parallel="fsdp")
    assert not Plan(replace(plan.config, training=alone), plan.shape).sharded  # one device has nobody to share with
