"""What transformers' vision-language models share: pictures' features among the tokens of a decoder.

A file for each family says how its prompt is framed, how it sees, and where its tokens stand (`paligemma`,
`qwen_vl`, `smolvlm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
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
    Placed,
    answered,
    placed,
    require_prompts,
)
from ipvla.models.features import Features
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
class DecoderConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        model_types: of the configs in `config.json` that the backbone runs.
        pretrained: a hub name, or a directory written by `save_pretrained` (model, tokenizer, image processor).
        cache_dir: directory of downloads; None follows HF_HOME.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        prompt: with `{instruction}` in it.
        max_prompt_tokens: longest prompt in tokens, image tokens included.
    """

    layers_write_cache: ClassVar[bool] = True
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


def words_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, nothing added."""
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False))


class DecoderBackbone(Backbone):
    """Prompt: `frame.before`, the words, `frame.behind`; cognition is the last token's last hidden state.

    Attributes:
        first_position: of an observation's first token.
    """

    layer_pattern = r"language_model\.layers\.({layers})\."
    first_position: ClassVar[int] = 0

    def __init__(self, vlm: Any, tokenizer: Any, frame: Frame, config: DecoderConfig) -> None:
        super().__init__()
        self.vlm, self.tokenizer, self.frame, self.config = vlm, tokenizer, frame, config
        self.max_prompt_tokens = config.max_prompt_tokens
        text = vlm.config.get_text_config()
        self.width = self.perception_size = text.hidden_size
        self.num_layers = text.num_hidden_layers
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        self.head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache_size = text.num_key_value_heads * self.head_size
        self.image_token = vlm.config.image_token_id

    @property
    def decoder(self) -> Any:
        """The language layers as one module, called with `inputs_embeds`."""
        return self.network.model.language_model

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """uint8 [B, V, H, W, 3] -> the image tokens [B, Np, D], and what goes into `Embedded.extra`."""
        raise NotImplementedError

    def positions(self, tokens: int) -> torch.Tensor:
        """Of the first so many tokens of any prompt, int64 [N], or [axes, N] if a position has several."""
        return torch.arange(tokens, device=self.device) + self.first_position

    def beside(self, embedded: Embedded, place: Placed) -> dict[str, Any]:
        """Further arguments of the decoder."""
        return {}

    def visible(self, embedded: Embedded, place: Placed) -> torch.Tensor:
        """bool [B, N' or 1, N']: which of the placed tokens (columns) each one reads."""
        return self._visible(place.valid)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.network.device)

    def tokenize(self, instruction: str) -> list[int]:
        return self.frame.around(self.tokenize_text(self.config.worded(instruction)))

    def tokenize_text(self, text: str) -> list[int]:
        return words_of(self.tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens = [i for i in ids if i != NO_TOKEN]
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def question(self, text: str) -> list[int]:
        return self.frame.around(self.tokenize_text(text))

    def language_layers(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    def embed(self, inputs: ModelInputs) -> Embedded:
        lengths = inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        is_image = (ids == self.image_token) & valid
        perception, extra = self.see(inputs.images)
        # the image token may lie outside the vocabulary
        tokens = self.embed_ids(ids.masked_fill(is_image, 0))
        tokens = tokens.masked_scatter(is_image[..., None], perception.to(tokens.dtype))
        place = torch.arange(longest, device=ids.device)
        inside = (place >= len(self.frame.before)) & (place < (lengths - len(self.frame.behind))[:, None])
        return Embedded(tokens, valid, lengths - 1, perception.float(), inputs.proprio, inside, extra)

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [...] as [..., D], before the first language layer."""
        return cast(torch.Tensor, self.network.get_input_embeddings()(ids))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] -> logits [..., vocabulary]."""
        return cast(torch.Tensor, self.network.lm_head(states))

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        from transformers import DynamicCache

        context = context or Context()
        place, n = placed(embedded, context, self.attention), embedded.tokens.shape[1]
        x, front = place.tokens, place.observation.start
        rows = torch.arange(len(x), device=x.device)
        own = self.positions(n)
        positions = [own[..., None, :].expand(*own.shape[:-1], len(x), n) + front]
        if context.tokens is not None:
            m = torch.arange(context.tokens.shape[1], device=x.device)
            written = (own[..., embedded.last] + front + 1)[..., None] + m
            positions.append(written)
            if front:
                positions.insert(0, (m + self.first_position).expand_as(written))
        bias = self._bias(self.visible(embedded, place), x.dtype)
        cache = DynamicCache() if context.past is not None or context.keep or self.reads.keys_values else None
        if context.past is not None and cache is not None:
            past = context.past.bias.clamp(min=torch.finfo(x.dtype).min).to(x.dtype)[:, :, None]
            bias = bias.expand(-1, self.heads, x.shape[1], -1)
            bias = torch.cat([past.expand(-1, -1, x.shape[1], -1), bias], -1)
            for layer in range(self.num_layers):
                pair = (self._split(c[:, layer], x.dtype) for c in (context.past.keys, context.past.values))
                cache.update(*pair, layer)
        output = self.decoder(
            inputs_embeds=x,
            attention_mask=bias,
            position_ids=torch.cat(positions, -1),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
            **self.beside(embedded, place),
        )
        hidden = tuple(h[:, place.observation] for h in output.hidden_states)
        start = bias.shape[-1] - x.shape[1] + front  # of the observation among the cached tokens
        last_keys_values = None
        if context.keep and cache is not None:
            places = start + embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=x.device)
            last_keys_values = tuple(
                torch.stack([t.transpose(1, 2)[rows[:, None], places].flatten(2) for t in of_layers], 1)
                for of_layers in ([c.keys for c in cache.layers], [c.values for c in cache.layers])
            )

        def keys_values(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            assert cache is not None
            pair = (cache.layers[layer].keys, cache.layers[layer].values)
            keys, values = (t[:, :, start : start + n].transpose(1, 2).flatten(2) for t in pair)
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
        embedded = self.embed(inputs.with_prompt(rows))
        states = self._read(embedded, self._visible(embedded.valid, suffix)).last_hidden_state
        asked = suffix[:, 1:]
        return F.cross_entropy(self.logits(states[:, :-1][asked]).float(), rows[:, 1:][asked])

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        from transformers import DynamicCache

        embedded, cache = self.embed(inputs), DynamicCache()
        rows, visible = torch.arange(len(embedded.last), device=embedded.last.device), embedded.valid
        states = self._read(embedded, self._visible(visible), past_key_values=cache).last_hidden_state
        state, next_one = states[rows, embedded.last], self.positions(visible.shape[1])[..., embedded.last] + 1
        going = torch.ones_like(rows, dtype=torch.bool)
        written = torch.full((len(rows), max_new_tokens), NO_TOKEN, device=rows.device)
        for i in range(max_new_tokens):
            token = self.logits(state).argmax(-1)
            going = going & (token != self.tokenizer.eos_token_id)
            if not going.any():
                break
            written[:, i] = token.masked_fill(~going, NO_TOKEN)
            visible = F.pad(visible, (0, 1), value=True)
            x = self.embed_ids(token)[:, None]
            output = self.decoder(
                inputs_embeds=x,
                attention_mask=self._bias(visible[:, None], x.dtype),
                position_ids=(next_one + i)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            state = output.last_hidden_state[:, 0]
        return written

    def _read(self, embedded: Embedded, visible: torch.Tensor, **cached: Any) -> Any:
        """The decoder's output for an observation without any context."""
        x, n = embedded.tokens, embedded.tokens.shape[1]
        own = self.positions(n)
        return self.decoder(
            inputs_embeds=x,
            attention_mask=self._bias(visible, x.dtype),
            position_ids=own[..., None, :].expand(*own.shape[:-1], len(x), n),
            use_cache=bool(cached),
            **cached,
            **self.beside(embedded, Placed(x, embedded.valid, slice(0, n), None)),
        )

    def _visible(self, valid: torch.Tensor, suffix: torch.Tensor | None = None) -> torch.Tensor:
        """bool [B, N or 1, N]: which tokens (columns) each one reads.

        Those of `suffix`, bool [B, N], are read by later ones alone.
        """
        n = valid.shape[1]
        if self.attention == "prefix" and suffix is None:
            return valid[:, None]
        earlier = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
        if self.attention == "causal" or suffix is None:
            return valid[:, None] & earlier
        return valid[:, None] & (earlier | ~suffix[:, None])

    @staticmethod
    def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the attention's scores, [B, 1, N or 1, N]."""
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)[:, None]

    def _split(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, S, Dk] -> [B, key heads, S, size of a head]."""
        return flat.reshape(*flat.shape[:2], -1, self.head_size).transpose(1, 2).to(dtype)


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
