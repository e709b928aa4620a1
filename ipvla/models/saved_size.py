"""Bounds what a description makes by what was saved with it: sizes are claims until the weights are there."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

#: A model under construction may have so many times the weights of its file, which has shared ones once ...
_BUILT_PER_SAVED = 4
#: ... and so many more tensors and numbers, which no file has.
_BUILT_BESIDE = (1_000, 2**24)


@contextmanager
def no_larger_than(saved: Mapping[str, torch.Tensor], packed: int = 1) -> Iterator[None]:
    """Ends the building of a model that grows far beyond its saved weights, before they are filled.

    Args:
        packed: how many of the model's numbers a saved one may hold.

    Raises:
        ValueError: it does.
    """
    numbers = packed * sum(tensor.numel() for tensor in saved.values())
    most = [_BUILT_PER_SAVED * len(saved), _BUILT_PER_SAVED * numbers]
    left = [own + beside for own, beside in zip(most, _BUILT_BESIDE, strict=True)]
    thread = threading.get_ident()

    def count(module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left[0], left[1] = left[0] - 1, left[1] - tensor.numel()
        if min(left) < 0:
            raise ValueError("it describes a model far larger than its weights")

    from torch.nn.modules import module

    hooks = [
        module.register_module_parameter_registration_hook(count),
        module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
