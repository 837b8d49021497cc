"""scripts/activation_kurtosis.py: what is planted in a model is found and named, in checkpoints of every format."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness.batches import gather
from harness.corpus import Corpus
from harness.diagnostics import Result, Subject, argument_parser, run
from harness.diagnostics.activation_kurtosis import DIAGNOSTIC
from harness.figures import new_figure
from harness.pretrained import save_hf
from measure.activations import Activations
from measure.probe import watch
from model import GPT
from tests.helpers import TODAY, read_json, save_model, smollm2_with_known_figures, tiny_gpt

T, V, C, H, LAYERS = 10, 13, 8, 2, 2


NO_PICTURE = replace(DIAGNOSTIC, draw=lambda result, title: new_figure()[0])  # a real one takes seconds


def probed_gpt(normalizer: str = "softmax", std: float = 0.7) -> GPT:
    return tiny_gpt(std=std, block_size=T, vocab_size=V, normalizer=normalizer)


def measured(model: GPT, corpus: Path, *arguments: str) -> dict:
    """What the script writes about a checkpoint of the model."""
    path = save_model(model, corpus.parent / "run" / "ckpt.pt")
    run(NO_PICTURE, [str(path), "--device", "cpu", "--data", str(corpus), *arguments])
    return read_json(path.parent / "diagnostics" / "activation_kurtosis.json")


def measured_result(model: GPT, corpus: Path) -> Result:
    """The same before it is written, on two windows."""
    path = save_model(model, corpus.parent / "run.pt")
    parser = argument_parser("activation_kurtosis", "", 1, 2)
    return DIAGNOSTIC.measure(
        Subject(str(path), parser.parse_args([str(path), "--device", "cpu", "--data", str(corpus)]))
    )


def the_note(result: dict, start: str) -> str:
    (note,) = [note for note in result["notes"] if note.startswith(start)]
    return note


def test_what_has_no_value_is_null_and_a_cross_in_the_picture(corpus):
    """q of layer 1, head 0 is NaN, and so is what comes after."""
    model = probed_gpt()
    model.transformer.h[1].attn.c_attn.bias.data[0] = math.nan
    result = measured_result(model, corpus)
    assert [head["entropy"] is None for head in result.tables["heads"]] == [False, False, True, False]
    assert result.summary["entropy"] is None
    panels = {panel.get_title(loc="left"): panel for panel in DIAGNOSTIC.draw(result, "broken").axes}
    assert {"All elements pooled", "Sink rate", "Row mass", "Entropy"} <= set(panels)
    assert [text.get_text() for text in panels["Entropy"].texts].count("×") == 1
    labels = panels["All elements pooled"].get_legend_handles_labels()[1]
    assert "heads' output" in labels  # the attention itself is another line
    assert "attention weights" in labels


def test_where_the_corpus_has_triggers_every_table_has_the_figures_of_their_queries(corpus):
    meta = read_json(corpus / "meta.json")
    (corpus / "meta.json").write_text(json.dumps(meta | {"triggers": list(range(0, V, 2))}))
    result = measured_result(probed_gpt("softmax1"), corpus)
    for kind in ("trigger", "ordinary"):
        raw, over = f"first_token_{kind}", f"first_token_{kind}_over_row_mass"
        heads, layers = result.tables["heads"], result.tables["layers"]
        assert all(head[over] > head[raw] > 0 for head in heads)  # the null slot takes its share of a row
        means = [np.mean([head[over] for head in heads if head["layer"] == layer]) for layer in range(LAYERS)]
        assert [layer[over] for layer in layers] == pytest.approx(means)
        assert result.summary[over] == pytest.approx(np.mean(means))


def test_nothing_is_found_in_a_gaussian_model(corpus):
    """Of a seed with which none of the 8 channels lies far above the median by chance."""
    result = measured(tiny_gpt(4, std=0.1, block_size=T, vocab_size=V), corpus)
    (protocol,) = (note for note in result["notes"] if not note.startswith("max "))  # where the maxima are, no finding
    assert "20 sequences of T = 10 tokens" in protocol
    assert (result["summary"]["T"], result["summary"]["sequences"]) == (10, 20)


def test_a_planted_outlier_channel_is_found_and_named(corpus, capsys):
    model = probed_gpt(std=0.1)
    model.transformer.wte.weight.data[:, 5] += 30
    result = measured(model, corpus)
    note = the_note(result, "outlier channels of the residual stream after the block, other tokens")
    assert "tokens: 5 (RMS " in note
    assert "2 of 2" in note
    assert note in capsys.readouterr().out
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["transformer.h.1 [other tokens]"]["outlier_channels"] == [5]
    assert rows["transformer.h.1"]["channel_rms_kurtosis"] > 0.9 * C  # C where one channel has everything
    assert not [note for note in result["notes"] if "spike" in note]


def test_a_planted_first_token_spike_is_found_and_named(corpus, capsys):
    model = probed_gpt(std=0.1)
    model.transformer.wpe.weight.data[0, 6] = 500
    result = measured(model, corpus)
    note = the_note(result, "first-token spike in transformer.h.1,")
    assert "channel 6" in note
    assert note in capsys.readouterr().out
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["transformer.h.1 [first token]"]["max_abs"] > 400
    assert rows["transformer.h.1 [other tokens]"]["max_abs"] < 40
    assert rows["transformer.h.1 [other tokens]"]["outlier_channels"] == []


def test_a_planted_sink_head_is_found_and_named(corpus, capsys):
    """The first position has a direction of its own, which the keys of layer 1, head 1 look for whatever the query."""
    model = probed_gpt(std=0.1)
    model.transformer.wpe.weight.data[0, 6] = 500
    attn = model.transformer.h[1].attn.c_attn
    D = C // H
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight.fill_(1)
        attn.bias[D] = 50  # of q, head 1
        attn.weight[C + D] = torch.eye(C)[6]  # of k, head 1
    result = measured(model, corpus)
    note = the_note(result, "sink heads")
    assert note.endswith(": 1.1 (100%)")
    assert note in capsys.readouterr().out
    heads = {(head["layer"], head["head"]): head for head in result["heads"]}
    assert heads[1, 1]["sink_rate"] == 1
    assert heads[1, 1]["entropy"] < 0.1 < heads[1, 0]["entropy"]
    assert all(head["sink_rate"] < 0.5 for where, head in heads.items() if where != (1, 1))


def test_what_is_not_finite_is_named_and_not_averaged_away(corpus):
    model = probed_gpt()
    model.transformer.h[1].mlp.c_proj.bias.data[3] = math.inf
    result = measured(model, corpus)
    notes = [note for note in result["notes"] if "infinite" in note]
    assert any(note.startswith("transformer.h.1.mlp.c_proj: 200 of its 1600 numbers") for note in notes)
    assert not any(note.startswith(("transformer.h.0", "transformer.h.1.ln", "transformer.drop")) for note in notes)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["transformer.h.1.mlp.c_proj"]["per_sequence_max_abs"] is None
    for name in ("avg kurtosis", "max kurtosis", "max infinity norm"):
        assert result["summary"][name] is None
    assert result["summary"]["kurtosis of attention probabilities"] is not None


def test_a_kurtosis_that_does_not_exist_has_a_note(corpus):
    model = probed_gpt()
    torch.nn.init.zeros_(model.transformer.h[0].mlp.c_proj.weight)
    torch.nn.init.zeros_(model.transformer.h[0].mlp.c_proj.bias)
    result = measured(model, corpus)
    assert result["summary"]["avg kurtosis"] is result["summary"]["max kurtosis"] is None
    notes = [note for note in result["notes"] if "no kurtosis" in note]
    assert notes == ["transformer.h.0.mlp.c_proj: all equal to 0, so it has no kurtosis"]  # once, not for its parts too


def test_bondarenkos_summary_is_over_their_tensors(corpus):
    result = measured(probed_gpt("softmax1"), corpus)
    parts = ("", ".ln_1", ".ln_2", ".attn.c_proj", ".mlp.c_proj")
    theirs = ["transformer.ln_f", *(f"transformer.h.{layer}{part}" for layer in range(LAYERS) for part in parts)]
    rows = {row["name"]: row for row in result["rows"]}
    kurtoses, norms = ([rows[name][f"per_sequence_{what}"] for name in theirs] for what in ("kurtosis", "max_abs"))
    assert result["summary"]["avg kurtosis"] == pytest.approx(np.mean(kurtoses), rel=1e-12)
    assert result["summary"]["max kurtosis"] == max(kurtoses)
    assert result["summary"]["max infinity norm"] == max(norms)


@pytest.mark.parametrize("format", ["nanoGPT", "quietGPT, softmax", "quietGPT, softmax1", "Hugging Face"])
def test_checkpoints_of_every_format_are_measured_as_what_they_are(corpus, tmp_path, format):
    model = probed_gpt("softmax1" if format.endswith("softmax1") else "softmax")
    if format == "nanoGPT":
        model = GPT(replace(model.config, activation="gelu")).eval()
    path, args, state = tmp_path / "ckpt.pt", asdict(model.config), model.state_dict()
    if format == "Hugging Face":
        pytest.importorskip("transformers")
        save_hf(model, tmp_path / "gpt2")
        path = f"hf:{tmp_path / 'gpt2'}"
    else:
        for key in ("normalizer", "backward", "activation"):
            del args[key]
        if format.startswith("quietGPT"):
            args["use_softmax1"] = format.endswith("softmax1")
            state |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, T, T).tril() for layer in range(LAYERS)}
        state = {f"_orig_mod.{name}": value for name, value in state.items()}
        torch.save({"model": state, "model_args": args, "iter_num": 3}, path)
    arguments = ("--device", "cpu", "--data", str(corpus), "--batch-size", "20", "--out", str(tmp_path))
    run(NO_PICTURE, [str(path), *arguments])
    val = Corpus(corpus, verify=()).tokens["val"]
    expected = Activations(model).update(gather(val, T * np.arange(20), T, torch.device("cpu"))[0])
    rows = {row["name"]: row for row in json.loads((tmp_path / "activation_kurtosis.json").read_text())["rows"]}
    for name, tensor in expected.tensors.items():
        # the same float32 operations on the same weights
        assert rows[name]["excess_kurtosis"] == pytest.approx(tensor.all.moments.excess_kurtosis, rel=1e-5, abs=1e-5)


def test_the_batches_are_those_of_the_split_and_the_count(corpus):
    """Whole windows alone, spread evenly: of the 20 of val, 4."""
    model = probed_gpt()
    result = measured(model, corpus, "--batches", "2", "--batch-size", "2")
    val = Corpus(corpus, verify=()).tokens["val"]
    idx = gather(val, T * np.array([0, 6, 12, 19]), T, torch.device("cpu"))[0]
    rows = {row["name"]: row for row in result["rows"]}
    expected = Activations(model).update(idx).tensors["lm_head"].all.moments.excess_kurtosis
    assert rows["lm_head"]["excess_kurtosis"] == pytest.approx(expected, rel=1e-4)  # float32, other batch sizes


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1"])
def test_sinks_drains_and_massive_activations_are_those_of_the_definitions(corpus, normalizer):
    """In float64, of a model of today on windows of 7 tokens that a begin-of-text token starts."""
    model = tiny_gpt(3, std=0.6, block_size=T, vocab_size=V, **TODAY | {"normalizer": normalizer})
    model.transformer.wte.weight.data[0, 5] = 4000  # of the begin-of-text token alone, in every layer after it
    options = ("--dtype", "float64", "--block-size", "8", "--bos", "0", "--batches", "3", "--batch-size", "2")
    result = measured(model, corpus, *options)
    tokens = Corpus(corpus, verify=()).tokens["val"].astype(np.int64)
    offsets = 8 * np.linspace(0, 24, 6).astype(np.int64)  # 25 whole windows
    idx = torch.from_numpy(np.stack([np.append(0, tokens[o : o + 7]) for o in offsets]))
    seen: list[dict] = []
    model = model.double()
    for block in model.transformer.h:
        at: dict = {}
        block.attn.core.register_forward_pre_hook(lambda _, qkv, at=at: at.update(qkv=qkv))
        block.register_forward_hook(lambda _, x, h, at=at: at.update(h=h))
        seen.append(at)
    with torch.no_grad():
        model(idx)
    rows, heads = {row["name"]: row for row in result["rows"]}, {(h["layer"], h["head"]): h for h in result["heads"]}
    for layer, at in enumerate(seen):
        (q, k, v), h = (x.numpy() for x in at["qkv"]), np.abs(at["h"].numpy())
        for head in range(4):
            scores = np.einsum("bid,bjd->bij", q[:, head], k[:, head // 2]) / 6**0.5
            visible = np.tril(np.ones((8, 8), dtype=bool))
            weights = np.where(visible, np.exp(scores), 0)
            weights /= weights.sum(-1, keepdims=True) + (normalizer == "softmax1")
            first, mass, norms = weights[..., 0], weights.sum(-1), np.linalg.norm(v[:, head // 2], axis=-1)
            expected = {
                "sink_rate": (first.mean(-1) > 0.3).mean(),
                "sink_rate_over_row_mass": ((first / mass).mean(-1) > 0.3).mean(),
                "first_mass": first.mean(),
                "first_mass_without_query0": first[:, 1:].mean(),
                "first_mass_over_row_mass": (first / mass).mean(),
                "dormant": (first[:, 1:] > 0.9).mean(),
                "row_mass": mass.mean(),
                "null_mass": 1 - mass.mean(),
                "max_score": scores[:, visible].max(),
                "value_drain": norms[:, 0].mean() / norms[:, 1:].mean(),
            }
            found = heads[layer, head]
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
        norms, values = (np.linalg.norm(x, axis=-1) for x in (h, v.transpose(0, 2, 1, 3).reshape(6, 8, -1)))
        median, at = np.sort(h, axis=None)[(h.size - 1) // 2], np.unravel_index(h.argmax(), h.shape)
        where = sorted({tuple(place[1:]) for place in np.argwhere(h > max(100, 1000 * median)).tolist()})
        row = rows[f"transformer.h.{layer}"]
        assert row["max_at"] == list(at)
        whole = values[:, 0].mean() / values[:, 1:].mean()
        assert rows[f"transformer.h.{layer}.attn.v"]["first_norm_ratio"] == pytest.approx(whole, rel=1e-9)
        assert row["massive_at"] == [list(place) for place in where]
        assert (0, 5) in where
        expected = {
            "residual_peak": norms[:, 0].mean() / norms[:, 1:].mean(),
            "value_drain": np.mean([heads[layer, head]["value_drain"] for head in range(4)]),
            "max_over_median": h.max() / median,
            "max_abs": h.max(),
            "sink_rate": np.mean([heads[layer, head]["sink_rate"] for head in range(4)]),
            "max_score": max(heads[layer, head]["max_score"] for head in range(4)),
        }
        found = result["layers"][layer]
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert (found["token"], found["channel"], found["massive"]) == (*at[1:], True)
    assert result["summary"]["residual_peak"] == max(row["residual_peak"] for row in result["layers"])
    assert result["summary"]["value_drain"] == min(row["value_drain"] for row in result["layers"])
    assert result["summary"]["massive_layers"] == 2
    note = the_note(result, "massive activations of the residual stream after the block")
    assert "token 0 channel 5 (2 of 2)" in note


# --- a real model -----------------------------------------------------------------------------------------------------

THEIR_TENSORS = {
    "embedding": "transformer.drop",
    "input_norm": "transformer.h.{}.ln_1",
    "attention_projection": "transformer.h.{}.attn.c_proj",
    "post_attention_norm": "transformer.h.{}.ln_2",
    "mlp_output": "transformer.h.{}.mlp.c_proj",
    "block_output": "transformer.h.{}",
    "final_norm": "transformer.ln_f",
}
OF_TENSORS = {  # their names for a tensor's figures → ours
    "max_abs": "max_abs",
    "max_abs_over_std": "max_abs_over_std",
    "median_abs": "median_abs",
    "max_over_median": "max_over_median",
    "residual_peak": "first_norm_ratio",
    "mean": "mean",
    "std": "std",
    "pooled_excess_kurtosis": "excess_kurtosis",
    "per_token_kurtosis": "per_token_kurtosis",
    "per_sequence_kurtosis_nonexcess": "per_sequence_kurtosis",
    "per_sequence_max_abs": "per_sequence_max_abs",
    "channel_rms_kurtosis": "channel_rms_kurtosis",
}
OF_FIRST = {"first_norm": "mean_norm", "per_token_kurtosis_first": "per_token_kurtosis"}
OF_OTHERS = {
    "other_norm": "mean_norm",
    "max_abs_others": "max_abs",
    "pooled_excess_kurtosis_others": "excess_kurtosis",
    "per_token_kurtosis_others": "per_token_kurtosis",
    "channel_rms_kurtosis_others": "channel_rms_kurtosis",
}
OF_LAYERS = {
    "first_mass": "first_mass",
    "first_mass_without_query0": "first_mass_without_query0",
    "entropy": "entropy",
    "max_logit": "max_score",
    "value_norm_ratio": "value_drain",
}
OF_HEADS = OF_LAYERS | {"row_mass": "row_mass"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smollm2_has_the_figures_of_an_independent_implementation(smollm2, tmp_path, dtype):
    """Rates and places exactly, the rest to the dtype's rounding. Under RMSNorm a token that is one channel alone has
    √C times that channel's gain there, whatever its size: several of them tie for the largest element of layer 28's
    ln_2, to a few roundings (`tie`). There, theirs has to be as large as ours."""
    rounding, tie = {"float32": (1e-4, 1e-6), "float64": (1e-8, 1e-9)}[dtype]
    options = ("--block-size", 64, "--batches", 4, "--batch-size", 4, "--dtype", dtype)
    subject, known = smollm2_with_known_figures(smollm2, tmp_path, DIAGNOSTIC, *options)
    theirs, text = known["T64"], torch.tensor(known["tokens"]).view(16, 64)
    tensors = {
        THEIR_TENSORS[row["where"]].format(row["layer"]): row for row in theirs["activations"] + theirs["block_outputs"]
    }
    losses: list[float] = []
    largest: dict[str, list[torch.Tensor]] = {}  # the channel in which theirs have it, of each sequence and token

    def see(name: str, x: torch.Tensor) -> None:
        if name == "lm_head":
            targets = text[len(losses) :, 1:]
            losses.extend(F.cross_entropy(one[:-1], y).item() for one, y in zip(x, targets, strict=False))
        elif name in tensors:
            largest.setdefault(name, []).append(x[..., tensors[name]["max_at"]["channel"]].clone())

    with watch(subject.model, see, lambda *_: None):
        result = DIAGNOSTIC.measure(subject)
    rows = {row["name"]: row for row in result.rows}

    def same(ours: dict, their: dict, names: dict[str, str]) -> None:
        assert {name: ours[own] for name, own in names.items()} == pytest.approx(
            {name: their[name] for name in names}, rel=rounding, abs=0
        )

    assert losses == pytest.approx(theirs["losses"], rel=rounding)
    ties = []
    for name, row in tensors.items():
        parts = {"": OF_TENSORS, " [first token]": OF_FIRST, " [other tokens]": OF_OTHERS}
        for part, names in parts.items():
            same(rows[name + part], row, names)
        for part, channels in zip(parts, ("", "_first", "_others"), strict=True):
            assert sorted(rows[name + part]["outlier_channels"]) == row[f"outlier_channels{channels}"], name
        assert rows[name]["massive_at"] == row["massive_at"], name
        assert bool(rows[name]["massive_at"]) == row["massive"]
        *place, _, value = row["max_at"].values()
        there = torch.cat(largest[name])[tuple(place)].item()
        assert there == pytest.approx(value, rel=rounding)
        if rows[name]["max_at"] != [*place, row["max_at"]["channel"]]:
            ties.append(name)
            assert abs(there) == pytest.approx(rows[name]["max_abs"], rel=tie)
    assert set(ties) <= {"transformer.h.28.ln_2"}
    for ours, head in zip(result.tables["heads"], theirs["heads"], strict=True):
        assert [ours[x] for x in ("layer", "head", "sink_rate")] == [head[x] for x in ("layer", "head", "sink_rate")]
        same(ours, head, OF_HEADS)
    for number, (ours, layer) in enumerate(zip(result.tables["layers"], theirs["layers"], strict=True)):
        assert (ours["layer"], ours["sink_rate"]) == (number, pytest.approx(layer["sink_rate"], rel=1e-9))
        same(ours, layer, OF_LAYERS)
    assert result.summary["sink_rate"] == pytest.approx(theirs["sink_rate"], rel=1e-9)
    same(result.summary, theirs, {x: x for x in ("first_mass", "entropy", "row_mass")})
