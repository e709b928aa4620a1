"""The `paligemma` backbone: transformers' PaliGemma classes, the route for real weights (arXiv 2407.07726)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.protocol import (
    Backbone,
    BackboneConfig,
    BackboneOutput,
    Context,
    Embedded,
    answered,
    placed,
    require_prompts,
)
from ipvla.models.features import Features
from ipvla.storage import absolute, paths_of_fields_absolute
from ipvla.types import NO_TOKEN, ModelInputs

#: What `backbone.dtype` may be.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@BackboneConfig.register_subclass("paligemma")
@dataclass(frozen=True)
class PaliGemmaConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        pretrained: a hub name such as `google/paligemma-3b-pt-224`, or a directory written by `save_pretrained`
            (model and tokenizer).
        cache_dir: directory of downloads; None follows HF_HOME.
        dtype: "float32" or "bfloat16".
        prompt: with `{instruction}` in it.
        max_prompt_tokens: longest prompt in tokens, image tokens included.
    """

    layers_write_cache: ClassVar[bool] = True

    pretrained: str = "google/paligemma-3b-pt-224"
    cache_dir: Path | None = None
    dtype: str = "bfloat16"
    prompt: str = "What action should the robot take to {instruction}?"
    max_prompt_tokens: int = 320

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(DTYPES)}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"backbone.prompt {self.prompt!r} does not contain {{instruction}}")

    def absolute(self) -> Self:
        """With absolute paths; `pretrained` too, where it is a directory and no hub name."""
        config = paths_of_fields_absolute(self)
        directory = absolute(self.pretrained)
        return replace(config, pretrained=str(directory)) if directory.is_dir() else config

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        adapter = Path(self.pretrained) / "adapter_config.json"
        if adapter.is_file():
            raise ValueError(
                f"backbone.pretrained {self.pretrained} holds an adapter of PEFT, and all weights below would "
                "stay frozen; merge it first: "
                "peft.AutoPeftModel.from_pretrained(DIR).merge_and_unload().save_pretrained(MERGED), "
                "copy the tokenizer there, and give MERGED. Adapters for training are model.lora"
            )
        if not instructions or not Path(self.pretrained).is_dir():
            return
        from transformers import AutoConfig  # takes seconds

        try:
            vision = AutoConfig.from_pretrained(self.pretrained).vision_config
            tokenizer = self._tokenizer()
        except (OSError, AttributeError) as error:
            raise _unusable("backbone.pretrained", self.pretrained, error) from None
        pictures = (vision.image_size // vision.patch_size) ** 2 * num_views
        texts = {text: self.prompt.format(instruction=text.lower()) for text in instructions}
        lengths = {
            text: pictures + 2 + len(tokenizer.encode(prompt, add_special_tokens=False))  # BOS, newline
            for text, prompt in texts.items()
        }
        require_prompts(lengths, self.max_prompt_tokens)

    def _tokenizer(self) -> Any:
        """ValueError if there is none."""
        return loaded_tokenizer(self.pretrained, self.cache_dir, "backbone.pretrained")

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> PaliGemmaBackbone:
        from transformers import PaliGemmaForConditionalGeneration  # takes seconds

        tokenizer = self._tokenizer()
        try:
            vlm, report = PaliGemmaForConditionalGeneration.from_pretrained(
                self.pretrained, dtype=DTYPES[self.dtype], output_loading_info=True, cache_dir=self.cache_dir
            )
        except OSError as error:
            raise _unusable("backbone.pretrained", self.pretrained, error) from None
        if report["missing_keys"]:
            raise ValueError(
                f"{self.pretrained} lacks weights for {sorted(report['missing_keys'])[:3]}...; "
                "was it saved after PEFT wrapped it? Save the base model first"
            )
        return PaliGemmaBackbone(vlm, tokenizer, self.prompt, self.max_prompt_tokens, num_views)


def loaded_tokenizer(directory: str, cache_dir: Path | None, setting: str) -> Any:
    """A directory's or hub name's tokenizer. ValueError that names the setting if there is none."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        return AutoTokenizer.from_pretrained(directory, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise _unusable(setting, directory, error) from None


def _unusable(setting: str, value: str, error: Exception) -> ValueError:
    return ValueError(
        f"{setting} {value!r} cannot be loaded ({str(error).splitlines()[0]}); "
        "give a directory written by save_pretrained, of model and tokenizer, or allow the download"
    )


class PaliGemmaBackbone(Backbone):
    """Prompt: image tokens, BOS, the filled template, newline; cognition is the newline's last hidden state."""

    layer_pattern = r"language_model\.layers\.({layers})\."
    #: Position of the first token.
    first_position: ClassVar[int] = 1

    def __init__(self, vlm: Any, tokenizer: Any, prompt: str, max_prompt_tokens: int, num_views: int) -> None:
        super().__init__()
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.template = prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.num_views = num_views
        text, vision = vlm.config.text_config, vlm.config.vision_config
        self.width = text.hidden_size
        self.perception_size = text.hidden_size
        self.num_layers = text.num_hidden_layers
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        self.head_size = text.head_dim
        self.cache_size = text.num_key_value_heads * text.head_dim
        self.image_token = vlm.config.image_token_id
        self.image_size = vision.image_size
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2

    def tokenize(self, instruction: str) -> list[int]:
        return self._prompt(self.template.format(instruction=instruction.lower()))

    def language_layers(self) -> list[nn.Module]:
        return list(self.language_model.layers)

    @property
    def language_model(self) -> Any:
        """The layers and the last norm, without the words of the vocabulary."""
        return self.network.model.language_model

    def tokenize_text(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens = [i for i in ids if i != NO_TOKEN]
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def question(self, text: str) -> list[int]:
        return self._prompt(text)

    def embed(self, inputs: ModelInputs) -> Embedded:
        model, ids = self.network.model, inputs.input_ids
        is_image = (ids == self.image_token) & inputs.attention_mask
        perception = model.get_image_features(self._pixels(inputs.images)).pooler_output
        # the image token may lie outside the vocabulary
        tokens = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        tokens = tokens.masked_scatter(is_image[..., None], perception.to(tokens.dtype))
        last = inputs.attention_mask.sum(-1) - 1
        words = inputs.attention_mask & ~is_image
        words[:, self.image_tokens * self.num_views] = False  # BOS
        words[torch.arange(len(last), device=last.device), last] = False  # the newline
        perception = perception.reshape(len(last), -1, self.perception_size).float()
        return Embedded(tokens, inputs.attention_mask, last, perception, inputs.proprio, words)

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        from transformers import DynamicCache

        context = context or Context()
        place, n = placed(embedded, context, self.attention), embedded.tokens.shape[1]
        x, visible = place.tokens, place.valid
        positions = (torch.arange(n, device=x.device) + self.first_position).expand(len(x), n)
        if context.tokens is not None:
            m = context.tokens.shape[1]
            behind = embedded.last[:, None] + 1 + self.first_position
            positions = torch.cat([positions, behind + torch.arange(m, device=x.device)], 1)
        # every token reads the whole prompt (prefix attention), so one row of scores' biases serves all queries
        bias = torch.zeros(visible.shape, device=x.device).masked_fill(~visible, torch.finfo(x.dtype).min)
        bias = bias[:, None].expand(-1, self.heads, -1)
        caches = context.past is not None or context.keep or self.reads.keys_values
        cache = DynamicCache() if caches else None
        if context.past is not None and cache is not None:
            bias = torch.cat([context.past.bias.clamp(min=torch.finfo(x.dtype).min), bias], -1)
            for layer in range(self.num_layers):
                pair = (self._split(c[:, layer], x.dtype) for c in (context.past.keys, context.past.values))
                cache.update(*pair, layer)
        output = self.language_model(
            inputs_embeds=x,
            attention_mask=self._between(bias[:, :, None].expand(-1, -1, x.shape[1], -1).to(x.dtype), embedded),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        hidden = tuple(h[:, place.observation] for h in output.hidden_states)
        earlier = bias.shape[-1] - x.shape[1]
        rows = torch.arange(len(x), device=x.device)
        last_keys_values = None
        if context.keep and cache is not None:
            places = earlier + embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=x.device)
            last_keys_values = tuple(
                torch.stack([t.transpose(1, 2)[rows[:, None], places].flatten(2) for t in of_layers], 1)
                for of_layers in ([c.keys for c in cache.layers], [c.values for c in cache.layers])
            )

        def keys_values(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            assert cache is not None
            own = slice(earlier, earlier + n)
            pair = (cache.layers[layer].keys, cache.layers[layer].values)
            keys, values = (t[:, :, own].transpose(1, 2).flatten(2) for t in pair)
            return keys, values

        cognition = hidden[-1][rows, embedded.last].float()
        layers = self.layer_states(hidden, keys_values, embedded.valid)
        return BackboneOutput(
            Features(cognition, embedded.perception, embedded.proprio, layers),
            hidden,
            embedded.instruction,
            None if place.written is None else output.hidden_states[-1][:, place.written],
            cast("tuple[torch.Tensor, torch.Tensor] | None", last_keys_values),
        )

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        rows, suffix = answered(inputs, replies, self.tokenizer.eos_token_id)
        ids = rows.clamp(min=0)
        output = self.vlm(
            input_ids=ids,
            pixel_values=self._pixels(inputs.images),
            attention_mask=(rows != NO_TOKEN).long(),
            token_type_ids=suffix.long(),
        )
        labels = ids.masked_fill(~suffix, -100)
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        written = torch.full((len(inputs.input_ids), max_new_tokens), NO_TOKEN, device=inputs.images.device)
        lengths = inputs.attention_mask.sum(-1).tolist()
        for row, n in enumerate(lengths):  # one by one: a batch would need padding on the left
            ids = inputs.input_ids[row : row + 1, :n]
            out = self.network.generate(
                input_ids=ids, pixel_values=self._pixels(inputs.images[row : row + 1]),
                attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            )  # fmt: skip
            reply = out[0, n:]
            reply = reply[: int((reply != self.tokenizer.eos_token_id).cumprod(0).sum())]
            written[row, : len(reply)] = reply
        return written

    def _between(self, bias: torch.Tensor, embedded: Embedded) -> torch.Tensor:
        """[B, heads, queries, keys]: changes what one token reads of another, where not all read the same."""
        return bias

    def _split(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, S, Dk] -> [B, key heads, S, size of a head]."""
        return flat.reshape(*flat.shape[:2], -1, self.head_size).transpose(1, 2).to(dtype)

    def _prompt(self, text: str) -> list[int]:
        images = [self.image_token] * (self.image_tokens * self.num_views)
        newline = self.tokenize_text("\n") or [self.tokenizer.eos_token_id]
        return [*images, self.tokenizer.bos_token_id, *self.tokenize_text(text), *newline]

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, V, H, W, 3] -> [B * V, 3, S, S] in [-1, 1], S the vision tower's size."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.network.dtype) / 127.5 - 1
        if x.shape[-1] == self.image_size:
            return x
        return F.interpolate(x.float(), (self.image_size,) * 2, mode="bilinear", antialias=True).to(x.dtype)
