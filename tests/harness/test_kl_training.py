"""Training beside a reference: the penalty is the formula, costs nothing where there is nothing to penalise, and leaves
everything that a run promises as it was."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from harness.checkpoint import load_model
from harness.config_files import load_config
from harness.corpus import Corpus
from harness.errors import UserError
from harness.kl_training import Reference, fingerprint, position_kl
from kernels.loss import IGNORED
from measure.divergence import AGGREGATES
from model import GPT, GPTConfig
from tests import helpers
from tests.helpers import tiny_gpt

pytestmark = pytest.mark.usefixtures("training_folder")

SHAPE = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32, bias=False, normalizer="softmax1")
EPS = torch.finfo(torch.float32).eps
# The same step's figures by sums in another order: relative as test_train allows for the loss. Where a KL is small its
# terms still have the rounding of log-probabilities of size ~10: a few 1e-6, hence the absolute part.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def save_model(model: GPT, path="reference.pt", **more) -> GPT:
    helpers.save_model(model, Path.cwd() / path, step=0, **more)
    return model


def new_model(seed: int, scale: float = 10.0, **changes) -> GPT:
    """A GPT whose predictions are far from uniform, as a trained one's are."""
    model = tiny_gpt(seed, **vars(SHAPE) | changes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1)
    return model


def reference_of(*overrides: str, path="reference.pt", model=SHAPE, corpus="corpus", **how) -> Reference:
    config = load_config(["config.yaml", "--kl.reference", path, *overrides])
    return Reference(config, model, Corpus(corpus), torch.device("cpu"), **how)


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randint(256, (batch, 16), generator=torch.Generator().manual_seed(0))


# --- the penalty ----------------------------------------------------------------------------------------------------

OVER_POSITIONS = {  # NumPy's
    "mean": lambda kl: kl.mean(-1),
    "rmse": lambda kl: np.sqrt((kl**2).mean(-1)),
    "p95": lambda kl: np.quantile(kl, 0.95, axis=-1),
    "max": lambda kl: kl.max(-1),
}


def expected_kl(student: GPT, reference: GPT, direction: str, temperature: float = 1.0) -> np.ndarray:
    """(B, T), by scipy in float64 from the models' float64 logits."""
    with torch.no_grad():
        logits = [m.double()(tokens())[0].numpy() / temperature for m in (student, reference)]
    for m in (student, reference):
        m.float()
    p, q = (np.exp(log_softmax(z, axis=-1)) for z in logits)
    return rel_entr(q, p).sum(-1) if direction == "forward" else rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", None])
def test_the_barrier_is_the_mean_over_sequences_of_the_hinge(how, direction):
    reference, student = save_model(new_model(1)), new_model(2)
    kl = expected_kl(student, reference, direction or "reverse")
    over = OVER_POSITIONS[how](kl)
    tau = float(
        np.median(over)
    )  # one sequence below, one at it, one above: the hinge of the mean would be another number
    overrides = ["--kl.aggregate", how, "--kl.tau", repr(tau), "--kl.weight", "3"]
    overrides += ["--kl.direction", direction] if direction else []
    penalty, metrics = reference_of(*overrides).penalty(tokens(), student(tokens())[0])
    np.testing.assert_allclose(penalty.item(), 3 * np.maximum(over - tau, 0).mean(), rtol=1e-4)
    assert metrics["kl/penalty"] == penalty
    for name, numpy in OVER_POSITIONS.items():
        np.testing.assert_allclose(metrics[f"kl/{name}"], numpy(kl).mean(), rtol=1e-4)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("direction", ["forward", "reverse", None])
