"""The fragile and plastic subspaces of representative layers, and how offline products are stored on disk.

An artifact is a pair of files in one directory, `NAME.safetensors` and a JSON file with what it was made from. The
JSON file comes last and holds the tensors' hash, so that what can be loaded is whole and belongs together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Required, Self, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipvla.files import replacing, write_text
from ipvla.forgetting.layers import LayerGroup


class ArtifactError(ValueError):
    """An offline product is missing, damaged, or of another model or probe."""


class ArtifactIdentity(TypedDict, total=False):
    """What an artifact must have been made from; what is absent or None may be anything."""

    backbone: Required[str]
    width: Required[int]
    probe_sha256: str | None
    num_layers: int | None
    teacher_sha256: str | None


def write_artifact(
    tensors_path: Path, meta_path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Writes both files, each whole or not at all; `meta` must be JSON values."""
    with replacing(tensors_path) as part:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part)
        text = json.dumps({**meta, "tensors_sha256": _sha256(part)}, indent=1)
    write_text(meta_path, text)


def read_artifact(
    tensors_path: Path, meta_path: Path, expected: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) as `write_artifact` left them; `expected` values of meta must agree unless they are None.

    Raises:
        ArtifactError: a file is missing or damaged, or meta says something else.
    """
    again = "make it again from the teacher and the probe"
    try:
        meta = json.loads(meta_path.read_text())
        whole = _sha256(tensors_path) == meta["tensors_sha256"]
        tensors = load_file(tensors_path) if whole else {}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{meta_path} cannot be read ({type(error).__name__}: {error}); {again}") from None
    if not whole:
        raise ArtifactError(f"{tensors_path} is damaged or does not belong to {meta_path.name}; {again}")
    for name, value in expected.items():
        if value is not None and meta.get(name) != value:
            raise ArtifactError(
                f"{meta_path} was made with {name} {meta.get(name)}, this run has {value}; "
                "point to the artifact of this model and probe, or make one"
            )
    return tensors, meta


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        write_artifact(directory / "subspaces.safetensors", directory / "meta.json", tensors, meta)

    @classmethod
    def load(cls, directory: Path, **identity: Unpack[ArtifactIdentity]) -> Self:
        """What `save` wrote, if it is of this identity.

        Raises:
            ArtifactError: it is missing, damaged, or of something else.
        """
        meta_path = directory / "meta.json"
        tensors, meta = read_artifact(directory / "subspaces.safetensors", meta_path, identity)
        try:
            groups = tuple(LayerGroup(g["name"], tuple(g["layers"]), g["representative"]) for g in meta["groups"])
            layers = {group.representative: _layer(tensors, group.representative) for group in groups}
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{meta_path} lacks {error}; make it again from the teacher and the probe"
            ) from None
        for subspace in layers.values():
            _check(subspace, identity["width"])
        return cls(groups, layers, meta)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the spans of orthonormal a [D, r] and b [D, s]: float64 [min(r, s)], ascending.

    Small angles come from the sine, where the cosine is blind (Bjorck and Golub, 1973).
    """
    a, b = (a.double(), b.double()) if a.shape[1] >= b.shape[1] else (b.double(), a.double())
    cosine = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sine = torch.linalg.svdvals(b - a @ (a.T @ b)).flip(0).clamp(max=1)
    return torch.where(cosine**2 > 0.5, sine.asin(), cosine.acos())


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
