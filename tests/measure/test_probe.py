"""Looking inside a model at its one seam: what hooks on attn.core see is what the attention computes with."""

import math

import pytest
import torch

from measure.activations import Activations
from measure.jacobian import backpropagate, jacobian_energy, pool
from measure.outliers import activation_metrics
from measure.probe import capture_attention, capture_qk, rows_of_c_attn, watch
from measure.quantize import PROBABILITIES, sites, visiting
from measure.slopes import attention_slopes, float64_copy, random_direction
from model import GPT
from tests.helpers import TODAY, tiny_gpt

T, H, H_KV, D = 12, 4, 2, 6


@pytest.fixture(
    params=[
        ("softmax", False, "none"),
        ("softmax1", True, "head"),
        ("sink", False, "element"),
        ("kvbias", False, "none"),
        ("ssmax", False, "none"),
    ],
    ids=["softmax", "softmax1 parallel gate", "sink gate", "kvbias", "ssmax"],
)
def model(request) -> GPT:
    """A model of today: grouped queries, normed and rotated before they enter the scores, and a gated MLP."""
    normalizer, parallel, gate = request.param
    own = {"normalizer": normalizer, "parallel_residual": parallel, "gate": gate, "qkv_bias": True}
    return tiny_gpt(3, std=0.7, vocab_size=64, **TODAY | own).double()


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(64, (3, T), generator=torch.Generator().manual_seed(0))


def rms_norm(x: torch.Tensor, norm) -> torch.Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, 6): channels i and i + 3 as a complex number, turned by position · 100^(−i/3)."""
    turns = torch.exp(1j * torch.outer(torch.arange(T).double(), 100.0 ** -(torch.arange(3).double() / 3)))
    z = torch.complex(x[..., :3], x[..., 3:]) * turns
    return torch.cat((z.real, z.imag), dim=-1)


def heads_of(attn, x):
    """q (B, 4, T, 6) as they enter the scores, k, v of four heads, each of the two twice."""
    q, k, v = (z.unflatten(-1, (-1, D)).transpose(1, 2) for z in attn.c_attn(x).split([24, 12, 12], dim=-1))
    q, k = rotated(rms_norm(q, attn.q_norm)), rotated(rms_norm(k, attn.k_norm))
    if attn.normalizer == "ssmax":
        q = q * attn.ssmax_scale.view(H, 1, 1) * torch.arange(1, T + 1).log().view(T, 1)
    return q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]


def null_slot(attn, q) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The score of each query's null slot (B, 4, T, 1), or None, and the slot's value (4, 1, 6)."""
    if attn.normalizer == "kvbias":
        key, value = (x[[0, 0, 1, 1], None] for x in (attn.null_key, attn.null_value))
        return q @ key.mT / math.sqrt(D), value
    null = {"softmax": None, "ssmax": None, "softmax1": torch.zeros(H), "sink": getattr(attn, "sink", None)}[
        attn.normalizer
    ]
    return None if null is None else null.to(q).view(1, H, 1, 1).expand(*q.shape[:3], 1), q.new_zeros(H, 1, D)


