"""The fragile and plastic subspaces of representative layers, and which layers share them.

Layers are counted from 0 over the language layers; the hidden state of layer l is that layer's output [B, N, D].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from ipvla.forgetting.artifact import ArtifactError, ArtifactIdentity, read_artifact, write_artifact


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share the subspaces of one representative layer.

    Attributes:
        name: "a" or "b".
        layers: ascending.
        representative: the last of `layers`, unless that one carries nothing of the instruction (see `icsm`).
    """

    name: str
    layers: tuple[int, ...]
    representative: int


def layer_groups(num_layers: int, last: int = 4) -> tuple[LayerGroup, LayerGroup]:
    """The last `last` of `num_layers` layers in two halves; of 18 layers (14, 15) -> 15 and (16, 17) -> 17.

    Raises:
        ValueError: `last` is odd or below 2, or there are fewer layers than that.
    """
    if last < 2 or last % 2:
        raise ValueError(f"last is {last}; two groups of equal size need an even number of layers, at least 2")
    if num_layers < last:
        raise ValueError(f"last is {last}, but there are only {num_layers} layers; lower last")
    middle = num_layers - last // 2
    first, second = tuple(range(num_layers - last, middle)), tuple(range(middle, num_layers))
    return LayerGroup("a", first, first[-1]), LayerGroup("b", second, second[-1])


@dataclass(frozen=True)
class LayerSubspace:
    """What the teacher's probe says about one layer.

    Attributes:
        layer: counted from 0.
        fragile: Uf, float32 [D, rf], orthonormal columns, the most fragile first.
        plastic: Up, float32 [D, rp], orthonormal to each other and to `fragile`, in the same order.
        mean: mu, float64 [D], of the pooled instruction vectors.
        covariance: C_T, float64 [D, D], of the same vectors, divided by their number less one.
        scores: float64 [rf + rp], what the columns were ordered by: fragility, or variance; NaN if at random.
    """

    layer: int
    fragile: Tensor
    plastic: Tensor
    mean: Tensor
    covariance: Tensor
    scores: Tensor

    @property
    def basis(self) -> Tensor:
        """U = [Uf Up], float32 [D, rf + rp]."""
        return torch.cat([self.fragile, self.plastic], 1)


@dataclass(frozen=True)
class Subspaces:
    """The subspaces of all groups of layers; see `icsm` for how they come about.

    Attributes:
        groups: each with its representative, whose subspaces its layers share.
        layers: by representative layer.
        meta: what they were made from and how, JSON values; at least backbone, width, num_layers, probe_sha256.
    """

    groups: tuple[LayerGroup, ...]
    layers: Mapping[int, LayerSubspace]
    meta: Mapping[str, Any]

    def for_layer(self, layer: int) -> LayerSubspace:
        """The subspaces that `layer` shares; ValueError if no group holds it."""
        for group in self.groups:
            if layer in group.layers:
                return self.layers[group.representative]
        covered = sorted(number for group in self.groups for number in group.layers)
        raise ValueError(f"layer {layer} has no subspace; choose among {covered}, or fit with a larger `last`")

    def projector_sha256(self) -> str:
        """Hash of the projectors on Uf and on Up, rounded to 3 decimals: the same whatever basis spans them."""
        digest = hashlib.sha256()
        for number in sorted(self.layers):
            for basis in (self.layers[number].fragile, self.layers[number].plastic):
                projector = basis.double() @ basis.double().T
                digest.update((projector.cpu() * 1000).round().to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Writes `subspaces.safetensors` (U{l}_f, U{l}_p, mu{l}, C_T{l}, scores{l}) and `meta.json`."""
        tensors = {}
        for number, subspace in self.layers.items():
            tensors[f"U{number}_f"], tensors[f"U{number}_p"] = subspace.fragile, subspace.plastic
            tensors[f"mu{number}"], tensors[f"C_T{number}"] = subspace.mean, subspace.covariance
            tensors[f"scores{number}"] = subspace.scores
        groups = [asdict(group) for group in self.groups]
        meta = {**self.meta, "groups": groups, "projector_sha256": self.projector_sha256()}
        write_artifact(directory, "subspaces", tensors, meta)

    @classmethod
    def load(cls, directory: Path, **identity: Unpack[ArtifactIdentity]) -> Self:
        """What `save` wrote, if it is of this identity.

        Raises:
            ArtifactError: it is missing, damaged, or of something else.
        """
        tensors, meta = read_artifact(directory, "subspaces", identity)
        try:
            groups = tuple(LayerGroup(g["name"], tuple(g["layers"]), g["representative"]) for g in meta["groups"])
            layers = {group.representative: _layer(tensors, group.representative) for group in groups}
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{directory / 'meta.json'} lacks {error}; make it again from the teacher and the probe"
            ) from None
        for subspace in layers.values():
            _check(subspace, identity["width"])
        return cls(groups, layers, meta)


def _layer(tensors: Mapping[str, Tensor], number: int) -> LayerSubspace:
    names = (f"U{number}_f", f"U{number}_p", f"mu{number}", f"C_T{number}", f"scores{number}")
    return LayerSubspace(number, *(tensors[name] for name in names))


def _check(subspace: LayerSubspace, width: int) -> None:
    basis = subspace.basis
    shapes = [list(t.shape) for t in (basis, subspace.mean, subspace.covariance, subspace.scores)]
    rank = basis.shape[-1]
    if shapes != [[width, rank], [width], [width, width], [rank]]:
        raise ArtifactError(f"the subspaces of layer {subspace.layer} have shapes {shapes}, not of width {width}")
    off = (basis.T @ basis - torch.eye(rank)).abs().max().item() if rank else 0.0
    if not off < 1e-4:
        raise ArtifactError(
            f"the columns of layer {subspace.layer} are {off:.1e} from orthonormal; make them again"
        )