def test_distillation_is_the_mean_at_a_temperature_times_its_square(direction):
    reference, student = save_model(new_model(1)), new_model(2)
    overrides = ["--kl.mode", "distill", "--kl.temperature", "2.5", "--kl.weight", "3"]
    overrides += ["--kl.direction", direction] if direction else []
    # Keys of the other mode change nothing.
    overrides += ["--kl.tau", "100", "--kl.aggregate", "max"]
    penalty, metrics = reference_of(*overrides).penalty(tokens(), student(tokens())[0])
    kl = expected_kl(student, reference, direction or "forward", temperature=2.5)
    np.testing.assert_allclose(penalty.item(), 3 * 2.5**2 * kl.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/p95"], OVER_POSITIONS["p95"](kl).mean(), rtol=1e-4)


@pytest.mark.parametrize("mode", ["barrier", "distill"])
@pytest.mark.parametrize("how", AGGREGATES)
def test_in_windows_of_documents_positions_without_a_target_do_not_count(mode, how):
    reference, student = save_model(new_model(1)), new_model(2)
    targets = tokens().clone()
    lengths = [1 + 2 * b for b in range(len(targets))]
    for row, length in zip(targets, lengths, strict=True):
        row[length:] = IGNORED
    made = reference_of("--kl.mode", mode, "--kl.aggregate", how, "--data.windows", "documents")
    penalty, metrics = made.penalty(tokens(), student(tokens())[0], targets)
    kl = expected_kl(student, reference, "reverse" if mode == "barrier" else "forward")
    texts = [row[:length] for row, length in zip(kl, lengths, strict=True)]
    for name, numpy in OVER_POSITIONS.items():
        np.testing.assert_allclose(metrics[f"kl/{name}"], np.mean([numpy(text) for text in texts]), rtol=1e-4)
    added = OVER_POSITIONS[how if mode == "barrier" else "mean"]
    np.testing.assert_allclose(penalty.item(), np.mean([added(text) for text in texts]), rtol=1e-4)


@pytest.mark.parametrize("mode", ["barrier", "distill"])
def test_the_gradient_of_the_logits_is_the_textbooks(mode):
    """Of KL(p‖q) along p's logits `p (log p/q − KL)`, of KL(q‖p) along them `p − q`."""
    save_model(new_model(1))
    reference = reference_of("--kl.mode", mode, "--kl.temperature", "2")
    logits = new_model(2)(tokens())[0].detach().requires_grad_()
    reference.penalty(tokens(), logits)[0].backward()
    with torch.no_grad():
        temperature = 2 if mode == "distill" else 1
        log_q = (load_model("reference.pt")[0](tokens())[0].double() / temperature).log_softmax(-1)
        log_p = (logits.double() / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if mode == "distill":
            expected = 2**2 * (p - q) / 2
        else:
            kl = (p * (log_p - log_q)).sum(-1, keepdim=True)
            expected = p * (log_p - log_q - kl)
    torch.testing.assert_close(logits.grad.double() * tokens().numel(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["barrier", "distill"])
@pytest.mark.parametrize("how", AGGREGATES)
def test_a_student_equal_to_its_reference_feels_nothing(how, mode, dtype):
    """With dropout in the reference's own config, which is off in it."""
    student = save_model(new_model(1, dropout=0.2)).eval()
    reference = reference_of("--kl.aggregate", how, "--kl.mode", mode, "--kl.tau", "0")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, _ = student(tokens())
        penalty, metrics = reference.penalty(tokens(), logits)
    penalty.backward()
    assert all(value == 0 for value in metrics.values())
    assert all((p.grad == 0).all() for p in student.parameters())


def test_no_logit_is_too_far_for_a_finite_gradient():
    save_model(new_model(1, scale=100.0))
    for mode, how in [("distill", "mean"), *(("barrier", how) for how in AGGREGATES)]:
        student = new_model(2, scale=100.0)
        penalty, _ = reference_of("--kl.mode", mode, "--kl.aggregate", how).penalty(tokens(), student(tokens())[0])
        penalty.backward()
        assert penalty > 10
        assert all(p.grad.isfinite().all() for p in student.parameters())


def test_the_kl_is_in_float32_whatever_the_logits():
    logits = new_model(1)(tokens())[0].detach().bfloat16()
    reference_logits = new_model(2)(tokens())[0].detach().bfloat16()
    kl = position_kl(logits, reference_logits, "reverse")
    assert kl.dtype == torch.float32
    exact = position_kl(logits.double(), reference_logits.double(), "reverse")
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=0)  # bfloat16's ε would be 8e-3
    assert exact.dtype == torch.float64


def test_the_kl_has_two_directions_and_no_third():
    logits, reference_logits = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 3.0]).log_softmax(-1)
    q = reference_logits.exp()
    found = {way: position_kl(logits, reference_logits, way).item() for way in ("forward", "reverse")}
    expected = {"forward": (q * (2 * q).log()).sum().item(), "reverse": -(2 * q).log().mean().item()}
    assert found == pytest.approx(expected, rel=1e-6)  # sums of two terms in float32
    for wrong in ("Forward", "backward", ""):
        with pytest.raises(ValueError, match=f"unknown direction '{wrong}': choose forward or reverse"):
            position_kl(logits, reference_logits, wrong)


def test_the_compiler_takes_the_kl_whole():
    logits, reference_logits = (new_model(seed)(tokens())[0].detach() for seed in (2, 1))
    compiled = torch.compile(position_kl, fullgraph=True, backend="aot_eager")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    for leaf, function in zip(leaves, (position_kl, compiled), strict=True):
        function(leaf, reference_logits, "reverse").sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-6)


# --- what it is compared with ---------------------------------------------------------------------------------------


