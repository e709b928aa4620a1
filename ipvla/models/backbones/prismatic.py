"""The `prismatic` backbone: OpenVLA's model (arXiv 2406.09246), rebuilt so that published weights load exactly.

    [BOS, patches of every view, (proprioception), the rest of the prompt, (action places, </s>)]

DINOv2 and SigLIP side by side, or SigLIP alone, a projector, and transformers' Llama. The prompt ends in the token
`▁`, whose last state is the cognition. OpenVLA reads causally. OpenVLA-OFT (arXiv 2502.19645) appends places for a
whole chunk of actions, whose embeddings are 0, and every token reads every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.openvla_files import SPACE, OpenVLAFiles, require_same
from ipvla.models.backbones.prismatic_vision import PrismaticVision, Projector
from ipvla.models.backbones.protocol import (
    Backbone,
    BackboneConfig,
    BackboneOutput,
    Context,
    Embedded,
    placed,
    require_prompts,
)
from ipvla.models.features import Continuation, Features
from ipvla.types import NO_TOKEN, ModelInputs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BOS, _EOS, _NEWLINE = 1, 2, 13
_NO_WORDS = (
    "model.backbone.action_places is set: such a model (OpenVLA-OFT) answers in actions and writes no words; "
    "choose another memory, and no loss on words"
)


@BackboneConfig.register_subclass("prismatic")
@dataclass(frozen=True)
class PrismaticConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        pretrained: a directory in OpenVLA's Hugging Face layout, or what `ipvla import` has made of one.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        prompt: with `{instruction}` in it.
        ends_in_space: puts `▁` behind the prompt, which OpenVLA reads before an action; ECoT's do without.
        max_prompt_tokens: longest prompt in tokens, without pictures.
        action_places: OpenVLA-OFT's, numbers in a chunk of actions; 0 for OpenVLA, which writes them one by one.
        proprio: one more token, of the proprioception (OpenVLA-OFT).
        film: the prompt modulates the vision towers (OpenVLA-OFT+).
    """

    layers_write_cache: ClassVar[bool] = True

    pretrained: Path | None = None
    dtype: str = "bfloat16"
    prompt: str = "In: What action should the robot take to {instruction}?\nOut:"
    ends_in_space: bool = True
    max_prompt_tokens: int = 96
    action_places: int = 0
    proprio: bool = False
    film: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(_DTYPES)}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"backbone.prompt {self.prompt!r} does not contain {{instruction}}")
        for name, least in (("max_prompt_tokens", 2), ("action_places", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"backbone.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def files(self) -> OpenVLAFiles:
        """ValueError if there are none."""
        if self.pretrained is None:
            raise ValueError(
                "backbone.pretrained is not given; name a directory in OpenVLA's Hugging Face layout, or the "
                "`backbone` directory of a policy that `ipvla import` has written"
            )
        return OpenVLAFiles.read(self.pretrained)

    def beside(self, policy: Path) -> PrismaticConfig:
        own = policy / "backbone"
        return replace(self, pretrained=own) if own.is_dir() else self

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        tokenizer = self.files.tokenizer()
        lengths = {text: len(self.prompt_ids(tokenizer, text)) for text in instructions}
        require_prompts(lengths, self.max_prompt_tokens)

    def prompt_ids(self, tokenizer: Any, instruction: str) -> list[int]:
        """The prompt of an instruction."""
        return self.ending(
            cast(list[int], tokenizer.encode(self.prompt.format(instruction=instruction.lower())).ids)
        )

    def ending(self, ids: list[int]) -> list[int]:
        """The ids with `▁` at their end, where this checkpoint has it."""
        return [*ids, SPACE] if self.ends_in_space and ids[-1] != SPACE else ids

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> PrismaticBackbone:
        files = self.files
        if image_size != files.image_size:
            raise ValueError(
                f"data.image_size is {image_size}, and {files.directory} takes pictures of {files.image_size} "
                f"pixels; set it to {files.image_size}"
            )
        with torch.device("meta"):
            vlm = PrismaticVLM(files, proprio_dim if self.proprio else 0, self.film).to(_DTYPES[self.dtype])
        if files.has_weights:
            if self.proprio or self.film:
                raise ValueError(
                    f"backbone.proprio and backbone.film are OpenVLA-OFT's, whose weights lie beside the model; "
                    f"run `ipvla import --source {files.directory}`, and give --start_from its policy"
                )
            vlm.take(files.weights(), str(files.directory))
        vlm.settle()
        cls = ParallelPrismatic if self.action_places else PrismaticBackbone
        return cls(vlm, self, files, num_views)


class PrismaticVLM(nn.Module):
    """The network under the published names: `vision_backbone`, `projector`, `language_model`; OFT's
    `proprio_projector`."""

    def __init__(self, files: OpenVLAFiles, proprio: int, film: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds

        super().__init__()
        text = LlamaConfig(**files.text, attn_implementation="sdpa")
        width = text.hidden_size
        self.text_config = text
        self.vision_backbone = PrismaticVision(files.towers, files.image_size, width if film else 0)
        self.projector = Projector(self.vision_backbone.width, width, fused=len(files.towers) > 1)
        self.language_model = LlamaForCausalLM(text)
        self.proprio_projector = (
            nn.ModuleDict({"fc1": nn.Linear(proprio, width), "fc2": nn.Linear(width, width)}) if proprio else None
        )

    def take(self, weights: dict[str, torch.Tensor], where: str) -> None:
        """Takes these tensors for its own, without copies where the dtype is the same.

        Raises:
            ValueError: one is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        require_same(own, weights, where)
        cast_to = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self.load_state_dict(cast_to, assign=True)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def settle(self) -> None:
        """Computes what no file holds: the frequencies of the rotary position embedding."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.language_model.model.rotary_emb = LlamaRotaryEmbedding(self.text_config)


class PrismaticBackbone(Backbone):
    """See the module's docstring."""

    layer_pattern = r"language_model\.model\.layers\.({layers})\."
    attention: ClassVar[Literal["prefix", "causal"]] = "causal"

    def __init__(self, vlm: PrismaticVLM, config: PrismaticConfig, files: OpenVLAFiles, num_views: int) -> None:
        super().__init__()
        self.vlm = vlm
        self.config = config
        self.files = files
        self.description = files.description()  # read now: the directory may be gone when it is saved again
        self.tokenizer = files.tokenizer()
        text = vlm.text_config
        self.width = text.hidden_size
        self.perception_size = vlm.vision_backbone.width
        self.num_layers = text.num_hidden_layers
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        self.head_size = text.head_dim
        self.cache_size = text.num_key_value_heads * text.head_dim
        self.max_prompt_tokens = config.max_prompt_tokens
        self.num_views = num_views

    def save_description(self, directory: Path) -> None:
        own = directory / "backbone"
        own.mkdir()
        for name, content in self.description.items():
            (own / name).write_bytes(content)

    def tokenize(self, instruction: str) -> list[int]:
        return self.config.prompt_ids(self.tokenizer, instruction)

    def language_layers(self) -> list[nn.Module]:
        return list(self.network.language_model.model.layers)

    def tokenize_text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode([i for i in ids if i != NO_TOKEN], skip_special_tokens=True)
        return text.strip()

    def question(self, text: str) -> list[int]:
        return [_BOS, *self.tokenize_text(text), _NEWLINE]

    def embed(self, inputs: ModelInputs) -> Embedded:
        network, lengths = self.network, inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, prompt = inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest]
        reply = self._reply(inputs.reply, ids)
        ids, valid = _with_reply(ids, lengths, reply)
        prompt = F.pad(prompt, (0, ids.shape[1] - longest))
        words = network.language_model.get_input_embeddings()(ids.clamp(min=0))
        blank = self._blank(valid, prompt)
        words = words.masked_fill(blank[..., None], 0)
        said = (valid & ~blank)[..., None].to(words.dtype)
        average = (words * said).sum(1) / said.sum(1) if self.config.film else None
        perception = network.vision_backbone(inputs.images, average)
        seen = [network.projector(perception)]
        if (projector := network.proprio_projector) is not None:
            state = inputs.proprio.to(words.dtype)
            seen.append(projector["fc2"](F.gelu(projector["fc1"](state)))[:, None])
        shown = torch.cat(seen, 1)
        n = shown.shape[1]
        instruction = prompt.clone()
        instruction[:, 0] = False
        instruction[torch.arange(len(lengths), device=lengths.device), lengths - 1] = False
        return Embedded(
            tokens=torch.cat([words[:, :1], shown, words[:, 1:]], 1),
            valid=F.pad(valid, (n, 0), value=True),
            last=lengths - 1 + n,
            perception=perception.float(),
            proprio=inputs.proprio,
            instruction=F.pad(instruction, (n, 0), value=False),
        )

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        writes = self.reads.continuation and not (self.training and torch.is_grad_enabled())
        return self._pass(embedded, context or Context(), writes)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] -> float32 [..., vocabulary]."""
        head = self.network.language_model.lm_head
        out: torch.Tensor = head(states.to(self._dtype)).float()
        return out

    @torch.no_grad()
    def speak(
        self, state: torch.Tensor, going_on: Continuation, tokens: int, recalled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The likeliest words behind the prompts, int64 [B, tokens], one by one with cached keys and values.

        Stops where every row has ended; what stands behind `</s>` means nothing then.

        Args:
            state: [B, D], the last hidden state of the prompt's last token.
            recalled: float32 [B, D], added to every state before it becomes a word: what a memory knows.
        """
        model, cache = self.network.language_model.model, self._cache(going_on)
        bias, ids = going_on.bias, list[torch.Tensor]()
        going = torch.ones(len(state), dtype=torch.bool, device=state.device)
        for i in range(tokens):
            ids.append(self.logits(state if recalled is None else state.float() + recalled).argmax(-1))
            going = going & (ids[-1] != _EOS)
            if i + 1 == tokens or not going.any():
                break
            bias = F.pad(bias, (0, 1))
            state = model(
                inputs_embeds=model.embed_tokens(ids[-1])[:, None],
                attention_mask=bias[:, :, None],
                position_ids=(going_on.position + i)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
        ids += [torch.full_like(ids[-1], _EOS)] * (tokens - len(ids))
        return torch.stack(ids, 1)

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        ends = F.pad(replies, (0, 1), value=NO_TOKEN)
        ends = ends.scatter(1, (replies != NO_TOKEN).sum(-1, keepdim=True), _EOS)
        output = self._pass(self.embed(replace(inputs, reply=ends)), Context(), False)
        places = self._places(inputs, output.hidden_states[-1], ends.shape[1])
        logits = self.logits(output.hidden_states[-1].gather(1, places[..., None].expand(-1, -1, self.width)))
        return F.cross_entropy(logits.flatten(0, 1), ends.flatten(), ignore_index=NO_TOKEN)

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        embedded = self.embed(replace(inputs, reply=None))
        output = self._pass(embedded, Context(), True)
        assert output.features.continuation is not None
        rows = torch.arange(len(embedded.last), device=embedded.last.device)
        state = output.hidden_states[-1][rows, embedded.last]
        ids = self.speak(state, output.features.continuation, max_new_tokens)
        return ids.masked_fill((ids == _EOS).cumsum(1) > 0, NO_TOKEN)

    @property
    def _dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.network.language_model.lm_head.weight.dtype)

    def _reply(self, taught: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, La], what stands behind the prompts."""
        return ids.new_zeros(len(ids), 0) if taught is None else taught

    def _blank(self, valid: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """bool [B, L], True where the embedding is 0."""
        return torch.zeros_like(valid)

    def _places(self, inputs: ModelInputs, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """int64 [B, count], of the states that say each word of a reply."""
        shown = hidden.shape[1] - int(inputs.attention_mask.sum(-1).max()) - count
        last = inputs.attention_mask.sum(-1, keepdim=True) - 1 + shown
        return last + torch.arange(count, device=last.device)

    def _pass(self, embedded: Embedded, context: Context, writes: bool) -> BackboneOutput:
        """`encode`; with `writes`, what goes on behind the prompts too."""
        from transformers import DynamicCache

        place, n = placed(embedded, context, self.attention), embedded.tokens.shape[1]
        x, front = place.tokens, place.observation.start
        least = torch.finfo(x.dtype).min
        rows = torch.arange(len(x), device=x.device)
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        if context.tokens is not None:
            m = context.tokens.shape[1]
            end = embedded.last + 1 if self.attention == "causal" else embedded.valid.sum(-1)
            behind = front + end[:, None] + torch.arange(m, device=x.device)
            positions = torch.cat([positions[:, : front + n], behind], 1)
        # for each key one number, the same for all queries; then what lies ahead of a query is hidden from it
        own = torch.zeros(place.valid.shape, dtype=x.dtype, device=x.device).masked_fill(~place.valid, least)
        own = own[:, None]
        earlier = 0
        if context.past is not None:
            past = context.past.bias.clamp(min=least).to(x.dtype)
            own, earlier = torch.cat([past, own.expand(-1, self.heads, -1)], -1), past.shape[-1]
        bias = own[:, :, None].expand(-1, -1, x.shape[1], -1)
        if self.attention == "causal":
            ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(F.pad(ahead, (earlier, 0)), least)
            if place.written is not None:  # what is remembered has not seen the reply, which is taught in training
                reply = torch.arange(n, device=x.device) > embedded.last[:, None]
                reply = F.pad(reply, (earlier + front, x.shape[1] - front - n))[:, None, None]
                written = F.pad(ahead.new_ones(place.written.stop - place.written.start), (place.written.start, 0))
                bias = bias.masked_fill(reply & written[:, None], least)
        caches = context.past is not None or context.keep or self.reads.keys_values or writes
        cache = DynamicCache() if caches else None
        if context.past is not None and cache is not None:
            for layer in range(self.num_layers):
                pair = (self._split(c[:, layer], x.dtype) for c in (context.past.keys, context.past.values))
                cache.update(*pair, layer)
        output = self.network.language_model.model(
            inputs_embeds=x,
            attention_mask=bias,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        hidden = tuple(h[:, place.observation] for h in output.hidden_states)
        layers = [] if cache is None else list(cache.layers)
        start = earlier + front
        last_keys_values = None
        if context.keep:
            places = start + embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=x.device)
            last_keys_values = tuple(
                torch.stack([t.transpose(1, 2)[rows[:, None], places].flatten(2) for t in of_layers], 1)
                for of_layers in ([c.keys for c in layers], [c.values for c in layers])
            )
        going_on = None
        if writes:
            keys, values = (tuple(t[:, :, : start + n] for t in of_layers) for of_layers in
                            ([c.keys for c in layers], [c.values for c in layers]))  # fmt: skip
            going_on = Continuation(keys, values, own[..., : start + n], front + embedded.valid.sum(-1))

        def keys_values(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            pair = (layers[layer].keys, layers[layer].values)
            keys, values = (t[:, :, start : start + n].transpose(1, 2).flatten(2) for t in pair)
            return keys, values

        return BackboneOutput(
            Features(
                hidden[-1][rows, embedded.last].float(),
                embedded.perception,
                embedded.proprio,
                self.layer_states(hidden, keys_values, embedded.valid),
                going_on,
            ),
            hidden,
            embedded.instruction,
            None if place.written is None else output.hidden_states[-1][:, place.written],
            cast("tuple[torch.Tensor, torch.Tensor] | None", last_keys_values),
        )

    def _cache(self, going_on: Continuation) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(going_on.keys, going_on.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    def _split(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, S, Dk] -> [B, key heads, S, size of a head]."""
        return flat.reshape(*flat.shape[:2], -1, self.head_size).transpose(1, 2).to(dtype)


class ParallelPrismatic(PrismaticBackbone):
    """OpenVLA-OFT: places for a whole chunk behind the prompt, and attention in both directions."""

    attention: ClassVar[Literal["prefix", "causal"]] = "prefix"

    def _reply(self, taught: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        places = torch.full((len(ids), self.config.action_places), _BOS, device=ids.device)
        return F.pad(places, (0, 1), value=_EOS)

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        raise ValueError(_NO_WORDS)

    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        raise ValueError(_NO_WORDS)

    def _blank(self, valid: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        behind = valid & ~prompt
        return behind & F.pad(behind[:, 1:], (0, 1))  # all but the last of each row, its `</s>`


def _with_reply(
    ids: torch.Tensor, lengths: torch.Tensor, reply: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts int64 [B, L] of these lengths with replies [B, La] behind: ids, and bool, where there are some."""
    length, more = ids.shape[1], reply.shape[1]
    place = torch.arange(length + more, device=ids.device).expand(len(ids), -1)
    end = lengths[:, None]
    source = torch.where(place < end, place, length + place - end).clamp(max=length + more - 1)
    joined = torch.cat([ids, reply], 1).gather(1, source)
    valid = (place < end + more) & (joined != NO_TOKEN)
    return joined.masked_fill(~valid, 0), valid
