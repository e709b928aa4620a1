"""Where this worker stands among the workers, and on what device it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """rank in [0, size); `device` is this worker's own."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @classmethod
    def current(cls, device: torch.device) -> World:
        """What torch.distributed says, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def any(self, flag: bool) -> bool:
        """Whether any worker says so; every worker must ask."""
        if self.size == 1:
            return flag
        told = torch.tensor(flag, dtype=torch.int32, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Averages gradients over the workers; a world of one trains the bare model."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, gradients stay with their worker; a later backward pass averages them too."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
