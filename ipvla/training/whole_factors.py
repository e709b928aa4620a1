"""Adapters whose weights are sharded over workers, in full for as long as surgery works on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipvla.forgetting.adapter_update import Factors, UpdateSurgery
from ipvla.models.sharding import is_sharded, sharded_like, whole


class WholeFactors:
    """Copies of sharded A and B, the same on every worker; what is not sharded is taken as it is.

    Every worker does the same surgery on its copies and keeps its own part of the outcome.

    Attributes:
        factors: what surgery is built on, by module name.
    """

    def __init__(self, factors: Factors) -> None:
        self._sharded: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.factors = {name: (self._in_full(a), self._in_full(b)) for name, (a, b) in factors.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Takes the copies over into the sharded weights."""
        for parameter, copy in self._sharded:
            parameter.copy_(sharded_like(copy.detach(), parameter))

    @contextmanager
    def around(self, update: UpdateSurgery) -> Iterator[None]:
        """`update.around`, for an update that was built on `factors`."""
        self._fetch()
        with update.around():
            yield
            self._fetch()
        self.put_back()

    @torch.no_grad()
    def _fetch(self) -> None:
        for parameter, copy in self._sharded:
            copy.copy_(whole(parameter))

    def _in_full(self, parameter: nn.Parameter) -> nn.Parameter:
        if not is_sharded(parameter):
            return parameter
        full: Tensor = whole(parameter.detach()).clone()
        self._sharded.append((parameter, nn.Parameter(full, requires_grad=False)))
        return self._sharded[-1][1]
