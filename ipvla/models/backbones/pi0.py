"""The `pi0` backbone: the PaliGemma of pi0, pi0.5 and pi0-FAST (arXiv 2410.24164, 2504.16054, 2501.09747).

It differs from PaliGemma's own use in four things: positions count from 0, pictures keep their aspect, the prompt
is the bare instruction or has the state in words, and a camera that is missing takes no tokens at all: in the
published programs its tokens are hidden from all others and take no position, which is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ipvla.models.backbones.hugging_face import Frame, words_of
from ipvla.models.backbones.imported import ImportedBackbone, ImportedConfig, require_vision_heads
from ipvla.models.backbones.letterbox import letterboxed
from ipvla.models.backbones.protocol import BackboneConfig

#: A state in [-1, 1] is written as one of so many whole numbers.
_STATE_BINS = 256


@dataclass(frozen=True)
class PaliGemmaSizes:
    """Of PaliGemma 3B, by default.

    Attributes:
        width, layers, mlp, heads, key_heads, head_size: of the language model.
        vocabulary: number of token ids.
        vision_width, vision_layers, vision_mlp, vision_heads: of the vision tower.
        patch, image_size: pixels; the tower sees (image_size / patch)^2 patches, each one token.
    """

    width: int = 2048
    layers: int = 18
    mlp: int = 16384
    heads: int = 8
    key_heads: int = 1
    head_size: int = 256
    vocabulary: int = 257152
    vision_width: int = 1152
    vision_layers: int = 27
    vision_mlp: int = 4304
    vision_heads: int = 16
    patch: int = 14
    image_size: int = 224

    def __post_init__(self) -> None:
        require_vision_heads(self.vision_heads, self.vision_width)

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return (self.image_size // self.patch) ** 2

    def hugging_face(self) -> Any:
        """transformers' configuration; the image token lies outside the vocabulary."""
        from transformers import PaliGemmaConfig  # takes seconds

        return PaliGemmaConfig(
            vision_config={
                "model_type": "siglip_vision_model", "hidden_size": self.vision_width,
                "num_hidden_layers": self.vision_layers, "intermediate_size": self.vision_mlp,
                "num_attention_heads": self.vision_heads, "patch_size": self.patch, "image_size": self.image_size,
                "projection_dim": self.width, "vision_use_head": False,
            },
            text_config={
                "model_type": "gemma", "hidden_size": self.width, "num_hidden_layers": self.layers,
                "intermediate_size": self.mlp, "num_attention_heads": self.heads,
                "num_key_value_heads": self.key_heads, "head_dim": self.head_size, "vocab_size": self.vocabulary,
            },
            projection_dim=self.width,
            image_token_id=self.vocabulary,
        )  # fmt: skip


@BackboneConfig.register_subclass("pi0")
@dataclass(frozen=True)
class Pi0BackboneConfig(ImportedConfig):
    """Sizes and prompt; see `ImportedConfig`.

    Attributes:
        sizes: see `PaliGemmaSizes`.
        prompt: with `{instruction}` in it; `{state}` is replaced by the normalised state, each number of it in one
            of 256 bins over [-1, 1] (a number below writes -1, one above 255).
        cleaned: spaces around an instruction are cut off, and underscores and line breaks in it become spaces.
        lowered: as `cleaned`, but line breaks stay, and letters become small ones: openpi's pi0-FAST.
        state_numbers: of the state in the prompt, the last of which are 0; 0 for the state's own.
        closing: the prompt ends in a second `<bos>`, which all its tokens read: LeRobot's pi0-FAST when it acts.
        black_views: places among the pictures, these included, of a camera that is missing and is seen as black:
            openpi's pi0-FAST. Otherwise one that is missing takes no tokens.
    """

    sizes: PaliGemmaSizes = field(default_factory=PaliGemmaSizes)
    pretrained: str = "google/paligemma-3b-pt-224"
    max_prompt_tokens: int = 816
    cleaned: bool = False
    lowered: bool = False
    state_numbers: int = 0
    closing: bool = False
    black_views: tuple[int, ...] = ()

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        super().check(instructions, num_views + len(self.black_views))

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return self.sizes.image_tokens

    def worded(self, instruction: str) -> str:
        return self.text(instruction)

    def text(self, instruction: str, state: npt.NDArray[np.floating[Any]] | None = None) -> str:
        """The prompt in words, of a normalised state float [P]."""
        if self.cleaned or self.lowered:
            instruction = instruction.strip().replace("_", " ")
            instruction = instruction.lower() if self.lowered else instruction.replace("\n", " ")
        if state is not None:
            state = np.pad(state, (0, max(0, self.state_numbers - len(state))))
        edges = np.linspace(-1, 1, _STATE_BINS + 1)[:-1]
        words = () if state is None else map(str, np.digitize(state, edges) - 1)
        return self.prompt.format(instruction=instruction.removesuffix("\n"), state=" ".join(words))

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> Pi0Backbone:
        from transformers import PaliGemmaForConditionalGeneration

        tokenizer = self.tokenizer()
        vlm = self.without_weights(PaliGemmaForConditionalGeneration, self.sizes.hugging_face())
        images = [self.sizes.vocabulary] * (self.image_tokens * (num_views + len(self.black_views)))
        behind = () if self.states else words_of(tokenizer, self.prompt.rpartition("{instruction}")[2])
        bos = (tokenizer.bos_token_id,)
        frame = Frame((*images, *bos), (*behind, *bos) if self.closing else tuple(behind))
        return Pi0Backbone(vlm, self, frame, tokenizer, proprio_dim)

    @property
    def states(self) -> bool:
        """Is the state in the prompt?"""
        return "{state}" in self.prompt


class Pi0Backbone(ImportedBackbone):
    """Prompt: image tokens, BOS, the text; cognition is the last hidden state of its last token."""

    config: Pi0BackboneConfig

    def __init__(
        self, vlm: Any, config: Pi0BackboneConfig, frame: Frame, tokenizer: Any, proprio_dim: int
    ) -> None:
        super().__init__(vlm, config, frame, tokenizer)
        self.proprio_dim = proprio_dim
        self.state_in_prompt = config.states

    def tokenize(self, instruction: str) -> list[int]:
        """With a state that takes the most tokens, where the prompt has one."""
        return self.tokenize_with_state(instruction, np.ones(self.proprio_dim, np.float32))

    def tokenize_with_state(self, instruction: str, state: npt.NDArray[np.float32]) -> list[int]:
        closing = self.frame.behind[-1:] if self.config.closing else ()
        return [*self.frame.before, *self.tokenize_text(self.config.text(instruction, state)), *closing]

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels = self._pixels(images)
        pixels = pixels.reshape(*images.shape[:2], *pixels.shape[1:])
        for place in self.config.black_views:
            black = torch.full_like(pixels[:, :1], -1)
            pixels = torch.cat([pixels[:, :place], black, pixels[:, place:]], 1)
        features = self.network.model.get_image_features(pixels.flatten(0, 1)).pooler_output
        return features.reshape(len(images), -1, self.perception_size), {}

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return letterboxed(images.flatten(0, 1), self.config.sizes.image_size).to(self.network.dtype)
