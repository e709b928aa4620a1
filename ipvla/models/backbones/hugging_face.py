"""Backbones on transformers' vision-language models whose prompts have a token for every token of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.decoder import DecoderBackbone
from ipvla.models.backbones.protocol import BackboneConfig, Embedded, require_prompts
from ipvla.storage import absolute, paths_of_fields_absolute
from ipvla.types import NO_TOKEN, ModelInputs

#: What `backbone.dtype` may be.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Frame:
    """Token ids before and behind the words of a prompt; the image tokens are among those before."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    def around(self, words: Sequence[int]) -> list[int]:
        return [*self.before, *words, *self.behind]


@dataclass(frozen=True)
class HuggingFaceConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        model_types: of the configs in `config.json` that the backbone runs.
        pretrained: a hub name, or a directory written by `save_pretrained` (model, tokenizer, image processor).
        cache_dir: directory of downloads; None follows HF_HOME.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        prompt: with `{instruction}` in it.
        max_prompt_tokens: longest prompt in tokens, image tokens included.
    """

    model_types: ClassVar[tuple[str, ...]]

    pretrained: str = ""
    cache_dir: Path | None = None
    dtype: str = "bfloat16"
    prompt: str = "What action should the robot take to {instruction}?"
    max_prompt_tokens: int = 320

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(DTYPES)}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"backbone.prompt {self.prompt!r} does not contain {{instruction}}")
        if not self.pretrained:
            raise ValueError("backbone.pretrained is empty; give a hub name or a directory")

    def absolute(self) -> Self:
        """With absolute paths; `pretrained` too, where it is a directory and no hub name."""
        config = paths_of_fields_absolute(self)
        directory = absolute(self.pretrained)
        return replace(config, pretrained=str(directory)) if directory.is_dir() else config

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        if (Path(self.pretrained) / "adapter_config.json").is_file():
            raise ValueError(
                f"backbone.pretrained {self.pretrained} holds an adapter of PEFT, and all weights below would "
                "stay frozen; merge it first: "
                "peft.AutoPeftModel.from_pretrained(DIR).merge_and_unload().save_pretrained(MERGED), "
                "copy the tokenizer there, and give MERGED. Adapters for training are model.lora"
            )
        if not instructions or not Path(self.pretrained).is_dir():
            return
        tokenizer = self.tokenizer()
        frame = self.frame(tokenizer, self.architecture(), num_views)
        lengths = {text: len(frame.around(words_of(tokenizer, self.worded(text)))) for text in instructions}
        require_prompts(lengths, self.max_prompt_tokens)

    def worded(self, instruction: str) -> str:
        """What the model is asked."""
        return self.prompt.format(instruction=instruction.lower())

    def frame(self, tokenizer: Any, architecture: Any, num_views: int) -> Frame:
        """Around the words of a prompt with so many pictures, by the config of `config.json`."""
        raise NotImplementedError

    def architecture(self) -> Any:
        """The config of `config.json`. ValueError if it is none, or of a model that this backbone does not run."""
        from transformers import AutoConfig  # takes seconds

        try:
            found = AutoConfig.from_pretrained(self.pretrained, cache_dir=self.cache_dir)
        except (OSError, ValueError, AttributeError) as error:
            raise self.unusable(error) from None
        if found.model_type not in self.model_types:
            kind = self.get_choice_name(type(self))
            raise ValueError(
                f"backbone.pretrained {self.pretrained!r} holds a {found.model_type} model, and backbone.type "
                f"{kind} runs {', '.join(self.model_types)}; choose another type, or other weights"
            )
        return found

    def tokenizer(self) -> Any:
        """ValueError if there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.pretrained, cache_dir=self.cache_dir)
        except (OSError, ValueError) as error:
            raise self.unusable(error) from None

    def weights(self) -> Any:
        """The model, every weight of which was found. ValueError otherwise."""
        from transformers import AutoModelForImageTextToText

        try:
            vlm, report = AutoModelForImageTextToText.from_pretrained(
                self.pretrained, dtype=DTYPES[self.dtype], output_loading_info=True, cache_dir=self.cache_dir
            )
        except (OSError, ValueError) as error:
            raise self.unusable(error) from None
        if report["missing_keys"]:
            raise ValueError(
                f"{self.pretrained} lacks weights for {sorted(report['missing_keys'])[:3]}...; "
                "was it saved after PEFT wrapped it? Save the base model first"
            )
        return vlm

    def unusable(self, error: Exception) -> ValueError:
        return ValueError(
            f"backbone.pretrained {self.pretrained!r} cannot be loaded ({str(error).splitlines()[0]}); "
            "give a directory written by save_pretrained, of model and tokenizer, or allow the download"
        )


