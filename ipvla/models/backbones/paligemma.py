"""The `paligemma` backbone: transformers' PaliGemma classes, the route for real weights (arXiv 2407.07726)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ipvla.models.backbones.hugging_face import Frame, HuggingFaceBackbone, HuggingFaceConfig, words_of
from ipvla.models.backbones.protocol import BackboneConfig


@BackboneConfig.register_subclass("paligemma")
@dataclass(frozen=True)
class PaliGemmaConfig(HuggingFaceConfig):
    """Which weights, such as `google/paligemma-3b-pt-224`, and how they are asked."""

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)

    pretrained: str = "google/paligemma-3b-pt-224"

    def frame(self, tokenizer: Any, architecture: Any, num_views: int) -> Frame:
        """Image tokens and BOS before the words, a newline behind them."""
        vision = architecture.vision_config
        images = [architecture.image_token_id] * ((vision.image_size // vision.patch_size) ** 2 * num_views)
        newline = words_of(tokenizer, "\n") or [tokenizer.eos_token_id]
        return Frame((*images, tokenizer.bos_token_id), tuple(newline))

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> PaliGemmaBackbone:
        tokenizer = self.tokenizer()
        frame = self.frame(tokenizer, self.architecture(), num_views)
        return PaliGemmaBackbone(self.weights(), tokenizer, frame, self)


class PaliGemmaBackbone(HuggingFaceBackbone):
    """Every token of a prompt reads every other; positions are counted from 1."""

    first_position = 1

    @property
    def picture_px(self) -> int:
        """Side of the pictures that the vision tower sees."""
        return int(self.network.config.vision_config.image_size)

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.network.model.get_image_features(self.pixels(images)).pooler_output
        return features.reshape(len(images), -1, self.perception_size), {}

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, V, H, W, 3] -> [B * V, 3, S, S] in [-1, 1], S = `picture_px`."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.network.dtype) / 127.5 - 1
        if x.shape[-1] == self.picture_px:
            return x
        return F.interpolate(x.float(), (self.picture_px,) * 2, mode="bilinear", antialias=True).to(x.dtype)