def expected_of(model: GPT, idx) -> list[tuple]:
    """(q, k, v, P with the null slot last or without, the MLP's hidden layer) of each layer, k and v repeated for the
    query heads that read them, in the blocks' own steps."""
    found, x = [], model.transformer.wte(idx)
    for block in model.transformer.h:
        q, k, v = heads_of(block.attn, rms_norm(x, block.ln_1))
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(future, -math.inf)
        null, _ = null_slot(block.attn, q)
        P = (scores if null is None else torch.cat((scores, null), -1)).softmax(-1)
        output = side_by_side(output_of(block.attn, P, v))
        if (gate := block.attn.c_gate) is not None:
            opening = 1 / (1 + (-rms_norm(x, block.ln_1) @ gate.weight.T).exp())
            output = output * opening.repeat_interleave(output.size(-1) // opening.size(-1), -1)
        attended = x + block.attn.c_proj(output)
        normed = rms_norm(x if block.parallel_residual else attended, block.ln_2)
        gate = block.mlp.c_gate(normed)
        hidden = gate * gate.sigmoid() * block.mlp.c_fc(normed)
        found.append((q, k, v, P, hidden))
        x = attended + block.mlp.c_proj(hidden)
    return found


def output_of(attn, P, v) -> torch.Tensor:
    return P[..., :T] @ v + P[..., T:].sum(-1, keepdim=True) * null_slot(attn, v)[1]


def close(found, expected, rtol=1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


def side_by_side(x):
    return x.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_queries_and_keys_are_seen_as_they_enter_the_scores(model, idx):
    expected, tensors, attended = expected_of(model, idx), {}, []
    with capture_qk(model) as captured:
        model(idx)
    with watch(model, tensors.__setitem__, lambda *seen: attended.append(seen)):
        model(idx)
    for layer, (q, k, v, P, hidden) in enumerate(expected):
        for attn, *seen in (captured[layer], attended[layer][1:]):
            assert attn is model.transformer.h[layer].attn
            close(seen, [q, k[:, ::2], v[:, ::2]][: len(seen)])
        name = f"transformer.h.{layer}"
        output = output_of(attn, P, v)
        for part, x in (("q", q), ("k", k[:, ::2]), ("v", v[:, ::2]), ("output", output)):
            close(tensors[f"{name}.attn.{part}"], side_by_side(x))
        close(tensors[f"{name}.mlp.hidden"], hidden)


@torch.no_grad()
def test_the_attention_measured_is_that_of_the_rotated(model, idx):
    expected = expected_of(model, idx)
    kurtoses = []
    activations = Activations(model).update(idx)
    for layer, (*_, P, _) in enumerate(expected):
        found, keys = activations.attention[layer], P[..., :T]
        close(found.row_mass, keys.sum(-1).mean((0, 2)))
        close(found.entropy, torch.special.entr(P).sum(-1).mean((0, 2)))
        close(found.sink_rate, (keys[..., 0].mean(-1) > 0.3).double().mean(0))
        d = keys - keys.mean()
        kurtoses.append((d**4).mean() / (d**2).mean() ** 2 - 3)
        assert found.all.moments.excess_kurtosis == pytest.approx(kurtoses[-1].item(), rel=1e-9)
    logged = activation_metrics(model, idx)["activation_kurtosis/attention_probabilities"]
    assert logged == pytest.approx(sum(kurtoses).item() / 2, rel=1e-9)


def test_the_gradient_split_is_that_of_the_rotated(model, idx):
    expected = expected_of(model, idx)
    with capture_attention(model) as captured:
        model(idx, idx)[1].backward()
    splits = [[], []]
    model.zero_grad()
    backpropagate(model, idx, idx, splits)
    for layer, (q, k, v, P, _) in enumerate(expected):
        seen, attn = captured[layer], model.transformer.h[layer].attn
        close([seen.q, seen.k, seen.v], [x.detach() for x in (q, k[:, ::2], v[:, ::2])])
        c_attn_v = (P[..., :T].mT @ seen.grad_out).unflatten(1, (H_KV, 2)).sum(2)  # both query heads' of a group
        # the gradient of v's bias is that of v, over batch and positions
        close(c_attn_v.sum((0, 2)).flatten(), gradient_of_bias(model, idx, layer)[-H_KV * D :], rtol=1e-8)
        _, null_value = null_slot(attn, q)
        s, g, A = score_gradients(P, torch.cat((v, null_value.expand(3, H, 1, D)), 2), seen.grad_out)
        d = A * (1 - A) * g
        energies = {"e_full": s, "e_diag": d, "e_lateral": s - d}
        found = pool(splits[layer])
        for name, x in energies.items():
            close(found[name], x.square().sum((0, 2, 3)), rtol=1e-8)
        for name, x in (("cos_diag", d), ("cos_ste", g)):
            close(found[name], torch.cosine_similarity(x.flatten(2), s.flatten(2), dim=-1).mean(0), rtol=1e-8)
        whole = jacobian_energy(seen.q, seen.k, seen.v, seen.grad_out, **attn.arguments())
        for name, value in found.items():
            close(value, whole[name], rtol=1e-8)


def test_a_null_key_of_another_shape_is_no_part_of_a_split():
    x, null = torch.zeros(1, 4, 3, D), torch.zeros(1, D)
    with pytest.raises(ValueError, match=rf"null_key \(1, {D}\): need one for each head of keys, \(4, {D}\)"):
        jacobian_energy(x, x, x, x, "kvbias", null_key=null, null_value=null)


def score_gradients(P, v, grad_out) -> tuple[torch.Tensor, ...]:
    """dL/dS by autograd, g = dL/dA over the visible keys, and A, (B, H, T, T) each; v ends with the null slot's."""
    g = (grad_out @ v.mT).detach()
    g[..., :T] = g[..., :T].tril()
    log_P = P.detach().log().requires_grad_()  # these scores' softmax is P itself
    A = log_P.softmax(-1)
    s = torch.autograd.grad(A, log_P, g[..., : A.size(-1)])[0]
    return s[..., :T], g[..., :T], A[..., :T].detach()


def gradient_of_bias(model: GPT, idx, layer: int) -> torch.Tensor:
    model.zero_grad()
    model(idx, idx)[1].backward()
    return model.transformer.h[layer].attn.c_attn.bias.grad


@torch.no_grad()
def test_quantized_attention_is_that_of_the_rotated(model, idx):
    expected, seen = expected_of(model, idx), []

    def look(_site, P, _then):
        seen.append(P)
        return P

    before = model(idx)[0]
    with visiting([site for site in sites(model) if site.kind == PROBABILITIES], look):
        close(model(idx)[0], before)
    if model.config.normalizer == "kvbias":  # the null slot's weight and value are rounded as all others
        close(seen, [torch.cat((P[..., T:], P[..., :T]), -1) for *_, P, _ in expected])
    else:
        close(seen, [P[..., :T] for *_, P, _ in expected])


def test_slopes_are_those_of_the_rotated(model, idx):
    model = float64_copy(model)
    direction, h = random_direction(model, lr=1.0, seed=1), 1e-6

    @torch.no_grad()
    def scores_at(t: float) -> list[torch.Tensor]:
        for name, parameter in model.named_parameters():
            parameter += t * direction[name]
        found = []
        for block, (q, k, *_) in zip(model.transformer.h, expected_of(model, idx[:1]), strict=True):
            null, _ = null_slot(block.attn, q)
            found.append(torch.cat((q @ k.mT / math.sqrt(D), *([] if null is None else [null])), -1)[0])
        for name, parameter in model.named_parameters():
            parameter -= t * direction[name]
        return found

    up, down, visible = scores_at(h), scores_at(-h), torch.ones(T, T + 1, dtype=torch.bool).tril()
    visible[:, T] = True  # the null slot, where there is one
    for layer, (alpha0, slopes) in enumerate(attention_slopes(model, direction, idx[0])):
        differences = (up[layer] - down[layer]) / (2 * h)
        scale = differences.abs().max()  # off by h² of the third derivatives and ε/h of the scores
        seen = visible[:, : slopes.size(-1)]
        torch.testing.assert_close(slopes[:, seen], differences[:, seen], rtol=1e-6, atol=1e-7 * scale.item())
        close(alpha0, expected_of(model, idx[:1])[layer][3][0].detach())


def test_the_rows_of_c_attn_are_those_that_make_queries_keys_and_values():
    torch.manual_seed(0)
    model = tiny_gpt(**TODAY | {"qk_norm": False})
    attn, config = model.transformer.h[0].attn, model.config
    seen, x = [], torch.randn(1, 3, 8)
    attn.core.register_forward_pre_hook(lambda _core, qkv: seen.extend(qkv))
    attn(x)
    for (part, rows), expected in zip(rows_of_c_attn(attn.c_attn.weight, config).items(), seen, strict=True):
        assert rows.shape == (4 if part == "q" else 2, 6, 8), part
        torch.testing.assert_close(x @ rows.mT, expected[0])  # (H, T, D); the biases are 0


def test_the_seam_has_no_state():
    core = tiny_gpt().transformer.h[0].attn.core
    assert not core.state_dict()
    assert not list(core.parameters())


def test_attention_is_replaced_there():
    model = tiny_gpt(block_size=8)
    idx, seen = torch.arange(8)[None], []
    for block in model.transformer.h:
        block.attn.core.register_forward_hook(lambda _core, qkv, _out: seen.append(qkv) or torch.zeros_like(qkv[0]))
    x = model.transformer.wte(idx) + model.transformer.wpe.weight
    for block in model.transformer.h:
        x = x + block.attn.c_proj.bias
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(model(idx)[0], model.lm_head(model.transformer.ln_f(x)))
    assert [x.shape for qkv in seen for x in qkv] == 6 * [(1, 2, 8, 4)]


def probed_gpt(normalizer: str = "softmax") -> GPT:
    return tiny_gpt(std=0.7, block_size=10, vocab_size=13, normalizer=normalizer).double()


@pytest.mark.parametrize("fails", [False, True])
def test_probing_leaves_no_hook_and_no_gradient_behind(fails):
    model = probed_gpt()
    idx = torch.zeros(1, 11 if fails else 10, dtype=torch.long)  # 11 are more than block_size
    if fails:
        with pytest.raises(ValueError, match="block_size"), capture_qk(model):
            model(idx)
    else:
        with capture_qk(model):
            model(idx)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_captured_q_and_k_are_those_of_every_layer():
    model, idx = probed_gpt(), torch.randint(13, (3, 10))
    with capture_qk(model) as captured:
        model(idx)
    assert [attn for attn, _, _ in captured] == [block.attn for block in model.transformer.h]
    x = model.transformer.wte(idx) + model.transformer.wpe.weight
    first = model.transformer.h[0]
    whole = first.attn.c_attn(first.ln_1(x))
    _, q, k = captured[0]
    assert torch.equal(q[:, 1], whole[..., 4:8])  # the second head's
    assert torch.equal(k[:, 1], whole[..., 12:16])