class HuggingFaceBackbone(DecoderBackbone):
    """Prompt: `frame.before`, the words, `frame.behind`."""

    layer_pattern = r"language_model\.layers\.({layers})\."

    def __init__(self, vlm: Any, tokenizer: Any, frame: Frame, config: HuggingFaceConfig) -> None:
        super().__init__(vlm, vlm.config.get_text_config(), config.max_prompt_tokens)
        self.tokenizer, self.frame, self.config = tokenizer, frame, config
        self.perception_size = self.width
        self.end = tokenizer.eos_token_id
        self.image_token = vlm.config.image_token_id

    @property
    def decoder(self) -> Any:
        return self.network.model.language_model

    @property
    def words(self) -> nn.Module:
        return cast(nn.Module, self.network.get_input_embeddings())

    @property
    def speaker(self) -> nn.Module:
        return cast(nn.Module, self.network.lm_head)

    def patches(self, num_views: int) -> tuple[int, int] | None:
        tokens = (*self.frame.before, *self.frame.behind).count(self.image_token)
        side = math.isqrt(tokens // num_views)
        return (side, self.width) if side * side * num_views == tokens else None

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """uint8 [B, V, H, W, 3] -> the image tokens [B, Np, D], and what goes into `Embedded.extra`."""
        raise NotImplementedError

    def tokenize(self, instruction: str) -> list[int]:
        return self.question(self.config.worded(instruction))

    def tokenize_text(self, text: str) -> list[int]:
        return words_of(self.tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens = [i for i in ids if i != NO_TOKEN]
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def question(self, text: str) -> list[int]:
        return self.frame.around(self.tokenize_text(text))

    def embed(self, inputs: ModelInputs) -> Embedded:
        lengths = inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        is_image = (ids == self.image_token) & valid
        perception, extra = self.see(inputs.images)
        fuse = self.fuse(inputs)
        perception = perception if fuse is None else fuse(perception)
        # the image token may lie outside the vocabulary
        tokens = self.embed_ids(ids.masked_fill(is_image, 0))
        tokens = tokens.masked_scatter(is_image[..., None], perception.to(tokens.dtype))
        place = torch.arange(longest, device=ids.device)
        inside = (place >= len(self.frame.before)) & (place < (lengths - len(self.frame.behind))[:, None])
        return Embedded(tokens, valid, lengths - 1, perception.float(), inputs.proprio, inside, extra)


def words_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, nothing added."""
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False))


def chat_frame(tokenizer: Any, num_views: int, pictures: Mapping[str, str] = MappingProxyType({})) -> Frame:
    """The tokenizer's chat template around a user's pictures and words, and the beginning of the reply.

    Args:
        pictures: text that stands for a picture in the template -> what stands for it in a prompt.
    """
    said = "instruction"
    content = [*({"type": "image"} for _ in range(num_views)), {"type": "text", "text": said}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, _, behind = text.rpartition(said)
    for short, long in pictures.items():
        before = before.replace(short, long)
    return Frame(tuple(words_of(tokenizer, before)), tuple(words_of(tokenizer, behind)))


def resized(images: torch.Tensor, size: int, mode: str = "bilinear") -> torch.Tensor:
    """uint8 [B, V, H, W, 3] -> float32 [B * V, 3, S, S] of whole numbers in [0, 255].

    As PIL resizes: along the rows, then along the columns, each rounded to whole numbers.
    """
    x = images.flatten(0, 1).permute(0, 3, 1, 2).float()
    for shape in ((x.shape[-2], size), (size, size)):
        if x.shape[-2:] != shape:
            x = F.interpolate(x, shape, mode=mode, antialias=True).round().clamp(0, 255)
    return x


def flattened(extra: Mapping[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """`extra[name]` [B, L, N, D] as L tensors [B * N, D]."""
    return [layer.flatten(0, 1) for layer in extra[name].unbind(1)]
