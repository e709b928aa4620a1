"""The `qwen_vl` backbone: Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631) on transformers' classes.

A position has three axes, time, row and column (M-RoPE): the tokens of a picture share their time, and the text
goes on behind the picture's longest axis. In Qwen3-VL features of earlier vision layers are added to the states
behind the first language layers (DeepStack, arXiv 2406.04334).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from ipvla.models.backbones.hugging_face import (
    Frame,
    HuggingFaceBackbone,
    HuggingFaceConfig,
    chat_frame,
    flattened,
    resized,
)
from ipvla.models.backbones.protocol import BackboneConfig, Embedded, Placed

_DEEP: Final = "deepstack"


@BackboneConfig.register_subclass("qwen_vl")
@dataclass(frozen=True)
class QwenVLConfig(HuggingFaceConfig):
    """Which weights, such as `Qwen/Qwen3-VL-2B-Instruct`, and how they are asked, in their own chat template.

    Attributes:
        picture_px: side in pixels of the square that every picture is resized to, a multiple of the side of an
            image token: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen3_vl")

    pretrained: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    max_prompt_tokens: int = 512
    picture_px: int = 224

    def frame(self, tokenizer: Any, architecture: Any, num_views: int) -> Frame:
        """The chat template, in which a picture's one token is repeated for each of its image tokens."""
        vision = architecture.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        if self.picture_px < side or self.picture_px % side:
            raise ValueError(f"backbone.picture_px is {self.picture_px}; this model takes multiples of {side}")
        frame = chat_frame(tokenizer, num_views)
        repeats = {architecture.image_token_id: (self.picture_px // side) ** 2}
        return Frame(tuple(i for i in frame.before for _ in range(repeats.get(i, 1))), frame.behind)

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> QwenVLBackbone:
        from transformers import AutoImageProcessor

        tokenizer = self.tokenizer()
        frame = self.frame(tokenizer, self.architecture(), num_views)
        try:
            processor = AutoImageProcessor.from_pretrained(self.pretrained, cache_dir=self.cache_dir)
        except (OSError, ValueError) as error:
            raise self.unusable(error) from None
        return QwenVLBackbone(self.weights(), tokenizer, frame, self, processor)


class QwenVLBackbone(HuggingFaceBackbone):
    """A token reads those before it only."""

    attention = "causal"

    _mean: torch.Tensor
    _std: torch.Tensor
    _places: torch.Tensor  # int64 [Np], of the image tokens in every prompt
    _positions: torch.Tensor  # int64 [3, N], of the tokens up to the first word, which is one further

    def __init__(self, vlm: Any, tokenizer: Any, frame: Frame, config: QwenVLConfig, processor: Any) -> None:
        super().__init__(vlm, tokenizer, frame, config)
        self.picture_px = config.picture_px
        ids = torch.tensor([frame.before])
        seen = ids == self.image_token
        views = int(seen.sum()) // self._grid**2
        (positions, _) = vlm.model.get_rope_index(ids, seen.int(), image_grid_thw=self._grids(views))
        for name, value in {
            "_mean": torch.tensor(processor.image_mean)[:, None, None],
            "_std": torch.tensor(processor.image_std)[:, None, None],
            "_places": seen[0].nonzero()[:, 0],
            "_positions": positions[:, 0],
        }.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def _grid(self) -> int:
        """Image tokens along a picture's side."""
        vision = self.network.config.vision_config
        return self.picture_px // int(vision.patch_size * vision.spatial_merge_size)

    def _grids(self, pictures: int) -> torch.Tensor:
        """Patches of each picture along time, height and width, int64 [M, 3]."""
        side = self._grid * self.network.config.vision_config.spatial_merge_size
        return torch.tensor([[1, side, side]]).repeat(pictures, 1)

    def positions(self, tokens: int) -> torch.Tensor:
        first = self._positions[:, :tokens]
        words = torch.arange(tokens - first.shape[1], device=first.device) + self._positions.max() + 1
        return torch.cat([first, words.expand(3, -1)], 1)

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        vision, g = self.network.config.vision_config, self._grid
        p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        x = (resized(images, self.picture_px, "bicubic") / 255 - self._mean) / self._std
        # patches that become one token stand together; each holds the picture once per frame of a video's patch
        x = x.reshape(len(x), 3, g, m, p, g, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]
        x = x.expand(*x.shape[:6], t, p, p).reshape(-1, 3 * t * p * p)
        grids = self._grids(images.shape[0] * images.shape[1]).to(x.device)
        seen = self.network.model.get_image_features(x.to(self.network.dtype), grids)

        def rows(features: Any) -> torch.Tensor:
            return torch.cat(list(features)).reshape(len(images), -1, self.perception_size)

        deep = getattr(seen, "deepstack_features", None)
        extra = {} if deep is None else {_DEEP: torch.stack([rows(each) for each in deep], 1)}
        return rows(seen.pooler_output), extra

    def beside(self, embedded: Embedded, place: Placed) -> dict[str, Any]:
        if _DEEP not in embedded.extra:
            return {}
        pictures = torch.zeros_like(place.valid)
        pictures[:, self._places + place.observation.start] = True
        return {"visual_pos_masks": pictures, "deepstack_visual_embeds": flattened(embedded.extra, _DEEP)}
