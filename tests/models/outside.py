"""A backbone, a memory and two heads as somebody outside of the package would write them.

The backbone is causal, its pad id is its last one, and its vocabulary has a word at id 0, as Qwen's has "!" there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone, BackboneConfig, BackboneOutput, Context, Embedded
from ipvla.models.backbones.protocol import answered, padded, placed
from ipvla.models.features import Features, Reads
from ipvla.models.heads import Head, HeadConfig
from ipvla.models.heads.protocol import masked_mean
from ipvla.models.memory import MemoryConfig, MemoryModule
from ipvla.types import NO_TOKEN, Memory, ModelInputs

WORDS = [
    "!",
    "press",
    "the",
    "red",
    "blue",
    "button",
    "is",
    "a",
    "lit",
    "yes",
    "no",
    "plan",
    "subtask",
    "white",
    "gray",
    "1",
    ":",
    "<other>",
    "<act>",
    "<answer>",
    "<end>",
    "<pad>",
]
_ID = {word: i for i, word in enumerate(WORDS)}
_VISUAL = 4


@BackboneConfig.register_subclass("outside_words")
@dataclass(frozen=True)
class WordsConfig(BackboneConfig):
    """Two heads of half the width."""

    width: int = 16
    layers: int = 3
    max_prompt_tokens: int = 12

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> WordsBackbone:
        return WordsBackbone(self, proprio_dim, num_views)


class Layer(nn.Module):
    """A pre-norm transformer layer with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return self.k_proj(y), self.v_proj(y)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        keys, values = self.keys_values(x)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 1), torch.cat([past[1], values], 1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q_proj(self.norm(x)), keys, values))
        read = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
        x = x + self.o_proj(read.transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Network(nn.Module):
    def __init__(self, config: WordsConfig, proprio_dim: int, num_views: int) -> None:
        super().__init__()
        d = config.width
        self.words = nn.Embedding(len(WORDS), d)
        self.visual = nn.Linear(3 * num_views, d)
        self.deep = nn.Linear(3 * num_views, d)
        self.proprio = nn.Linear(proprio_dim, d)
        self.positions = nn.Linear(3, d)
        self.layers = nn.ModuleList(Layer(d) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)


class WordsBackbone(Backbone):
    """Tokens: four quarters of the pictures, the proprioception, the prompt. Positions have three axes."""

    layer_pattern = r"layers\.({layers})\."
    attention = "causal"

    def __init__(self, config: WordsConfig, proprio_dim: int, num_views: int) -> None:
        super().__init__()
        self.vlm = Network(config, proprio_dim, num_views)
        self.width = self.cache_size = config.width
        self.perception_size = 3 * num_views
        self.num_layers, self.heads, self.vocabulary = config.layers, 2, len(WORDS)
        self.max_prompt_tokens = config.max_prompt_tokens

    def tokenize_text(self, text: str) -> list[int]:
        return [_ID.get(word, _ID["<other>"]) for word in re.findall(r"\w+|[!:]", text.lower())]

    def tokenize(self, instruction: str) -> list[int]:
        return [*self.tokenize_text(instruction), _ID["<act>"]]

    def question(self, text: str) -> list[int]:
        return [*self.tokenize_text(text), _ID["<answer>"]]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i] for i in ids if i != NO_TOKEN and not WORDS[i].startswith("<")).upper()

    def language_layers(self) -> list[nn.Module]:
        return list(self.vlm.layers)

    def embed(self, inputs: ModelInputs) -> Embedded:
        ids, mask = inputs.input_ids, inputs.attention_mask
        longest = int(mask.sum(-1).max())
        ids, mask = ids[:, :longest].masked_fill(~mask[:, :longest], _ID["<pad>"]), mask[:, :longest]
        pictures = inputs.images.float().permute(0, 1, 4, 2, 3).flatten(1, 2) / 127.5 - 1
        seen = F.adaptive_avg_pool2d(pictures, 2).flatten(2).transpose(1, 2)
        body = self.vlm.proprio(inputs.proprio)[:, None]
        place = torch.arange(_VISUAL + 1 + longest, device=ids.device).float()
        across = torch.where(place < _VISUAL, place % 2, place)
        positions = torch.stack([place, across, place.flip(0) * 0], -1) / 10
        return Embedded(
            tokens=torch.cat([self.vlm.visual(seen), body, self.vlm.words(ids)], 1),
            valid=F.pad(mask, (_VISUAL + 1, 0), value=True),
            last=_VISUAL + mask.sum(-1),
            perception=seen,
            proprio=inputs.proprio,
            instruction=F.pad(mask & (ids != _ID["<act>"]), (_VISUAL + 1, 0), value=False),
            extra={"positions": positions.expand(len(ids), -1, -1), "deep": self.vlm.deep(seen)},
            padding={"positions": 0.0},
        )

    def encode(self, embedded: Embedded, context: Context | None = None) -> BackboneOutput:
        context = context or Context()
        place = placed(embedded, context, self.attention)
        n, start = place.tokens.shape[1], place.observation.start
        behind = n - place.observation.stop
        positions = F.pad(embedded.extra["positions"], (0, 0, start, behind))
        deep = F.pad(embedded.extra["deep"], (0, 0, start, n - start - _VISUAL))
        allowed = torch.ones(n, n, dtype=torch.bool, device=positions.device).tril() & place.valid[:, None]
        bias = torch.zeros(allowed.shape, device=positions.device).masked_fill(~allowed, -torch.inf)[:, None]
        bias = bias.expand(-1, self.heads, -1, -1)
        if context.past is not None:
            bias = torch.cat([context.past.bias[:, :, None].expand(-1, -1, n, -1), bias], -1)
        hidden = [place.tokens + self.vlm.positions(positions)]
        for i, layer in enumerate(self.vlm.layers):
            past = None if context.past is None else (context.past.keys[:, i], context.past.values[:, i])
            hidden.append(layer(hidden[-1] + deep if i == 1 else hidden[-1], bias, past))
        observed = tuple(h[:, place.observation] for h in hidden)
        entered = [h + deep[:, place.observation] if i == 1 else h for i, h in enumerate(observed)]
        pairs = [layer.keys_values(h) for layer, h in zip(self.vlm.layers, entered, strict=False)]
        rows, kept = torch.arange(len(embedded.last)), None
        if context.keep:
            places = embedded.last[:, None] - torch.arange(context.keep - 1, -1, -1)
            kept = tuple(torch.stack([pair[i][rows[:, None], places] for pair in pairs], 1) for i in (0, 1))
        cognition = self.vlm.norm(observed[-1][rows, embedded.last])
        layers = self.layer_states(observed, pairs.__getitem__, embedded.valid)
        return BackboneOutput(
            Features(cognition, embedded.perception, embedded.proprio, layers),
            observed,
            embedded.instruction,
            None if place.written is None else hidden[-1][:, place.written],
            kept,  # type: ignore[arg-type]
        )

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        rows, suffix = answered(inputs, replies, _ID["<end>"])
        text = self(inputs.with_prompt(rows)).hidden_states[-1][:, _VISUAL + 1 :]
        logits = self.vlm.norm(text) @ self.vlm.words.weight.T
        return F.cross_entropy(logits[:, :-1][suffix[:, 1:]], rows[:, 1:][suffix[:, 1:]])

    @torch.no_grad()
    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        lengths, written = inputs.attention_mask.sum(-1).tolist(), [list[int]() for _ in inputs.input_ids]
        ended = [False] * len(written)
        for _ in range(max_new_tokens):
            each = zip(inputs.input_ids.tolist(), lengths, written, strict=True)
            now = inputs.with_prompt(padded([[*ids[:n], *reply] for ids, n, reply in each]))
            tokens = (self(now).features.cognition @ self.vlm.words.weight.T).argmax(-1).tolist()
            ended = [over or token == _ID["<end>"] for over, token in zip(ended, tokens, strict=True)]
            for reply, token, over in zip(written, tokens, ended, strict=True):
                reply.extend([] if over else [token])
        return padded([reply + [NO_TOKEN] * (max_new_tokens - len(reply)) for reply in written])


