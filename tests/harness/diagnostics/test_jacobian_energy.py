"""scripts/jacobian_energy.py: the split and what the parameters' gradients lose, as a user reads them."""

import argparse
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness.checkpoint import load_model
from harness.corpus_writing import write_corpus
from harness.diagnostics import Result, Subject, argument_parser
from harness.diagnostics import jacobian_energy as script
from harness.tokenizer import Bytes
from measure import gradients
from measure.feedback import apply_feedback, feedback_matrices
from measure.jacobian import jacobian_energy
from measure.probe import capture_attention
from model import GPT
from tests.helpers import diagnose, read_json, save_model, shakespeares_nanogpt, smollm2_with_known_figures, tiny_gpt

COLUMNS = [
    *("mean_attention", "entropy", "row_mass", "e_full", "e_diag", "e_lateral", "e_cross"),
    *("r_diag", "r_lateral", "r_cross", "r_offdiag", "cos_diag", "cos_ste", "jacobian_diag", "jacobian_offdiag"),
]


def random_gpt(normalizer: str = "softmax", **changes) -> GPT:
    return tiny_gpt(3, noise=0.4, normalizer=normalizer, **changes)


def windows(B=3, T=12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus of 5 validation windows and a checkpoint trained on it, so to say; the working directory."""
    monkeypatch.chdir(tmp_path)
    text = bytes(np.random.default_rng(0).integers(1, 256, 61, dtype=np.uint8))
    write_corpus("corpus", [("train", text), ("val", text)], Bytes(), source="test")
    save(random_gpt("sink", backward="ste"))
    return tmp_path


def save(model: GPT, path: str = "ckpt.pt") -> None:
    save_model(model, path, "corpus")


def by_hand(model: GPT, offsets: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss over windows, and the parameters' gradients, in one batch."""
    tokens = torch.from_numpy(np.fromfile("corpus/val.bin", dtype=np.uint16).astype(np.int64))
    batch = torch.stack([tokens[start : start + 13] for start in offsets])
    model.zero_grad()
    _, loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_the_script_reports_split_and_gradients(folder, capsys):
    assert diagnose(script.DIAGNOSTIC, "ckpt.pt", "--batches", "2", "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    assert "cos_diag near 1" in printed
    assert "far below 1 says that it is critical" in printed
    assert Path("diagnostics/jacobian_energy.png").stat().st_size > 10_000
    report = read_json("diagnostics/jacobian_energy.json")
    assert (report["script"], report["step"], report["config"]["backward"]) == ("jacobian_energy", 7, "ste")
    assert [(row["layer"], row["head"]) for row in report["rows"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(report["rows"][0]) == ["layer", "head", *COLUMNS]
    for layer in (0, 1):
        rows = [row for row in report["rows"] if row["layer"] == layer]
        pooled = report["layers"][layer]
        assert pooled["r_diag"] == pytest.approx(sum(r["e_diag"] for r in rows) / sum(r["e_full"] for r in rows))
        assert pooled["cos_diag"] == pytest.approx(sum(r["cos_diag"] for r in rows) / 2)
    total = {name: sum(row[name] for row in report["rows"]) for name in ("e_full", "e_diag", "e_lateral", "e_cross")}
    for part in ("diag", "lateral", "cross"):
        assert report["summary"][f"r_{part}"] == pytest.approx(total[f"e_{part}"] / total["e_full"], rel=1e-12)

    # Windows 0, 1, 2, 4 of 5; two batches' mean losses differentiated are twice the mean over all four.
    losses, gradients = {}, {}
    for backward in ("full", "diagonal", "ste"):
        model = random_gpt("sink", backward=backward)
        losses[backward], gradients[backward] = by_hand(model, [0, 12, 24, 48])
    assert report["summary"]["loss"] == pytest.approx(losses["full"].item(), rel=1e-6)
    assert [row["parameter"] for row in report["gradients"]] == list(gradients["full"])
    # float32 gradients, summed in another order
    rounding = {"rel": 1e-4, "abs": 1e-5}
    for row in report["gradients"]:
        full = gradients["full"][row["parameter"]].double().flatten()
        for mode in ("diagonal", "ste"):
            other = gradients[mode][row["parameter"]].double().flatten()
            assert row[f"cos_{mode}"] == pytest.approx(F.cosine_similarity(other, full, dim=0).item(), **rounding)
            assert row[f"norm_ratio_{mode}"] == pytest.approx((other.norm() / full.norm()).item(), **rounding)
    whole = {mode: torch.cat([g.double().flatten() for g in gradients[mode].values()]) for mode in gradients}
    parts = [name for name in gradients["full"] if ".c_attn." in name]
    qk = {mode: torch.cat([gradients[mode][name].double()[:16].flatten() for name in parts]) for mode in gradients}
    for prefix, vectors in (("gradient", whole), ("query_key_gradient", qk)):
        for mode in ("diagonal", "ste"):
            cosine = F.cosine_similarity(vectors[mode], vectors["full"], dim=0).item()
            ratio = (vectors[mode].norm() / vectors["full"].norm()).item()
            assert report["summary"][f"{prefix}_cos_{mode}"] == pytest.approx(cosine, **rounding)
            assert report["summary"][f"{prefix}_norm_ratio_{mode}"] == pytest.approx(ratio, **rounding)


@pytest.mark.parametrize("how", ["fa", "sign_symmetric", "dfa"])
def test_what_a_feedback_trained_is_split_by_its_own_gradient_with_the_true_one_beside(folder, how):
    plain = random_gpt(tie_embeddings=False)
    matrices = feedback_matrices(apply_feedback(random_gpt(tie_embeddings=False), how, 2))
    save_model(plain, "ckpt.pt", "corpus", config={"training": {"feedback": how}}, feedback=matrices)
    save_model(plain, "plain.pt", "corpus")
    options = ("--batches", "1", "--batch-size", "4", "--dtype", "float64", "--out")
    assert diagnose(script.DIAGNOSTIC, "ckpt.pt", *options, "own") == 0
    assert diagnose(script.DIAGNOSTIC, "plain.pt", *options, "true") == 0
    own, true = read_json("own/jacobian_energy.json"), read_json("true/jacobian_energy.json")
    for ours, theirs in zip(own["backprop_rows"], true["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert own["summary"]["loss"] == pytest.approx(true["summary"]["loss"], rel=1e-12)
    assert own["summary"]["backprop_cos_ste"] == pytest.approx(true["summary"]["cos_ste"], rel=1e-9)
    assert "feedback" not in true
    assert "backprop_rows" not in true

    # By hand, on a model of the same weights that has the feedback: dL/dO of every layer, and the gradients.
    model = apply_feedback(random_gpt(tie_embeddings=False).double(), how, 2)
    with capture_attention(model) as captured:
        _, gradients = by_hand(model, [0, 12, 24, 48])
    for layer, (_, q, k, v, grad_out) in enumerate(captured):
        expected = jacobian_energy(q, k, v, grad_out)
        for row in (row for row in own["rows"] if row["layer"] == layer):
            for column in ("e_full", "e_diag", "r_diag", "cos_diag", "cos_ste"):
                assert row[column] == pytest.approx(expected[column][row["head"]].item(), rel=1e-9), column
    _, truth = by_hand(plain.double(), [0, 12, 24, 48])
    for row in own["feedback"]:
        a, b = (x[row["parameter"]].flatten() for x in (gradients, truth))
        assert row["cosine"] == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-9, abs=1e-12)
        assert row["norm_ratio"] == pytest.approx((a.norm() / b.norm()).item(), rel=1e-9)


def test_a_checkpoint_without_its_feedbacks_matrices_is_an_error(folder, capsys):
    save_model(random_gpt(tie_embeddings=False), "ckpt.pt", "corpus", config={"training": {"feedback": "fa"}})
    assert diagnose(script.DIAGNOSTIC, "ckpt.pt") == 2
    assert "ckpt.pt: the feedback matrices are not those of fa in this model" in capsys.readouterr().err


def measured(*options: str) -> Result:
    return script.measure(Subject("ckpt.pt", arguments("ckpt.pt", *options)))


def arguments(*argv: str) -> argparse.Namespace:
    return argument_parser("jacobian_energy", "", 1, 2).parse_args(argv)


def test_energies_are_summed_over_batches_of_their_own_mean_loss(folder):
    five, one = measured("--batches", "5", "--batch-size", "1"), measured("--batches", "1", "--batch-size", "5")
    for row_of_five, row_of_one in zip(five.rows, one.rows, strict=True):
        assert row_of_five["e_full"] == pytest.approx(25 * row_of_one["e_full"], rel=1e-5)  # float32 gradients
        assert row_of_five["r_diag"] == pytest.approx(row_of_one["r_diag"], rel=1e-5)
    assert five.notes == one.notes == ["5 windows of 12 tokens"]


def test_the_model_is_left_as_it_was(folder):
    model = load_model("ckpt.pt")[0]
    x, y = windows()
    before = model(x, y)[0]
    subject = Subject("ckpt.pt", arguments("ckpt.pt"))
    script.measure(subject)
    assert torch.equal(subject.model(x, y)[0], before)
    assert all(p.grad is None for p in subject.model.parameters())
    assert [block.attn.backward_mode for block in subject.model.transformer.h] == ["ste", "ste"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), subject.model.parameters(), strict=True))


def test_several_checkpoints_go_into_one_json(folder):
    save(random_gpt(), "other.pt")
    assert diagnose(script.DIAGNOSTIC, "ckpt.pt", "other.pt", "--out", "both") == 0
    first, second = read_json("both/jacobian_energy.json")["checkpoints"]
    assert (first["config"]["normalizer"], second["config"]["normalizer"]) == ("sink", "softmax")
    assert all(row["row_mass"] == pytest.approx(1) for row in second["rows"])
    assert all(0 < row["row_mass"] < 1 for row in first["rows"])
    assert len(list(Path("both").glob("*.png"))) == 2


def test_nan_weights_are_named_and_what_they_spoil_is_null(folder, capsys):
    model = random_gpt()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, :3] = math.nan  # a query of layer 1, head 0
    save(model)
    assert diagnose(script.DIAGNOSTIC, "ckpt.pt") == 0
    report = read_json("diagnostics/jacobian_energy.json")
    notes = "\n".join(report["notes"])
    assert "transformer.h.1.attn.c_attn.weight holds 3 of 192 weights that are NaN or Inf" in notes
    assert "the loss is nan" in notes
    assert "attention weights that are NaN or Inf, in layer.head: 1.0\n" in notes
    assert "score gradients that are NaN or Inf, in layer.head: 0.0, 0.1, 1.0, 1.1\n" in notes
    for mode in ("full", "diagonal", "ste"):
        assert f"\n{mode} gradients that are NaN or Inf: transformer.wte.weight, " in notes
    assert report["summary"]["loss"] is None
    assert report["rows"][0]["entropy"] > 0  # before the damage
    assert all(row["e_full"] is row["cos_diag"] is None for row in report["rows"])
    assert "NaN or Inf" in capsys.readouterr().out


def test_a_gradient_that_overflows_is_named(folder, monkeypatch):
    """Straight through, gradients grow by orders of magnitude a layer; float32 ends at 3e38."""
    save(random_gpt())
    original = gradients.backpropagate

    def overflowing(model, x, y, splits=None):
        loss = original(model, x, y, splits)
        if model.transformer.h[0].attn.backward_mode == "ste":
            model.transformer.ln_f.bias.grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(gradients, "backpropagate", overflowing)
    result = measured()
    assert result.notes[1:] == ["ste gradients that are NaN or Inf: transformer.ln_f.bias"]
    assert (result.summary["gradient_cos_ste"], result.summary["gradient_norm_ratio_ste"]) == (None, None)
    assert result.summary["gradient_cos_diagonal"] > 0


def test_heads_and_parameters_without_a_gradient_are_named(folder):
    model = random_gpt()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:, 4:] = 0  # nothing reads head 1 of layer 1
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    save(model)
    result = measured()
    assert "no gradient reaches the scores, so no ratio and no cosine, in layer.head: 1.1" in result.notes
    row = result.rows[3]
    assert (row["e_full"], row["r_diag"], row["r_offdiag"], row["cos_diag"], row["cos_ste"]) == (0, *4 * [None])
    names = [f"transformer.h.0.{module}.{kind}" for module in ("ln_2", "mlp.c_fc") for kind in ("weight", "bias")]
    assert f"full gradients that are zero: {', '.join(names)}" in result.notes
    assert [row["cos_ste"] for row in result.tables["gradients"] if row["parameter"] in names] == 4 * [None]
    assert result.summary["gradient_cos_ste"] is not None


def test_the_script_has_the_figures_of_shakespeares_nanogpt(tmp_path):
    """In the checkpoint's own float32: six digits still."""
    checkpoint, ids = shakespeares_nanogpt()
    for split in ("train", "val"):
        ids[: 32 * 64 + 1].astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    meta = {"vocab_size": 65, "itos": {i: chr(i) for i in range(65)}, "stoi": {chr(i): i for i in range(65)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    args = arguments(str(checkpoint), "--data", str(tmp_path), "--batches", "1", "--batch-size", "32")
    row = script.measure(Subject(str(checkpoint), args)).rows[3]
    found = [row[name] for name in ("r_diag", "r_lateral", "r_cross", "cos_diag", "cos_ste")]
    assert found == pytest.approx([1.274319, 0.705432, -0.979750, 0.724375, 0.531659], abs=2e-6, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smollm2_has_the_figures_of_an_independent_implementation(smollm2, tmp_path, monkeypatch, dtype):
    """Of layers they give the mean over the heads. The split is the full backward's; the two others, which they have
    not measured, see two tokens here."""
    options = ("--split", "train", "--block-size", 128, "--batches", 1, "--batch-size", 2, "--dtype", dtype)
    subject, known = smollm2_with_known_figures(smollm2, tmp_path, script.DIAGNOSTIC, *options)
    (x, y), *more = subject.batches()
    assert not more
    short = {"full backward": (x, y)}
    monkeypatch.setattr(subject, "batches", lambda what: [short.get(what, (x[:1, :2], y[:1, :2]))])
    result = script.DIAGNOSTIC.measure(subject)
    ours = {(row["layer"], row["head"]): row for row in result.rows}
    for row in known["jacobian"]["heads"]:
        assert_same_split(ours[row["layer"], row["head"]], row, dtype)
    for row in known["jacobian"]["layer_means"]:
        heads = [ours[row["layer"], head] for head in range(9)]
        means = {column: np.mean([head[column] for head in heads]) for column in row if column != "layer"}
        assert_same_split(means, row, dtype)


def assert_same_split(ours: dict, theirs: dict, dtype: str) -> None:
    """In float64 to 1e-8. Float32's part is the gradient that reaches the attention, 30 layers down; the split itself
    is float64. Of a gradient good to 1e-4 (it is, to 6e-5 in layer 0) the energies, which are squares, are good to 2e-4
    and their ratios to 4e-4; and what is a difference of these has the errors of its terms, however small it is."""
    for column, value in theirs.items():
        scale = abs(value)
        if dtype == "float64":
            tolerance = 1e-8 * scale
        else:
            terms = {
                "e_cross": theirs["e_full"] + theirs["e_diag"] + theirs["e_lateral"],
                "r_cross": theirs["r_diag"] + theirs["r_lateral"],  # from 1
                "r_offdiag": theirs["r_diag"],
            }
            tolerance = {"e_": 2e-4, "r_": 4e-4}.get(column[:2], 1e-4) * terms.get(column, scale)
        if column not in ("layer", "head"):
            assert ours[column] == pytest.approx(value, rel=0, abs=tolerance), column
