"""Small real models: TinyVLM, and transformers' vision-language models with random weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from ipvla.data.transforms import PromptEncoder
from ipvla.models.backbones import (
    Backbone,
    BackboneConfig,
    PaliGemmaConfig,
    PrismaticConfig,
    QwenVLConfig,
    SmolVLMConfig,
    TinyConfig,
)
from ipvla.types import NO_TOKEN, ModelInputs
from tests.models.random_vlms import save_random_qwen, save_random_smolvlm

BACKBONES = ("tiny", "paligemma", "qwen2_5_vl", "qwen3_vl", "smolvlm", "prismatic")


@pytest.fixture(scope="session")
def backbone_configs(
    paligemma_directory: Path, prismatic_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, BackboneConfig]:
    """Of `BACKBONES`: six layers each."""
    directories = {name: str(tmp_path_factory.mktemp(name)) for name in BACKBONES[2:5]}
    save_random_qwen(Path(directories["qwen2_5_vl"]), 2)
    save_random_qwen(Path(directories["qwen3_vl"]), 3)
    save_random_smolvlm(Path(directories["smolvlm"]))
    small = {"dtype": "float32", "max_prompt_tokens": 36}
    return {
        "tiny": TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8),
        "paligemma": PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24),
        "qwen2_5_vl": QwenVLConfig(directories["qwen2_5_vl"], picture_px=56, **small),
        "qwen3_vl": QwenVLConfig(directories["qwen3_vl"], picture_px=64, **small),
        "smolvlm": SmolVLMConfig(directories["smolvlm"], **small),
        "prismatic": PrismaticConfig(prismatic_directory, dtype="float32"),
    }


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest, backbone_configs: Mapping[str, BackboneConfig]) -> Backbone:
    torch.manual_seed(0)
    return backbone_configs[request.param].build(5, 1, 28).eval()


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
