"""Moments of a model's weights: of every parameter, of q, k and v apart and by head, and of the kinds of parameters."""

from collections.abc import Iterable

from torch import Tensor

from measure.moments import Moments
from measure.probe import rows_of_c_attn
from model import GPTConfig

KINDS = {
    "embedding": ("wte", "wpe"),
    "attention qkv": ("c_attn",),
    "attention gate": ("attn.c_gate",),
    "attention projection": ("attn.c_proj",),
    "MLP": ("mlp.c_gate", "mlp.c_fc", "mlp.c_proj"),
    "layer norm": ("ln_1", "ln_2", "ln_f"),
    "query and key norm": ("q_norm", "k_norm"),
    "head": ("lm_head",),
    "sink": ("sink",),
    "null key and value": ("null_key", "null_value"),
    "ssmax": ("ssmax_scale",),
}


def weight_moments(parameters: Iterable[tuple[str, Tensor]], config: GPTConfig) -> dict[str, dict[str, Moments]]:
    """Of a GPT's named_parameters(): name → its parts' moments. The first part is the whole, under the same name; the
    fused c_attn has more, see `parts_of_qkv`."""
    return {
        name: parts_of_qkv(name, parameter, config) if ".c_attn." in name else {name: Moments().update(parameter)}
        for name, parameter in parameters
    }


def parts_of_qkv(name: str, parameter: Tensor, config: GPTConfig) -> dict[str, Moments]:
    """The moments of the fused c_attn: of the whole, of q, k and v, and of each of their heads, in that order."""
    whole, thirds, single = Moments(), {}, {}
    for part, heads in rows_of_c_attn(parameter, config).items():
        thirds[f"{name}[{part}]"] = third = Moments()
        for head, rows in enumerate(heads):
            single[f"{name}[{part}, head {head}]"] = moments = Moments().update(rows)
            third.merge(moments)
        whole.merge(third)
    return {name: whole, **thirds, **single}


def pooled_by_kind(moments: dict[str, dict[str, Moments]]) -> dict[str, Moments]:
    """Kind → moments of all its parameters in one; at the end `all` of the model. `moments` as of `weight_moments`."""
    kinds = {kind: Moments() for kind in KINDS}
    for name, parts in moments.items():
        kinds.setdefault(kind_of(name), Moments()).merge(parts[name])
    kinds = {kind: pooled for kind, pooled in kinds.items() if pooled.count + pooled.nonfinite}
    kinds["all"] = Moments()
    for kind in list(kinds)[:-1]:
        kinds["all"].merge(kinds[kind])
    return kinds


def kind_of(name: str) -> str:
    """One of KINDS; of any other parameter, such as a normalizer may bring, its own name."""
    kinds = (kind for kind, parts in KINDS.items() if any(f".{part}." in f".{name}." for part in parts))
    return next(kinds, name.rpartition(".")[2])


def findings(name: str, parts: dict[str, Moments]) -> list[str]:
    """What is wrong with a parameter's weights or keeps its parts from having a kurtosis, in words."""
    whole, notes = parts[name], []
    constant: list[str] = []
    if whole.nonfinite:
        notes.append(f"{name}: {whole.nonfinite} of its {whole.count + whole.nonfinite} numbers are NaN or infinite")
    for part, found in parts.items():
        # The larger parts come first. Where one of them is constant, so are the parts of it, which get no note.
        said = any(part.startswith(larger.removesuffix("]")) for larger in constant)
        if found.count > 1 and found.variance == 0 and not found.nonfinite and not said:
            constant.append(part)
            notes.append(f"{part}: all equal to {found.mean:g}, so they have no kurtosis")
    return notes
