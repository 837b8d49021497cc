"""Ranks: one process on its own, or one of several that torchrun started."""

import os
import threading
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from harness.device import choose_device


@dataclass
class Ranks:
    """This process's place among those that train one model together. Rank 0 alone writes files and prints."""

    device: torch.device
    rank: int = 0
    size: int = 1
    background: threading.Thread | None = None  # which may still talk to the other ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers, so that all take the same branch."""
        if self.size > 1:
            dist.all_reduce(tensor := torch.tensor(number), dist.ReduceOp.MAX)
            number = int(tensor)
        return number

    def share(self, value):
        """Rank 0's value of a plain Python object, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value) -> list:
        """Every rank's value of a plain Python object, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        if self.background:
            self.background.join()
        if self.size > 1:
            dist.destroy_process_group()


def join_ranks(device_name: str) -> Ranks:
    """This process alone on its device or, under torchrun, its rank on a device of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(choose_device(device_name))
    device = choose_device(device_name)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    # Gradients travel by NCCL; flags and sums of plain numbers stay on the CPU, so that they never wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Ranks(device, dist.get_rank(), dist.get_world_size())
