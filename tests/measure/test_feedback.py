"""How errors travel back, against matrix products by hand, and beside backpropagation."""

import math

import pytest
import torch
from torch.nn import functional as F

from measure.feedback import (
    apply_feedback,
    compare_with_backprop,
    feedback_layers,
    feedback_matrices,
    feedback_metrics,
    signs,
    trained_by,
)
from measure.jacobian import backward_mode
from model import GPT, GPTConfig
from tests.helpers import TODAY, random_ids, tiny_gpt

KINDS = ("fa", "sign_symmetric", "dfa")
IDS = random_ids(3, 13)
X, Y = IDS[:, :-1], IDS[:, 1:]


def gpt(how: str = "backprop", seed: int = 1, **changes) -> GPT:
    return apply_feedback(tiny_gpt(noise=0.3, **{"tie_embeddings": False} | changes).double(), how, seed)


def gradients(model: GPT, with_logits: bool = True) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(X, Y, with_logits=with_logits)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found: dict, expected: dict) -> None:
    """To the rounding of sums of some hundred terms in float64."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-15, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("changes", [{}, TODAY])
def test_the_forward_pass_the_names_and_the_state_dict_are_the_plain_models(how, changes):
    plain, model = gpt(**changes), gpt(how, **changes)
    assert torch.equal(model(X, Y)[1], plain(X, Y)[1])
    torch.testing.assert_close(model(X, Y, with_logits=False)[1], plain(X, Y, with_logits=False)[1])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert (model.num_parameters(), model.flops_per_token()) == (plain.num_parameters(), plain.flops_per_token())
    with torch.no_grad():
        assert torch.equal(model(X)[0], plain(X)[0])


def test_with_the_weights_in_place_of_the_random_matrices_fa_is_backpropagation():
    for changes in ({}, TODAY, {"normalizer": "sink", "backward": "ste"}):
        plain = gpt(**changes)
        weights = {
            name: p.detach() for name, p in plain.named_parameters() if name in feedback_layers(gpt("fa", **changes))
        }
        expected = gradients(plain)
        with trained_by(plain, "fa", weights):
            assert_close(gradients(plain), expected)
            assert_close(gradients(plain, with_logits=False), expected)
        assert not feedback_layers(plain)


@pytest.mark.parametrize("how", KINDS)
def test_every_layers_gradients_are_the_products_of_its_definition(how):
    """From hooks on the layers: x, the gradient that arrives at the output and the one that leaves at the input."""
    model, seen = gpt(how), {}

    def hook_for(name):
        def hook(layer, inputs, out):
            (x,) = inputs
            seen[name] = {"x": x.detach()}
            out.register_hook(lambda g: seen[name].update(g=g))
            x.register_hook(lambda g: seen[name].update(into=g))

        return hook

    layers = feedback_layers(model)
    assert set(layers) == {"lm_head.weight"} | {
        f"transformer.h.{i}.{n}.weight"
        for i in (0, 1)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name, layer in layers.items():
        layer.register_forward_hook(hook_for(name))
    found = gradients(model)
    logits = gpt()(X)[0].detach().requires_grad_()
    error = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), Y.flatten()), logits)[0].flatten(0, 1)
    for name, layer in layers.items():
        W, B = layer.weight.detach(), layer.feedback
        x, g, into = (seen[name][key].flatten(0, 1) for key in ("x", "g", "into"))
        if how == "dfa":
            torch.testing.assert_close(g, error if name == "lm_head.weight" else error @ B, rtol=1e-10, atol=1e-16)
            back = W
        else:
            back = B if how == "fa" else W.sign() * W.norm() / math.sqrt(W.numel())
        expected = {"into": g @ back, name: g.T @ x}
        if layer.bias is not None:
            expected[name.replace("weight", "bias")] = g.sum(0)
        assert_close({"into": into} | {key: found[key] for key in expected if key != "into"}, expected)
    if how == "fa":
        assert torch.equal(found["lm_head.weight"], gradients(gpt())["lm_head.weight"])  # no feedback lies after it


def test_two_layers_by_hand():
    """x → W1 → tanh → W2, of which the loss is quadratic: fa, in numbers."""
    model = gpt("fa").transformer.h[0].mlp
    W1, b1, B1 = model.c_fc.weight, model.c_fc.bias, model.c_fc.feedback
    W2, B2 = model.c_proj.weight, model.c_proj.feedback
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    model.c_proj(torch.tanh(model.c_fc(x))).square().sum().backward()
    h = torch.tanh(x @ W1.T + b1)
    e = 2 * (h @ W2.T + model.c_proj.bias)
    delta = (e @ B2) * (1 - h**2)
    for found, expected in ((W2.grad, e.T @ h), (W1.grad, delta.T @ x), (b1.grad, delta.sum(0)), (x.grad, delta @ B1)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", KINDS)
def test_the_normalizers_backward_stays_a_choice_of_its_own(how):
    full, ste = gradients(gpt(how)), gradients(gpt(how, backward="ste"))
    differ = {name for name in full if not torch.allclose(full[name], ste[name], rtol=1e-6)}
    if how == "dfa":  # between c_attn and c_proj nothing learns from what flows back through the normalizer
        assert not differ
    else:
        assert {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)} <= differ
        assert "lm_head.weight" not in differ


def test_matrices_are_of_the_weights_first_distribution_and_a_function_of_seed_and_name():
    config = GPTConfig(block_size=4, vocab_size=300, n_layer=2, n_head=2, n_embd=64, tie_embeddings=False)
    torch.manual_seed(0)
    fresh = {name: p.std().item() for name, p in GPT(config).named_parameters()}
    drawn = feedback_matrices(apply_feedback(GPT(config), "fa", 5))
    for name, matrix in drawn.items():  # at least 4,096 numbers each: the standard deviation to 5 of its own errors
        assert matrix.std().item() == pytest.approx(fresh[name], rel=10 / math.sqrt(2 * 4096)), name
        assert abs(matrix.mean().item()) < 5 * fresh[name] / math.sqrt(4096)
    assert len({matrix.flatten()[0].item() for matrix in drawn.values()}) == len(drawn)
    torch.manual_seed(1)
    deeper = feedback_matrices(apply_feedback(GPT(GPTConfig(**vars(config) | {"n_layer": 3})), "fa", 5))
    shared = [name for name in drawn if not name.endswith("c_proj.weight")]  # whose size goes with the depth
    assert all(torch.equal(drawn[name], deeper[name]) for name in shared)
    other = feedback_matrices(apply_feedback(GPT(config), "fa", 6))
    assert not any(torch.equal(drawn[name], other[name]) for name in drawn)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    tied = tiny_gpt()
    with pytest.raises(ValueError, match="head of its own"):
        apply_feedback(tied, "fa")
    model, matrices = gpt(), feedback_matrices(gpt("fa"))
    for wrong in ({}, matrices | {"lm_head.weight": torch.zeros(2, 2)}, feedback_matrices(gpt("dfa"))):
        with pytest.raises(ValueError, match="not those of fa in this model"):
            apply_feedback(model, "fa", matrices=wrong)
    assert not feedback_layers(model)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_those_of_float32_to_the_half_types_rounding(how, dtype):
    model = apply_feedback(tiny_gpt(noise=0.3, tie_embeddings=False), how, 1)
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(X, Y, with_logits=False)[1]
    (1024 * loss).backward()  # as training scales it: float16 would flush the smallest to zero
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        # Some tens of roundings of half an ε each, one after the other, of random signs: a few ε.
        assert (p.grad / 1024 - exact[name]).norm() <= 8 * torch.finfo(dtype).eps * exact[name].norm(), name


@pytest.mark.parametrize("how", ["fa", "sign_symmetric"])
def test_a_compiled_model_has_the_eager_ones_gradients(how):
    torch.compiler.reset()
    model = gpt(how)
    expected = gradients(model)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(X, Y, with_logits=False)[1].backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def test_angles_and_norm_ratios():
    model = gpt("fa")
    found = feedback_metrics(model)
    pairs = {name: (layer.weight.detach(), layer.feedback) for name, layer in feedback_layers(model).items()}
    for name, pair in list(pairs.items()):  # q, k and v, each of the width of the stream, one below the other
        if "c_attn" in name:
            thirds = zip("qkv", *(x.split(x.size(1)) for x in pair), strict=True)
            pairs |= {f"{name}[{part}]": own for part, *own in thirds}
    for name, pair in pairs.items():
        W, B = (x.flatten() for x in pair)
        angle = torch.rad2deg(torch.acos(F.cosine_similarity(W, B, dim=0))).item()
        assert found.pop(f"feedback/angle/{name}") == pytest.approx(angle, rel=1e-9)
        assert found.pop(f"feedback/norm_ratio/{name}") == pytest.approx((B.norm() / W.norm()).item(), rel=1e-9)
    assert not found
    gaussian = apply_feedback(tiny_gpt(std=1.0, tie_embeddings=False, n_embd=64), "sign_symmetric")
    angles = feedback_metrics(gaussian)
    assert all(name.startswith("feedback/angle/") for name in angles)
    # cos(w, sign w) = E|w| / √E w² = √(2/π), and a thousand numbers give it to a few percent: 37 degrees
    assert all(
        angle == pytest.approx(math.degrees(math.acos(math.sqrt(2 / math.pi))), abs=2) for angle in angles.values()
    )
    weight = torch.randn(7, 5)
    assert signs(weight).norm().item() == pytest.approx(weight.norm().item(), rel=1e-6)
    assert feedback_metrics(gpt("dfa")) == feedback_metrics(gpt()) == {}


@pytest.mark.parametrize("how", KINDS)
def test_a_comparison_is_of_the_two_gradients_of_the_same_batches(how):
    """Sequence by sequence in one, the whole batch here; the model is plain again afterwards."""
    model, matrices = gpt(backward="ste"), feedback_matrices(gpt(how))
    found = compare_with_backprop(model, how, matrices, lambda _: [(X, Y)])
    assert not feedback_layers(model)
    assert [block.attn.backward_mode for block in model.transformer.h] == ["ste", "ste"]
    true, own = gradients(gpt()), gradients(gpt(how))
    for name, products in found.products.items():
        expected = [(a * b).sum().item() for a, b in ((own[name], true[name]), (own[name],) * 2, (true[name],) * 2)]
        assert products.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert [len(split) for split in found.splits] == [3, 3]

    seen: dict[str, torch.Tensor] = {}
    with backward_mode(model, "full"), trained_by(model, how, matrices):
        head, norm = model.lm_head, model.transformer.h[1].ln_2
        for name, module in (("lm_head", head), ("transformer.h.1.ln_2", norm)):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: (
                    seen.update({f"{name} h": out.detach()}),
                    out.register_hook(lambda g: seen.update({f"{name} g": g})),
                )[0]
            )
        gradients(model)
    for name in ("lm_head", "transformer.h.1.ln_2"):
        for key, of in (("h_norm", "h"), ("g_norm", "g")):
            rms = seen[f"{name} {of}"].norm(dim=-1).square().mean().sqrt().item()
            assert found.norms[name][key] == pytest.approx(rms, rel=1e-9)
    assert found.norms["lm_head"]["backprop_g_norm"] == pytest.approx(found.norms["lm_head"]["g_norm"], rel=1e-9)
    assert "transformer.wpe" not in found.norms  # which is read, and not run
