"""What hypothesis puts into a file in place of what was written there: other values, names or bytes."""

import copy
import math
from typing import Any

import torch
from hypothesis import strategies as st

PLAIN = [None, True, -1, 0, 3, 2.5, 10**6, 10**12, 2**63, 10**30, math.nan, math.inf, 1e300, "", "x", "1", "a\nb"]
PLAIN += ["../../outside", "/etc/passwd", "\0", "x" * 3000, [], {}, [[]], [None], [1, 2], {"a": 1}, {"": {}}, [[["x"]]]]
TENSORS = [torch.tensor(3), torch.zeros(0), torch.zeros(3), torch.zeros(1).expand(10**9), torch.tensor([math.nan])]
TENSORS += [torch.zeros(2, dtype=dtype) for dtype in (torch.int8, torch.complex64, torch.bool)]
TENSORS += [torch.zeros(2, device="meta"), b"x", {1: 2}]


def mutate(data, tree: Any, values: list) -> Any:
    """The tree, in place, with one to three values in it replaced, left out, or put under another name."""
    for _ in range(data.draw(st.integers(1, 3))):
        at: Any = tree
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 5)):
                at = at[key]
                continue
            what = data.draw(st.sampled_from(["value", "value", "value", "gone", "name"]))
            if what == "value":
                at[key] = copy.deepcopy(data.draw(st.sampled_from(values)))
            elif what == "gone":
                del at[key]
            elif isinstance(at, dict):
                at[data.draw(st.sampled_from(["x", "../x", "a.b", "\0", ""]))] = at.pop(key)
            break
    return tree


def mutate_bytes(data, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set" and at < len(changed):
            changed[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[at : at + data.draw(st.integers(1, 50))]
        elif kind == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            changed[at:at] = changed[at : at + 100] * data.draw(st.integers(1, 5))
    return bytes(changed)
