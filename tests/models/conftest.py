"""Small real models: TinyVLM, and a PaliGemma and an OpenVLA with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.transforms import PromptEncoder
from ipvla.models.backbones import Backbone, PaliGemmaConfig, PrismaticConfig, TinyConfig
from ipvla.types import NO_TOKEN, ModelInputs


@pytest.fixture(params=["tiny", "paligemma", "prismatic"])
def backbone(request: pytest.FixtureRequest, paligemma_directory: Path, prismatic_directory: Path) -> Backbone:
    torch.manual_seed(0)
    if request.param == "tiny":
        return TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28).eval()
    if request.param == "prismatic":
        return PrismaticConfig(prismatic_directory, dtype="float32").build(5, 1, 28).eval()
    config = PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24)
    return config.build(5, 1, 28).eval()


def inputs_for(backbone: Backbone, instructions: list[str], seed: int = 0) -> ModelInputs:
    """Random 28-pixel views and proprioception with these prompts."""
    random = torch.Generator().manual_seed(seed)
    batch = len(instructions)
    encoder = PromptEncoder(backbone.tokenize, backbone.max_prompt_tokens)
    ids = torch.from_numpy(np.stack([encoder.prompt(instruction) for instruction in instructions]))
    return ModelInputs(
        images=torch.randint(0, 256, (batch, 1, 28, 28, 3), generator=random, dtype=torch.uint8),
        proprio=torch.rand(batch, 5, generator=random) * 2 - 1,
        input_ids=ids.clamp(min=0),
        attention_mask=ids != NO_TOKEN,
    )