@MemoryConfig.register_subclass("outside_last")
@dataclass(frozen=True)
class LastConfig(MemoryConfig):
    """Has no settings."""

    def build(self, backbone: Backbone) -> LastMemory:
        return LastMemory(backbone.width)


class LastMemory(MemoryModule):
    """The cognition of the step before, added to the present one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width, bias=False)

    def initial(self, batch: int) -> Memory:
        return {"last": self.out.weight.new_zeros(batch, self.out.in_features)}

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        cognition = features.cognition + self.out(memory["last"])
        return features.with_cognition(cognition), {"last": features.cognition}


@HeadConfig.register_subclass("outside_flow")
@dataclass(frozen=True)
class FlowConfig(HeadConfig):
    """steps: Euler steps from noise to a chunk."""

    steps: int = 4

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> FlowHead:
        return FlowHead(self, backbone.width + proprio, chunk, action_dim)


class FlowHead(Head):
    """x_t = t a + (1 - t) noise; the network predicts a - noise (Lipman et al., arXiv 2210.02747)."""

    def __init__(self, config: FlowConfig, condition: int, chunk: int, action_dim: int) -> None:
        super().__init__()
        self.steps, self.noise_shape = config.steps, (chunk, action_dim)
        self.loss_noise_shape = (chunk * action_dim + 1,)
        size = chunk * action_dim
        self.network = nn.Sequential(nn.Linear(size + 1 + condition, 64), nn.GELU(), nn.Linear(64, size))

    def velocity(self, x: torch.Tensor, t: torch.Tensor, features: Features) -> torch.Tensor:
        condition = torch.cat([x.flatten(1), t[:, None], features.cognition, features.proprio], -1)
        out: torch.Tensor = self.network(condition).view_as(x)
        return out

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert noise is not None
        start, t = noise[:, :-1].view_as(actions), torch.special.ndtr(noise[:, -1])
        x = torch.lerp(start, actions, t[:, None, None])
        return masked_mean((self.velocity(x, t, features) - (actions - start)).square(), weight)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        assert noise is not None
        x = noise
        for i in range(self.steps):
            x = x + self.velocity(x, torch.full_like(x[:, 0, 0], i / self.steps), features) / self.steps
        return x


@HeadConfig.register_subclass("outside_layers")
@dataclass(frozen=True)
class LayersConfig(HeadConfig):
    """Which layers it looks into."""

    hidden: tuple[int, ...] = (1,)
    keys_values: tuple[int, ...] = (-2, -1)

    @property
    def reads(self) -> Reads:
        return Reads(self.hidden, self.keys_values)

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> LayersHead:
        return LayersHead(self, backbone, chunk, action_dim)


class LayersHead(Head):
    """The cognition asks each layer's keys for its values; a layer's hidden states come in as their mean."""

    def __init__(self, config: LayersConfig, backbone: Backbone, chunk: int, action_dim: int) -> None:
        super().__init__()
        self.shape = (chunk, action_dim)
        read = len(config.keys_values) * backbone.cache_size + len(config.hidden) * backbone.width
        self.query = nn.Linear(backbone.width, len(config.keys_values) * backbone.cache_size)
        self.action = nn.Linear(read + backbone.width, chunk * action_dim)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        assert features.layers is not None
        assert noise is None
        states, valid = features.layers, features.layers.valid
        query = self.query(features.cognition).unflatten(-1, (states.keys.shape[1], -1))
        score = torch.einsum("bsd,bsnd->bsn", query, states.keys).masked_fill(~valid[:, None], -1e9)
        read = torch.einsum("bsn,bsnd->bsd", score.softmax(-1), states.values)
        mean = (states.hidden * valid[:, None, :, None]).sum(2) / valid.sum(1)[:, None, None]
        actions: torch.Tensor = self.action(torch.cat([read.flatten(1), mean.flatten(1), features.cognition], -1))
        return actions.unflatten(-1, self.shape)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        return masked_mean((self.sample(features) - actions).square(), weight)
