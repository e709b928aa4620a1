"""One vector between the speeds: a light eye and the head, conditioned on what the slow backbone makes of a scene.

As in Helix (Figure, 2025: a 7B model at 7 to 9 Hz, 80M parameters at 200 Hz) and HiRT (arXiv 2410.05273). The fast
part reads no words: what is asked for, and what is remembered, it knows from the vector alone, through which the
gradient of its actions trains the slow part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory import MemoryConfig
from ipvla.models.speeds.protocol import Shown, SpeedsConfig, TwoSpeedsConfig
from ipvla.models.speeds.two_speeds import Age, FastPart, TwoSpeeds
from ipvla.types import Memory, ModelInputs

if TYPE_CHECKING:
    from ipvla.models.backbones.residual_trunk import ResidualTrunk
    from ipvla.models.backbones.tiny_vlm import TinyTrunk


@SpeedsConfig.register_subclass("latent")
@dataclass(frozen=True)
class LatentSpeedsConfig(TwoSpeedsConfig):
    """See the module's docstring.

    Attributes:
        width: of the fast part's own vectors.
        trunk_channels: of its visual trunk, a multiple of 8.
        trunk_blocks: residual blocks of that trunk, for textured scenes (`ResidualTrunk`); 0 for two convolutions.
    """

    width: int = 128
    trunk_channels: int = 32
    trunk_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("width", 1), ("trunk_channels", 8), ("trunk_blocks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model.speeds.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.trunk_channels % 8:
            raise ValueError(f"model.speeds.trunk_channels is {self.trunk_channels}; give a multiple of 8")

    def build(
        self, memory: MemoryConfig, backbone: Backbone, shown: Shown, chunk: int, action_varies: torch.Tensor
    ) -> TwoSpeeds:
        return TwoSpeeds.around(LightEye(self, backbone.width, shown), self, memory, backbone)


class LightEye(FastPart):
    """Pictures, state, latent and age -> features: the latent says in the trunk what to look for (FiLM)."""

    def __init__(self, config: LatentSpeedsConfig, latent: int, shown: Shown) -> None:
        super().__init__()
        width, channels = config.width, config.trunk_channels
        self.width, self.latent_size = width, latent
        self.trunk = _trunk(config, shown)
        self.perception_size = channels + 2
        self.latent = nn.Sequential(nn.LayerNorm(latent), nn.Linear(latent, width))
        self.proprio = nn.Sequential(nn.Linear(shown.proprio_dim, width), nn.GELU(), nn.Linear(width, width))
        self.age = Age(config.staleness, width)
        self.condition = nn.Sequential(nn.LayerNorm(3 * width), nn.Linear(3 * width, width))
        self.out = nn.Sequential(
            nn.Linear(2 * width + 3 * shown.num_views * channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width)

    def calibrate(self, mean_image: torch.Tensor) -> None:
        self.trunk.calibrate(mean_image)

    def blank(self, batch: int) -> Memory:
        return {"cognition": torch.zeros(batch, self.latent_size, device=self.norm.weight.device)}

    def thought(self, features: Features) -> Memory:
        return {"cognition": features.cognition.float()}

    def look(self, slow: Backbone, inputs: ModelInputs, thought: Memory, age: torch.Tensor) -> Features:
        latent = self.latent(thought["cognition"])
        known = self.condition(torch.cat([latent, self.proprio(inputs.proprio), self.age(age)], -1))
        perception, places = self.trunk(inputs.images, known)
        cognition = self.norm(latent + self.out(torch.cat([latent, known, places.to(latent.dtype)], -1)))
        return Features(cognition, perception, inputs.proprio)


def _trunk(config: LatentSpeedsConfig, shown: Shown) -> TinyTrunk | ResidualTrunk:
    from ipvla.models.backbones.residual_trunk import ResidualTrunk
    from ipvla.models.backbones.tiny_vlm import TinyTrunk, TinyVLMConfig  # transformers takes seconds

    side, views, channels = shown.image_size, shown.num_views, config.trunk_channels
    if config.trunk_blocks:
        return ResidualTrunk(side, views, channels, config.trunk_blocks, config.width)
    return TinyTrunk(
        TinyVLMConfig(image_size=side, num_views=views, trunk_channels=channels, hidden_size=config.width)
    )
