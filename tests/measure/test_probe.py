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
from model import GPT, CausalSelfAttention, attention
from tests.helpers import tiny_gpt

T, H = 12, 2


def rotation(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D): pairs of channels turned by an angle that grows with the position, as by RoPE."""
    angle = torch.arange(x.size(-2)).view(-1, 1) * torch.tensor([1.0, 0.3]).to(x)  # (T, D / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


def rotated_forward(self, x, cache=None):
    q, k, v = heads_of(self, x)
    y = self.core(rotation(q), rotation(k), v, backward=self.backward_mode, dropout_p=0.0, **self.arguments())
    return self.c_proj(y.transpose(1, 2).flatten(2))


def heads_of(attn, x):
    return [z.unflatten(-1, (H, -1)).transpose(1, 2) for z in attn.c_attn(x).chunk(3, dim=-1)]


@pytest.fixture(params=["softmax", "softmax1", "sink"])
def model(request, monkeypatch) -> GPT:
    """One whose attention rotates q and k before they enter the scores."""
    monkeypatch.setattr(CausalSelfAttention, "forward", rotated_forward)
    return tiny_gpt(3, std=0.5, vocab_size=64, normalizer=request.param).double()


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(64, (3, T), generator=torch.Generator().manual_seed(0))


def expected_of(model: GPT, idx) -> list[tuple]:
    """(q, k, v, P with the null slot last or without) of each layer, in the blocks' own steps."""
    found, x = [], model.transformer.wte(idx) + model.transformer.wpe.weight[: idx.size(1)]
    for block in model.transformer.h:
        q, k, v = heads_of(block.attn, block.ln_1(x))
        q, k = rotation(q), rotation(k)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
        nulls = {"softmax": None, "softmax1": torch.zeros(H), "sink": getattr(block.attn, "sink", None)}
        null = nulls[model.config.normalizer]
        if null is not None:
            scores = torch.cat((scores, null.to(scores).view(1, H, 1, 1).expand(*scores.shape[:3], 1)), -1)
        P = scores.softmax(-1)
        found.append((q, k, v, P))
        x = x + block.attn.c_proj((P[..., :T] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return found


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
    for layer, (q, k, v, P) in enumerate(expected):
        for attn, *seen in (captured[layer], attended[layer][1:]):
            assert attn is model.transformer.h[layer].attn
            close(seen, [q, k])
        name = f"transformer.h.{layer}.attn"
        output = P[..., :T] @ v
        for part, x in (("q", q), ("k", k), ("v", v), ("output", output)):
            close(tensors[f"{name}.{part}"], side_by_side(x))


@torch.no_grad()
def test_the_attention_measured_is_that_of_the_rotated(model, idx):
    expected = expected_of(model, idx)
    kurtoses = []
    activations = Activations(model).update(idx)
    for layer, (*_, P) in enumerate(expected):
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
    for layer, (q, k, v, _) in enumerate(expected):
        seen = captured[layer]
        close([seen.q, seen.k, seen.v], [x.detach() for x in (q, k, v)])
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        attn = model.transformer.h[layer].attn
        out = attention(q, k, v, **attn.arguments())
        (c_attn_v,) = torch.autograd.grad(out, v, seen.grad_out)
        rows = attn.c_attn.weight.size(0) // 3  # the gradient of v's bias is that of v, over batch and positions
        close(c_attn_v.sum((0, 2)).flatten(), gradient_of_bias(model, idx, layer)[2 * rows :], rtol=1e-8)
        null = {} if model.config.normalizer != "sink" else {"null_logit": attn.sink}
        whole = jacobian_energy(q, k, v, seen.grad_out, model.config.normalizer, **null)
        for name, value in pool(splits[layer]).items():
            close(value, whole[name], rtol=1e-8)


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
    close(seen, [P[..., :T] for *_, P in expected])


def test_slopes_are_those_of_the_rotated(model, idx):
    model = float64_copy(model)
    direction, h = random_direction(model, lr=1.0, seed=1), 1e-6

    @torch.no_grad()
    def scores_at(t: float) -> list[torch.Tensor]:
        for name, parameter in model.named_parameters():
            parameter += t * direction[name]
        found = [(q @ k.mT / math.sqrt(q.size(-1)))[0] for q, k, *_ in expected_of(model, idx[:1])]
        for name, parameter in model.named_parameters():
            parameter -= t * direction[name]
        return found

    up, down, visible = scores_at(h), scores_at(-h), torch.ones(T, T, dtype=torch.bool).tril()
    for layer, (alpha0, slopes) in enumerate(attention_slopes(model, direction, idx[0])):
        differences = (up[layer] - down[layer]) / (2 * h)
        scale = differences.abs().max()  # off by h² of the third derivatives and ε/h of the scores
        torch.testing.assert_close(
            slopes[..., :T][:, visible], differences[:, visible], rtol=1e-6, atol=1e-7 * scale.item()
        )
        close(alpha0, expected_of(model, idx[:1])[layer][3][0].detach())


def test_the_rows_of_c_attn_are_those_that_make_queries_keys_and_values():
    torch.manual_seed(0)
    attn = tiny_gpt().transformer.h[0].attn
    seen, x = [], torch.randn(1, 3, 8)
    attn.core.register_forward_pre_hook(lambda _core, qkv: seen.extend(qkv))
    attn(x)
    for (part, rows), expected in zip(rows_of_c_attn(attn.c_attn.weight, 2).items(), seen, strict=True):
        assert rows.shape == (2, 4, 8), part
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
