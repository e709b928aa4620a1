"""A decoder of transformers behind an observation's tokens: what all backbones on its language models share.

A family says how its prompt is framed, how it sees, and where its tokens stand: `hugging_face` for models whose
prompts have tokens for pictures (`paligemma`, `qwen_vl`, `smolvlm`, `pi0`, `smolvla`), `prismatic` for OpenVLA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.protocol import Backbone, BackboneOutput, Context, Embedded, Placed, answered, placed
from ipvla.models.features import Features, LayerStates
from ipvla.types import NO_TOKEN, ModelInputs


class DecoderBackbone(Backbone):
    """The cognition is the last hidden state of the prompt's last token.

    Attributes:
        decoder: the language layers as one module, called with `inputs_embeds`.
        words, speaker: the embedding of token ids, and the last layer, from states to logits.
        end: the token that ends a reply.
        first_position: of an observation's first token.
    """

    first_position: ClassVar[int] = 0
    end: int

    def __init__(self, vlm: Any, text: Any, max_prompt_tokens: int) -> None:
        """`text`: transformers' config of the language model."""
        super().__init__()
        self.vlm = vlm
        self.max_prompt_tokens = max_prompt_tokens
        self.width = text.hidden_size
        self.num_layers = text.num_hidden_layers
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        self.key_heads = text.num_key_value_heads
        self.head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache_size = self.key_heads * self.head_size

    @property
    def decoder(self) -> Any:
        raise NotImplementedError

    @property
    def words(self) -> nn.Module:
        raise NotImplementedError

    @property
    def speaker(self) -> nn.Module:
        raise NotImplementedError

    def positions(self, tokens: int) -> torch.Tensor:
        """Of the first so many tokens of any observation, int64 [N], or [axes, N] if a position has several."""
        return torch.arange(tokens, device=self.device) + self.first_position

    def beside(self, embedded: Embedded, place: Placed) -> dict[str, Any]:
        """Further arguments of the decoder."""
        return {}

    def visible(self, embedded: Embedded, place: Placed) -> torch.Tensor:
        """bool [B, N' or 1, N']: which of the placed tokens (columns) each of them (rows) reads."""
        return place.valid[:, None] if self.attention == "prefix" else place.valid[:, None] & earlier(place.valid)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.decoder.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        dtype: torch.dtype = next(self.decoder.parameters()).dtype
        return dtype

    def language_layers(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.words(ids))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.speaker(states.to(self.dtype))).float()

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
            last = own[..., embedded.valid.sum(-1) - 1]
            written = (last + front + 1)[..., None] + m
            positions.append(written)
            if front:
                positions.insert(0, (m + self.first_position).expand_as(written))
        bias = _bias(self.visible(embedded, place), x.dtype)
        cache = DynamicCache() if context.past is not None or context.keep or self.reads.caches else None
        if context.past is not None and cache is not None:
            past = context.past.bias.clamp(min=torch.finfo(x.dtype).min).to(x.dtype)[:, :, None]
            bias = bias.expand(-1, self.heads, x.shape[1], -1)
            bias = torch.cat([past.expand(-1, -1, x.shape[1], -1), bias], -1)
            for layer in range(self.num_layers):
                pair = (self._split(c[:, layer]) for c in (context.past.keys, context.past.values))
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

    def extend(
        self, tokens: torch.Tensor, past: LayerStates, reads: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, LayerStates]:
        from transformers import DynamicCache

        x, cache = tokens.to(self.dtype), DynamicCache()
        b, m = x.shape[:2]
        for layer, pair in enumerate(zip(past.keys.unbind(1), past.values.unbind(1), strict=True)):
            cache.update(*(self._split(each) for each in pair), layer)
        visible = torch.cat([past.valid[:, None].expand(-1, m, -1), reads.expand(b, m, m)], -1)
        before = past.valid.sum(-1)
        last = self.positions(int(before.max()))[..., before - 1]
        output = self.decoder(
            inputs_embeds=x,
            attention_mask=_bias(visible, x.dtype),
            position_ids=last[..., None] + 1 + torch.arange(m, device=x.device),
            past_key_values=cache,
            use_cache=True,
        )
        if keep:
            keys, values = ([getattr(c, name)[:, :, -m:] for c in cache.layers] for name in ("keys", "values"))
            past = past.followed(joined_heads(keys), joined_heads(values))
        return output.last_hidden_state, past

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        rows, suffix = answered(inputs, replies, self.end)
        embedded = self.embed(inputs.with_prompt(rows))
        column = torch.arange(rows.shape[1], device=rows.device)
        pictures = embedded.tokens.shape[1] - rows.shape[1]  # that stand behind a prompt's first token
        column = torch.where(column > 0, column + pictures, column)
        written = torch.zeros_like(embedded.valid)
        written[:, column] = suffix
        states = self._read(embedded, written).last_hidden_state
        said, asked = states[:, column[:-1]], suffix[:, 1:]
        return F.cross_entropy(self.logits(said[asked]), rows[:, 1:][asked])

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        from transformers import DynamicCache

        embedded, cache = self.embed(inputs), DynamicCache()
        rows, valid = torch.arange(len(embedded.last), device=embedded.last.device), embedded.valid
        states = self._read(embedded, torch.zeros_like(valid), past_key_values=cache).last_hidden_state
        state, behind = states[rows, embedded.last], self.positions(valid.shape[1])[..., embedded.last] + 1
        going = torch.ones_like(rows, dtype=torch.bool)
        written = torch.full((len(rows), max_new_tokens), NO_TOKEN, device=rows.device)
        for i in range(max_new_tokens):
            token = self.logits(state).argmax(-1)
            going = going & (token != self.end)
            if not going.any():
                break
            written[:, i] = token.masked_fill(~going, NO_TOKEN)
            valid = F.pad(valid, (0, 1), value=True)
            output = self.decoder(
                inputs_embeds=self.embed_ids(token)[:, None],
                attention_mask=_bias(valid[:, None], self.dtype),
                position_ids=(behind + i)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            state = output.last_hidden_state[:, 0]
        return written

    def _read(self, embedded: Embedded, written: torch.Tensor, **cached: Any) -> Any:
        """The decoder's output without any context; tokens `written` bool [B, N] are read by later ones alone."""
        x, n = embedded.tokens, embedded.tokens.shape[1]
        place, own = Placed(x, embedded.valid, slice(0, n), None), self.positions(n)
        visible = self.visible(embedded, place) & (earlier(embedded.valid) | ~written[:, None])
        return self.decoder(
            inputs_embeds=x,
            attention_mask=_bias(visible, x.dtype),
            position_ids=own[..., None, :].expand(*own.shape[:-1], len(x), n),
            use_cache=bool(cached),
            **cached,
            **self.beside(embedded, place),
        )

    def _split(self, flat: torch.Tensor) -> torch.Tensor:
        """[B, S, Dk] -> [B, key heads, S, size of a head]."""
        return flat.reshape(*flat.shape[:2], -1, self.head_size).transpose(1, 2).to(self.dtype)


def joined_heads(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each layer [B, key heads, S, size of a head] -> [B, layers, S, Dk]."""
    return torch.stack([layer.transpose(1, 2).flatten(2) for layer in layers], 1)


def earlier(valid: torch.Tensor) -> torch.Tensor:
    """bool [N, N], for valid bool [B, N]: each token (row), and those before it."""
    n = valid.shape[1]
    return torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the attention's scores, [B, 1, rows, columns]."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
