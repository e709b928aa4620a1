"""The `smolvlm` backbone: SmolVLM2 (arXiv 2504.05299) on transformers' classes; SmolVLA stands on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ipvla.models.backbones.hugging_face import Frame, HuggingFaceBackbone, HuggingFaceConfig, chat_frame, resized
from ipvla.models.backbones.protocol import BackboneConfig


@BackboneConfig.register_subclass("smolvlm")
@dataclass(frozen=True)
class SmolVLMConfig(HuggingFaceConfig):
    """Which weights, and how they are asked, in the model's own chat template.

    Every picture is seen once, whole, at the vision tower's size, as SmolVLA does (no crops of it beside).
    """

    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)

    pretrained: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"

    def frame(self, tokenizer: Any, architecture: Any, num_views: int) -> Frame:
        """The chat template, in which a picture is its image tokens between the marks of a whole picture."""
        vision = architecture.vision_config
        count = (vision.image_size // vision.patch_size // architecture.scale_factor) ** 2
        image, whole, around = ("<image>", "<global-img>", "<fake_token_around_image>")
        return chat_frame(tokenizer, num_views, {image: f"{around}{whole}{image * count}{around}"})

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> SmolVLMBackbone:
        tokenizer = self.tokenizer()
        frame = self.frame(tokenizer, self.architecture(), num_views)
        return SmolVLMBackbone(self.weights(), tokenizer, frame, self)


class SmolVLMBackbone(HuggingFaceBackbone):
    """A token reads those before it only."""

    attention = "causal"
    layer_pattern = r"text_model\.layers\.({layers})\."

    @property
    def decoder(self) -> Any:
        return self.network.model.text_model

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size = self.network.config.vision_config.image_size
        x = (resized(images, size, "bicubic") / 127.5 - 1).to(self.network.dtype)
        features = self.network.model.get_image_features(x.reshape(*images.shape[:2], *x.shape[1:])).pooler_output
        return torch.cat(list(features)).reshape(len(images), -1, self.perception_size), {}
