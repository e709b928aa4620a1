"""The `prismatic` backbone computes what OpenVLA's public code computed, stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ipvla.models.backbones.prismatic import PrismaticBackbone, PrismaticConfig
from ipvla.types import ModelInputs
from tests.checkpoints.conftest import close, golden, golden_json, pictures


@pytest.fixture(scope="module")
def backbone(openvla: Path) -> PrismaticBackbone:
    return PrismaticConfig(openvla, "float32").build(0, 1, 56).eval()


def inputs_of(ids: npt.NDArray[np.int64], pixels: list[npt.NDArray[np.uint8]]) -> ModelInputs:
    """Pictures that have the towers' size already."""
    tokens = torch.from_numpy(ids)
    images = torch.from_numpy(np.stack(pixels))[:, None]
    return ModelInputs(images, torch.zeros(len(tokens), 0), tokens, torch.ones_like(tokens, dtype=torch.bool))


def resized(name: str, size: int = 56) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pictures()[name]).resize((size, size), Image.Resampling.BICUBIC))


def test_towers_projector_and_every_layer(backbone: PrismaticBackbone) -> None:
    expected = golden("prefill")
    inputs = inputs_of(expected["input_ids"], [resized("picture_0")])
    vision = backbone.vlm.vision_backbone
    pixels = vision.pixels(inputs.images)
    assert torch.equal(torch.cat(pixels, 1), torch.from_numpy(expected["pixel_values"]))
    for tower, x, name in zip(vision.towers, pixels, ("dinov2", "siglip"), strict=True):
        close(tower(x), expected[f"{name}_patches"])
    output = backbone(inputs)
    close(output.features.perception, expected["patch_features"])
    close(backbone.vlm.projector(output.features.perception), expected["projected_patches"])
    for i, hidden in enumerate(output.hidden_states):
        close(hidden, expected[f"hidden_{i}"])
    logits = backbone.logits(output.hidden_states[-1])
    close(logits[..., expected["columns"]], expected["logits_columns"])
    close(logits.logsumexp(-1), expected["logits_logsumexp"])
    assert logits.argmax(-1).tolist() == expected["logits_argmax"].tolist()
    close(output.features.cognition, expected["hidden_4"][:, -1])


@pytest.mark.parametrize("case", golden_json("tokenization")["encode"], ids=lambda case: repr(case["text"][:20]))
def test_texts_become_the_published_ids(backbone: PrismaticBackbone, case: dict[str, object]) -> None:
    assert backbone.tokenizer.encode(str(case["text"])).ids == case["ids"]
