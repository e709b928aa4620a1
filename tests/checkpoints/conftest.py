"""Tiny checkpoints in OpenVLA's published layouts, as the public code wrote them, and what it computed from them.

Made by github.com/openvla/openvla at c8f03f48, github.com/moojink/openvla-oft at 213c5ff8 and its transformers
fork at bc339d9a, with random weights, in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from ipvla.models.backbones.openvla_files import mapped

HERE = Path(__file__).parent / "openvla"
Golden = Callable[[str], Mapping[str, npt.NDArray[Any]]]


def golden(name: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(HERE / "golden" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def golden_json(name: str) -> Any:
    return json.loads((HERE / "golden" / f"{name}.json").read_text())


def pictures() -> dict[str, npt.NDArray[np.uint8]]:
    return golden("pictures")


def close(ours: torch.Tensor, theirs: npt.NDArray[Any], atol: float = 1e-4) -> None:
    np.testing.assert_allclose(ours.detach().float().numpy(), theirs, rtol=0, atol=atol)


@pytest.fixture(scope="session")
def openvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers, three shards."""
    directory = tmp_path_factory.mktemp("openvla") / "model"
    shutil.copytree(HERE / "model", directory)
    shutil.copy(HERE / "towers.json", directory)
    return directory


@pytest.fixture(scope="session")
def single_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SigLIP alone, as openvla-v01 and ECoT's."""
    directory = tmp_path_factory.mktemp("single") / "model"
    shutil.copytree(HERE / "single_tower", directory)
    for path in (HERE / "towers.json", HERE / "model" / "tokenizer.json"):
        shutil.copy(path, directory)
    vision = directory / "vision_and_projector.safetensors"
    weights = mapped(vision)
    for shard in sorted((HERE / "model").glob("*.safetensors")):
        weights |= {name: x for name, x in mapped(shard).items() if name.startswith("language_model.")}
    save_file(weights, directory / "model.safetensors")
    vision.unlink()
    return directory


@pytest.fixture(scope="session")
def oft(openvla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OFT's head and projector of the proprioception beside the model, without FiLM."""
    directory = tmp_path_factory.mktemp("oft") / "model"
    shutil.copytree(openvla, directory)
    for path in (HERE / "oft").iterdir():
        if not path.name.startswith("vision_backbone"):
            shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="session")
def oft_film(oft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with FiLM."""
    directory = tmp_path_factory.mktemp("film") / "model"
    shutil.copytree(oft, directory)
    shutil.copy(next((HERE / "oft").glob("vision_backbone*")), directory)
    return directory
