"""What a function allocates, forward and backward: run by PyTorch on tensors that have no memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Followed:
    """Bytes of the tensors that a function made, its result left out: kept for the backward pass, and the most there
    were at a time in each pass, the gradients of its inputs among them."""

    kept: int
    forward: int
    backward: int


class _Storages(TorchDispatchMode):
    """Sums up the tensors that the operations within it make, as long as they live."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known, self.peak = {x.untyped_storage()._cdata for x in known}, 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        return sum(size for _, size in self.live.values())


def follow(function: Callable[..., Tensor], *inputs: Tensor, known: Iterable[Tensor] = ()) -> Followed:
    """What `function` of the inputs takes forward and backward beside these and what else is `known`."""
    with _Storages([*inputs, *known]) as storages:
        result = function(*inputs)
        own, forward = result.untyped_storage().nbytes(), storages.peak
        kept = storages.bytes() - own
        gradient = torch.ones_like(result)
        storages.peak = 0
        result.backward(gradient)
    return Followed(kept, forward - own, storages.peak - own - gradient.untyped_storage().nbytes())
