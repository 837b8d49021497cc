"""One model on several ranks: a copy on each (DDP), or on each a share of every parameter (FSDP2).

Under FSDP2 (Zhao et al. 2023; PyTorch's `fully_shard`) a parameter is a DTensor, split along its first dimension. A
block's matrices are gathered when it runs, forward and backward, and dropped behind it; the embeddings, the last norm
and the head stay gathered from the forward to the backward pass. Optimizers work on the shards.

Under bfloat16 the blocks' matrices and biases are gathered and multiplied in that type. Norms, and all parameters
outside of the blocks, stay float32, and gradients are summed in float32, as under DDP with autocast. Unlike there, what
a block's normalizer learns is gathered in bfloat16, beside the matrices.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from harness.distributed import Ranks
from model import GPT


def recompute_activations(model: GPT) -> None:
    """Have every block keep its input alone and run again, with the same dropout, when its gradient is wanted."""
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def placed(model: GPT, ranks: Ranks, sharded_in: torch.dtype | None, use_compile: bool) -> Any:
    """The model as this rank runs it: on its device, whole or, with a dtype to gather its blocks in, sharded over the
    ranks; perhaps compiled. The model itself is changed in place."""
    if not sharded_in:
        model.to(ranks.device)
        return torch.compile(model) if use_compile else model
    for block in model.transformer.h if use_compile else ():
        block.compile()  # each by itself: what is gathered between them is not traced
    shard(model, ranks, sharded_in)
    return model


def shard(model: GPT, ranks: Ranks, dtype: torch.dtype) -> None:
    """Leave on this rank its share of every parameter, on its device. `dtype`: of what is gathered of the blocks."""
    from torch.distributed.device_mesh import init_device_mesh  # here: these take half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    summed_in = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=summed_in, cast_forward_inputs=False)
    for block in model.transformer.h:
        if dtype != torch.float32:
            fully_shard([m for m in block.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)], mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root: Any = fully_shard(model, mesh=mesh)
    # What is outside of the blocks stays gathered until the backward pass; without one to come, it is dropped here.
    root.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else root.reshard())


@contextlib.contextmanager
def looked_into(sharded: bool, autocast) -> Iterator[None]:
    """A block in which a model's layers can be watched by hooks. A `sharded` model's blocks may be compiled and are in
    autocast's dtype, so in here it runs under autocast and not compiled."""
    with contextlib.ExitStack() as stack:
        if sharded:
            stack.enter_context(autocast)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def on_all_ranks(model: Any, ranks: Ranks) -> Any:
    """The model, of which each rank has a copy, with gradients that are averaged over the ranks. They are views of the
    buckets in which they travel, and so in memory once, as long as they are set to zero and never to None."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that the first step, too, is rounded as all others
    cards = [ranks.device] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has another name for it, which 2.11 has not
        # The only buffers, those of a feedback, are the same everywhere, and never change.
        return DistributedDataParallel(model, cards, broadcast_buffers=False, gradient_as_bucket_view=True)


def settle(model: DistributedDataParallel, batch: tuple[Tensor, Tensor], autocast) -> None:
    """A pass without a step. DDP orders its buckets as it has seen the gradients come, and where one lies says in which
    order its parts are added up: without it the first step after a resume would be rounded unlike any other."""
    with autocast:
        loss = model(*batch, with_logits=False)[1]
    loss.backward()
    model.zero_grad(set_to_none=False)


def background_saver(folder: Path, ranks: Ranks):
    """What writes the checkpoints of a sharded model into the run's folder; see harness/sharded.py."""
    from harness.sharded import BackgroundSaver  # here: what it imports takes half a second

    return BackgroundSaver(folder, ranks)


def like(whole: Tensor, parameter: Any) -> Tensor:
    """`whole`, which every rank has, as `parameter` is: on its device and, where that is sharded, this rank's share."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def own_part(x: Any) -> Tensor:
    """This rank's share of a sharded tensor; any other tensor itself."""
    return x.to_local() if is_sharded(x) else x


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "to_local")
