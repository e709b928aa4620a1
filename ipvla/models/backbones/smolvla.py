"""The `smolvla` backbone: SmolVLM2 with half its language layers, as SmolVLA reads it (arXiv 2506.01844).

    [pictures, the instruction, the state]

Pictures and words read each other, and not the state, whose token reads them and is the cognition. Positions count
from 0, rotated with base 10000 whatever SmolVLM2's own is, and embeddings are multiplied by the root of the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.decoder import earlier
from ipvla.models.backbones.hugging_face import Frame, words_of
from ipvla.models.backbones.imported import ImportedBackbone, ImportedConfig, require_vision_heads
from ipvla.models.backbones.letterbox import letterboxed
from ipvla.models.backbones.protocol import BackboneConfig, Embedded, Placed
from ipvla.types import ModelInputs


@dataclass(frozen=True)
class SmolVLMSizes:
    """Of SmolVLA's half of SmolVLM2 500M, by default.

    Attributes:
        width, layers, mlp, heads, key_heads, head_size: of the language model.
        vocabulary: number of token ids.
        vision_width, vision_layers, vision_mlp, vision_heads: of the vision tower.
        patch, image_size: pixels.
        shuffle: side of the square of patches that become one token.
    """

    width: int = 960
    layers: int = 16
    mlp: int = 2560
    heads: int = 15
    key_heads: int = 5
    head_size: int = 64
    vocabulary: int = 49280
    vision_width: int = 768
    vision_layers: int = 12
    vision_mlp: int = 3072
    vision_heads: int = 12
    patch: int = 16
    image_size: int = 512
    shuffle: int = 4

    def __post_init__(self) -> None:
        require_vision_heads(self.vision_heads, self.vision_width)

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return (self.image_size // self.patch // self.shuffle) ** 2

    def hugging_face(self) -> Any:
        """transformers' configuration; the image token lies outside the vocabulary."""
        from transformers import SmolVLMConfig  # takes seconds

        return SmolVLMConfig(
            vision_config={
                "hidden_size": self.vision_width, "num_hidden_layers": self.vision_layers,
                "intermediate_size": self.vision_mlp, "num_attention_heads": self.vision_heads,
                "patch_size": self.patch, "image_size": self.image_size,
            },
            text_config={
                "model_type": "llama", "hidden_size": self.width, "num_hidden_layers": self.layers,
                "intermediate_size": self.mlp, "num_attention_heads": self.heads,
                "num_key_value_heads": self.key_heads, "head_dim": self.head_size, "rms_norm_eps": 1e-5,
                "vocab_size": self.vocabulary, "pad_token_id": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            scale_factor=self.shuffle,
            image_token_id=self.vocabulary,
            tie_word_embeddings=False,
        )  # fmt: skip


@BackboneConfig.register_subclass("smolvla")
@dataclass(frozen=True)
class SmolVLABackboneConfig(ImportedConfig):
    """Sizes; see `ImportedConfig`.

    Attributes:
        sizes: see `SmolVLMSizes`.
        state_size: numbers of the state inside the model, of which the real ones come first and the others are 0.
    """

    sizes: SmolVLMSizes = field(default_factory=SmolVLMSizes)
    state_size: int = 32
    pretrained: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    max_prompt_tokens: int = 240

    @property
    def image_tokens(self) -> int:
        return self.sizes.image_tokens

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> SmolVLABackbone:
        from transformers import SmolVLMForConditionalGeneration

        if proprio_dim > self.state_size:
            raise ValueError(
                f"backbone.state_size is {self.state_size}, and there are {proprio_dim} numbers per state; leave "
                "some out by data.proprio, or set it higher and train the projection anew"
            )
        tokenizer = self.tokenizer()
        vlm = self.without_weights(SmolVLMForConditionalGeneration, self.sizes.hugging_face())
        images = [self.sizes.vocabulary] * (self.image_tokens * num_views)
        return SmolVLABackbone(vlm, self, Frame(tuple(images), tuple(words_of(tokenizer, "\n"))), tokenizer)


class SmolVLABackbone(ImportedBackbone):
    """See the module's docstring."""

    layer_pattern = r"text_model\.layers\.({layers})\."
    config: SmolVLABackboneConfig

    def __init__(self, vlm: Any, config: SmolVLABackboneConfig, frame: Frame, tokenizer: Any) -> None:
        super().__init__(vlm, config, frame, tokenizer)
        self.state_proj = nn.Linear(config.state_size, self.width)

    @property
    def decoder(self) -> Any:
        return self.network.model.text_model

    def tokenize(self, instruction: str) -> list[int]:
        return [*self.frame.before, *self.tokenizer.encode(self.config.worded(instruction))]

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = self.network.model
        perception = model.connector(model.vision_model(self._pixels(images)).last_hidden_state)
        return perception.unflatten(0, (len(images), -1)).flatten(1, 2), {}

    def embed(self, inputs: ModelInputs) -> Embedded:
        """The state stands behind the prompt, before its padding."""
        prompt = super().embed(inputs)
        state = F.pad(inputs.proprio, (0, self.state_proj.in_features - inputs.proprio.shape[-1]))
        state = self.state_proj(state.to(self.state_proj.weight.dtype)).to(prompt.tokens.dtype)
        last = prompt.last + 1
        place = last[:, None, None].expand(-1, -1, self.width)
        return replace(
            prompt,
            tokens=F.pad(prompt.tokens * math.sqrt(self.width), (0, 0, 0, 1)).scatter(1, place, state[:, None]),
            valid=F.pad(prompt.valid, (0, 1)).scatter(1, last[:, None], True),
            last=last,
            instruction=F.pad(prompt.instruction, (0, 1)),
        )

    def visible(self, embedded: Embedded, place: Placed) -> torch.Tensor:
        """Pictures and words do not read the state; a memory's tokens, which stand behind it, do."""
        count = embedded.tokens.shape[1]
        state = F.pad(F.one_hot(embedded.last, count).bool(), (0, place.valid.shape[1] - count))
        return super().visible(embedded, place) & (earlier(place.valid) | ~state[:, None])

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("SmolVLA has half of its language model's layers, which do not answer in words")

    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        raise NotImplementedError("SmolVLA has half of its language model's layers, which do not answer in words")

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return letterboxed(images.flatten(0, 1), self.config.sizes.image_size, "corner").to(self.network.dtype)
