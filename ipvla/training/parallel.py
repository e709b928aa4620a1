"""Where this worker stands among the workers, and on what device it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ipvla.models.vla import IPVLA

#: "ddp": every worker has all weights. "fsdp": each has a part of every weight, of its gradient and its moments.
SHARDINGS: Final = ("ddp", "fsdp")
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
        raised = torch.tensor(flag, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def broadcast_from_rank0(self, value: float) -> float:
        """Rank 0's value, on every worker; every worker must ask."""
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.broadcast(shared, 0)
        return float(shared)

    def wrap(self, model: IPVLA, sharding: str = "ddp") -> nn.Module:
        """The model whose gradients are averaged over the workers; a world of one trains the bare model.

        With "fsdp" its parameters are others afterwards, sharded: what refers to them comes later.

        Raises:
            ValueError: it cannot be sharded.
        """
        if self.size == 1:
            return model
        if sharding == "fsdp":
            return self._shard(model)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)

    def _shard(self, model: IPVLA) -> nn.Module:
        """By FSDP2 (Zhao et al., arXiv 2304.11277): every language layer by itself, and all the rest together."""
        from torch.distributed.device_mesh import init_device_mesh  # takes seconds
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        formats = {p.dtype for p in model.parameters() if p.requires_grad}
        if len(formats) > 1:
            raise ValueError(
                f"training.sharding is fsdp, but the trained weights are {', '.join(sorted(map(str, formats)))}; "
                "set model.backbone.dtype to float32, or train adapters alone (model.lora)"
            )
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in model.backbone.language_layers():
            fully_shard(layer, mesh=mesh)
            if hasattr(layer, "keys_values"):
                register_fsdp_forward_method(layer, "keys_values")
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # or a reading would leave stale weights behind
        register_fsdp_forward_method(model, "whole")
        return model


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, gradients stay with their worker; a later backward pass averages them too."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
