"""What methods share that correct an optimizer's step on LoRA factors A [r, in] and B [out, r].

What an adapter adds to its module's output is (alpha / r) B A x. So a part along Uf is only ever written by
columns of B, and an update of B that has nothing along Uf writes nothing there, whatever the optimizer did to the
gradient. At gains that change nothing, weights stay bit for bit what the optimizer made them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ipvla.forgetting.directions import GainedSubspace
from ipvla.forgetting.gains import Gains
from ipvla.forgetting.method import Factors, Method, Target
from ipvla.forgetting.subspaces import LayerSubspace


def check_names(factors: Factors, given: Mapping[str, object], what: str) -> None:
    """ValueError unless there are factors, and something is given for every one of them."""
    if not factors:
        raise ValueError("there are no LoRA factors to correct; apply adapters first, and name their modules")
    missing = [name for name in factors if name not in given]
    if missing:
        raise ValueError(f"no {what} for {missing}; give one for every module with an adapter")


def writers(target: Target, names: Collection[str]) -> tuple[Factors, dict[str, LayerSubspace]]:
    """The adapters of the modules of these names in the subspaces' layers, and the subspace of each.

    Such modules must write into the residual stream, e.g. `o_proj` and `down_proj`.
    """
    protected = {layer for group in target.subspaces.groups for layer in group.layers}
    factors = target.factors(lambda name: name.rsplit(".", 1)[-1] in names and target.layer_of(name) in protected)
    layers = {name: target.layer_of(name) for name in factors}
    return factors, {name: target.subspaces.for_layer(n) for name, n in layers.items() if n is not None}


class WriterUpdate(Method):
    """One set of directions per B, all with the same gains.

    Raises:
        ValueError: a module has no subspace, or its output is not of the subspace's width.
    """

    def __init__(self, factors: Factors, subspaces: Mapping[str, LayerSubspace], gains: Gains) -> None:
        check_names(factors, subspaces, "subspace")
        for name, (_, b) in factors.items():
            width = subspaces[name].fragile.shape[0]
            if b.shape[0] != width:
                raise ValueError(
                    f"B of {name} has {b.shape[0]} rows, its subspace is of width {width}; "
                    "give only modules that write into the residual stream, such as o_proj and down_proj"
                )
        self._directions = {b: GainedSubspace(subspaces[name], b.device) for name, (_, b) in factors.items()}
        self.set_gains(gains)

    def set_gains(self, gains: Gains) -> None:
        gains.check()
        for directions in self._directions.values():
            directions.set_gains(gains)