def test_the_reference_is_frozen_and_sees_each_batch_once_without_gradients():
    save_model(new_model(1))
    reference = reference_of()
    seen = []
    reference._model.register_forward_hook(lambda model, args, out: seen.append((args[0], out[0].requires_grad)))
    reference.penalty(tokens(), new_model(2)(tokens())[0])[0].backward()
    assert len(seen) == 1
    assert torch.equal(seen[0][0], tokens())
    assert not seen[0][1]
    assert not reference._model.training
    assert not any(p.requires_grad or p.grad is not None for p in reference._model.parameters())


def test_a_fingerprint_is_of_what_the_model_computes():
    model = new_model(1)
    same = save_model(new_model(1, dropout=0.5, backward="ste"), "elsewhere.pt")  # both matter in training alone
    assert fingerprint(model) == fingerprint(same) == fingerprint(load_model("elsewhere.pt")[0])
    others = [new_model(2), new_model(1, normalizer="softmax"), new_model(1, n_head=4), new_model(1, activation="gelu")]
    nudged = new_model(1)
    with torch.no_grad():
        nudged.transformer.wpe.weight[0, 0].mul_(1 + 2 * EPS)
    assert len({fingerprint(m) for m in (model, nudged, *others)}) == 6


def test_a_fingerprint_tells_todays_models_apart_and_not_a_null_from_what_it_stands_for():
    llama = {"position": "rope", "norm": "rmsnorm", "n_head": 4, "bias": False}
    same = [{}, {"n_kv_head": 4}, {"head_dim": 8}, {"qkv_bias": False}, {"n_inner": 128}, {"rope_theta": 10000}]
    others = [{"rope_theta": 5e5}, {"rope_fraction": 0.5}, {"rope_scaling": 8.0}, {"norm": "layernorm"}]
    others += [{"norm_eps": 1e-6}, {"parallel_residual": True}]  # none of which the weights tell
    hashes = [[fingerprint(new_model(1, **llama | change)) for change in changes] for changes in (same, others)]
    assert len(set(hashes[0])) == 1
    assert len({hashes[0][0], *hashes[1]}) == 1 + len(others)


def test_a_fingerprint_counts_options_that_are_younger_than_it():
    model, before = new_model(1), fingerprint(new_model(1))
    older = hashlib.sha256(b"2 softmax1 gelu_tanh")  # what checkpoints have recorded so far
    for name, weight in model.named_parameters():
        older.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + weight.detach().numpy().tobytes())
    assert before == older.hexdigest()
    fields = [("theta", float, 1e4), ("z_loss", float, dataclasses.field(default=0.0, metadata={"forward": False}))]
    Younger = dataclasses.make_dataclass("Younger", fields, bases=(GPTConfig,))
    for changed, theta, z_loss in ((False, 1e4, 0.0), (False, 1e4, 0.1), (True, 5e5, 0.0)):
        model.config = Younger(**vars(new_model(1).config), theta=theta, z_loss=z_loss)
        assert (fingerprint(model) != before) == changed


def refusal(*arguments, **how) -> str:
    with pytest.raises(UserError) as error:
        reference_of(*arguments, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reference_of_another_vocabulary_is_refused_by_name():
    save_model(new_model(1, vocab_size=300))
    message = refusal()
    for part in ("command line: kl.reference: reference.pt", "300 token ids", "the model 256"):
        assert part in message
    save_model(new_model(1), corpus={"tokenizer": "chars", "vocabulary": "ab"})
    message = refusal()
    for part in ("reference.pt", "was trained with tokenizer chars", "corpus has bytes"):
        assert part in message
    save_model(new_model(1), corpus={"tokenizer": "bytes", "vocabulary": None})
    reference_of()


def test_a_reference_with_a_shorter_context_is_refused_and_with_a_longer_one_taken():
    save_model(new_model(1, block_size=8))
    assert "a context of 8 tokens, shorter than the model's 16" in refusal()
    save_model(new_model(1, block_size=32))
    reference_of().penalty(tokens(), new_model(2)(tokens())[0])


def test_a_reference_that_cannot_be_read_is_refused_by_key():
    assert refusal(path="nowhere.pt") == "command line: kl.reference: no checkpoint nowhere.pt"
    Path("broken.pt").write_bytes(b"PK\x03\x04")
    assert "kl.reference: broken.pt is truncated or not a checkpoint" in refusal(path="broken.pt")
    model = new_model(1)
    model.transformer.ln_f.weight.data[0] = float("inf")
    save_model(model)
    assert "kl.reference: reference.pt holds NaN or infinite weights, in transformer.ln_f.weight" in refusal()
