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
        bias, cache = score_bias(self.visible(embedded, place), x.dtype), None
        if context.past is not None:
            past = context.past.bias.clamp(min=torch.finfo(x.dtype).min).to(x.dtype)[:, :, None]
            bias = bias.expand(-1, self.heads, x.shape[1], -1)
            bias = torch.cat([past.expand(-1, -1, x.shape[1], -1), bias], -1)
            cache = _Cache(self._split(context.past.keys), self._split(context.past.values))
        elif context.keep or self.reads.caches:
            cache = _Cache()
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
        last_keys_values = None
        if context.keep and cache is not None:
            places = embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1, device=x.device)
            keys, values = (flat[rows[:, None], :, front + places].transpose(1, 2) for flat in cache.joined())
            last_keys_values = keys, values

        def keys_values(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            assert cache is not None
            keys, values = (t[:, :, place.observation].transpose(1, 2).flatten(2) for t in cache.own[layer])
            return keys, values

        cognition = hidden[-1][rows, embedded.last].float()
        layers = self.layer_states(hidden, keys_values, embedded.valid)
        return BackboneOutput(
            Features(cognition, embedded.perception, embedded.proprio, layers),
            hidden,
            embedded.instruction,
            None if place.written is None else output.hidden_states[-1][:, place.written],
            last_keys_values,
        )

    def extend(
        self, tokens: torch.Tensor, past: LayerStates, reads: torch.Tensor, keep: bool = False, gap: int = 0
    ) -> tuple[torch.Tensor, LayerStates]:
        """As `Backbone.extend`; `gap`: positions that stay free behind the observation."""
        x, cache = tokens.to(self.dtype), _Cache(self._split(past.keys), self._split(past.values))
        b, m = x.shape[:2]
        visible = torch.cat([past.valid[:, None].expand(-1, m, -1), reads.expand(b, m, m)], -1)
        before = past.valid.sum(-1)
        last = self.positions(int(before.max()))[..., before - 1]
        output = self.decoder(
            inputs_embeds=x,
            attention_mask=score_bias(visible, x.dtype),
            position_ids=last[..., None] + 1 + gap + torch.arange(m, device=x.device),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, past.followed(*cache.joined()) if keep else past

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
                attention_mask=score_bias(valid[:, None], self.dtype),
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
            attention_mask=score_bias(visible, x.dtype),
            position_ids=own[..., None, :].expand(*own.shape[:-1], len(x), n),
            use_cache=bool(cached),
            **cached,
            **self.beside(embedded, place),
        )

    def _split(self, flat: torch.Tensor) -> torch.Tensor:
        """[B, layers, S, Dk] -> [layers, B, key heads, S, size of a head]."""
        by_head = flat.reshape(*flat.shape[:-1], -1, self.head_size)
        return by_head.permute(1, 0, 3, 2, 4).to(self.dtype)


class _Cache:
    """What transformers' attention asks a cache for: a layer's keys and values behind those of earlier tokens.

    A layer that runs again, for the backward pass, finds the same ones before it.

    Args:
        keys, values: of earlier tokens, [layers, B, key heads, S, size of a head]; None for no earlier ones.
    """

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        self._earlier = None if keys is None or values is None else (keys, values)
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer attends to."""
        self.own[layer] = keys, values
        if self._earlier is None:
            return keys, values
        before, said = self._earlier
        return torch.cat([before[layer], keys], 2), torch.cat([said[layer], values], 2)

    def get_seq_length(self, _layer: int = 0) -> int:
        return 0 if self._earlier is None else self._earlier[0].shape[3]

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers' own keys and values, each [B, layers, N, Dk]."""
        keys, values = zip(*(self.own[layer] for layer in sorted(self.own)), strict=True)
        return _joined(keys), _joined(values)


def _joined(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([layer.transpose(1, 2).flatten(2) for layer in layers], 1)


def earlier(valid: torch.Tensor) -> torch.Tensor:
    """bool [N, N], for valid bool [B, N]: each token (row), and those before it."""
    n = valid.shape[1]
    return torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()


def score_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention's scores, [B, 1, rows, columns]: each row reads the `visible` columns alone.

    Args:
        visible: bool [B, rows, columns].
    """
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
