"""Weights that are sharded over workers (FSDP2): one tensor, of which every worker holds its rows.

Such a tensor is torch's DTensor; its import takes seconds, so its attributes identify it.
"""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Does this worker hold a part of it alone?"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every worker; every worker must ask. A tensor that is not sharded is returned itself."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, which every worker has in full, sharded as `parameter` is; itself where that is not sharded."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
