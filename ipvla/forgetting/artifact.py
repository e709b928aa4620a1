"""What is measured of a teacher once, offline, and how it lies on disk.

An artifact is a pair of files in one directory, `NAME.safetensors` and a JSON file with what it was made from. The
JSON file comes last and holds the tensors' hash, so that what can be loaded is whole and belongs together.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Required, Self, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipvla.files import foreign_file, nearby, one_line, read_record, replacing, write_text
from ipvla.forgetting.probed import ProbedModel

_AGAIN = "make it again from the teacher and the probe"


class ArtifactError(ValueError):
    """An offline product is missing, damaged, or of another model or probe."""


class ArtifactIdentity(TypedDict, total=False):
    """What an artifact must have been made from; what is absent or None may be anything."""

    backbone: Required[str]
    width: Required[int]
    probe_sha256: str | None
    num_layers: int | None
    teacher_sha256: str | None


@dataclass(frozen=True)
class Measured(ABC):
    """A part of the teacher's artifact.

    Attributes:
        name: of its files, `NAME.safetensors` and `NAME.json`.
        contents: what it holds, for errors.
        request: flags of `ray_jobs.subspaces` that produce it, for errors.
        meta: what it was made from, JSON values; at least backbone, width, num_layers, probe_sha256.
    """

    name: ClassVar[str]
    contents: ClassVar[str]
    request: ClassVar[str]

    meta: Mapping[str, Any]

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by their names on disk."""

    @classmethod
    @abstractmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The inverse of `tensors`; KeyError or TypeError if something is missing."""

    def save(self, directory: Path) -> None:
        write_artifact(directory, self.name, self.tensors, self.meta)

    @classmethod
    def load(cls, directory: Path, expected: Mapping[str, Any]) -> Self:
        """What `save` wrote, if its meta has the `expected` values.

        Raises:
            ArtifactError: it is missing, damaged, or of something else.
        """
        tensors, meta = read_artifact(directory, cls.name, expected)
        try:
            return cls.of(tensors, meta)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ArtifactError(
                f"{directory / cls.name}.json does not fit its tensors ({one_line(error)}); {_AGAIN}"
            ) from None


def identity_of(model: ProbedModel, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the meta of each artifact says of the model it was measured on.

    Raises:
        ValueError: `meta`, what else it was made from, lacks `probe_sha256` or `commit`.
    """
    if missing := {"probe_sha256", "commit"} - set(meta):
        raise ValueError(f"meta lacks {sorted(missing)}; an artifact must say what it was made from")
    return {"backbone": model.name, "width": model.width, "num_layers": len(model.layers)}


def write_artifact(directory: Path, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes both files, each whole or not at all; `meta` must be JSON values."""
    tensors_path, meta_path = _paths(directory, name)
    with replacing(tensors_path) as part:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part)
        text = json.dumps({**meta, "tensors_sha256": _sha256(part)}, indent=1)
    write_text(meta_path, text)


def read_artifact(
    directory: Path, name: str, expected: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) as `write_artifact` left them; `expected` values of meta must agree unless they are None.

    Raises:
        ArtifactError: a file is missing or damaged, or meta says something else.
    """
    tensors_path, meta_path = _paths(directory, name)
    try:
        meta = read_record(meta_path)
        whole = _sha256(tensors_path) == meta["tensors_sha256"]
        tensors = load_file(tensors_path) if whole else {}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        found = None if meta_path.exists() else nearby(directory, meta_path.name, tensors_path.name)
        remedy = f"did you mean {found}?" if found else _AGAIN
        raise ArtifactError(f"{meta_path} cannot be read ({one_line(error)}); {remedy}") from None
    if not whole:
        reason = f" ({what})" if (what := foreign_file(tensors_path)) else ""
        raise ArtifactError(f"{tensors_path} is damaged or does not belong to {meta_path.name}{reason}; {_AGAIN}")
    for key, value in expected.items():
        if value is not None and meta.get(key) != value:
            raise ArtifactError(
                f"{meta_path} was made with {key} {meta.get(key)}, this run has {value}; "
                "point to the artifact of this model and probe, or make one"
            )
    return tensors, meta


def _paths(directory: Path, name: str) -> tuple[Path, Path]:
    """The subspaces' JSON file is the whole artifact's."""
    return directory / f"{name}.safetensors", directory / f"{'meta' if name == 'subspaces' else name}.json"


def _sha256(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
