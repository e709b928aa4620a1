"""OpenVLA's action tokens (arXiv 2406.09246): the words behind the prompt are the action, one number each.

A number's word is `end_of_words - 1 - bin` (`bins.action_bins`); any other word reads as an outermost bin, as in
OpenVLA's own code. Written greedily, one after another, with cached keys and values; or, where the backbone has
places for a whole chunk, all at once (OpenVLA-OFT without a head of its own).

What a memory has added to the cognition is added to the state of every word: nothing while its gate is closed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ipvla.models.backbones import Backbone
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.features import Features, Reads
from ipvla.models.heads.bins import NUM_BINS, action_bins, bin_centres
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean

_EOS = 2


def states_of(features: Features, behind: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states float32 [B, count, D] from the prompt's last token on; and float32 [B, 1, D], what a
    memory has added to the first of them.

    `behind`: tokens of the observation behind the prompt.
    """
    assert features.layers is not None
    hidden, valid = features.layers.hidden[:, -1], features.layers.valid
    places = (valid.sum(-1, keepdim=True) - 1 - behind) + torch.arange(count, device=valid.device)
    states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).float()
    return states, features.cognition[:, None] - states[:, :1]


@HeadConfig.register_subclass("openvla")
@dataclass(frozen=True)
class OpenVLATokensConfig(HeadConfig):
    """Needs `model.backbone.type prismatic`.

    Attributes:
        reasoning_tokens: words that may stand before the action (ECoT); 0 if the action comes at once.
    """

    bounded: ClassVar[bool] = True

    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        if self.reasoning_tokens < 0:
            raise ValueError(f"head.reasoning_tokens is {self.reasoning_tokens}; give 0 or more")

    @property
    def reads(self) -> Reads:
        return Reads(hidden=(-1,), continuation=True)

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> OpenVLATokensHead:
        if not isinstance(backbone, PrismaticBackbone):
            raise ValueError(
                "model.head.type openvla writes the words of model.backbone.type prismatic; choose both or neither"
            )
        return OpenVLATokensHead(self, backbone, (chunk, action_dim))


class OpenVLATokensHead(Head):
    """See the module's docstring. It has no weights: it speaks with the backbone's."""

    def __init__(self, config: OpenVLATokensConfig, backbone: PrismaticBackbone, shape: tuple[int, int]) -> None:
        super().__init__()
        self.reasoning_tokens = config.reasoning_tokens
        self.shape = shape
        self.numbers = math.prod(shape)
        self.end_of_words = backbone.files.end_of_words
        self.writes = not backbone.config.action_places
        self._speaker = (backbone,)  # in a tuple, so that its weights are not the head's
        if backbone.config.action_places not in (0, self.numbers):
            raise ValueError(
                f"model.backbone.action_places is {backbone.config.action_places}, and a chunk has {shape[0]} "
                f"actions of {shape[1]} numbers; set it to {self.numbers}"
            )

    def words(self, actions: torch.Tensor) -> torch.Tensor:
        """Normalised actions [..., C, A] -> int64 [..., C * A]."""
        return self.end_of_words - 1 - action_bins(actions).flatten(-2)

    def actions(self, words: torch.Tensor) -> torch.Tensor:
        """The inverse, up to half a bin: int64 [..., C * A] -> float32 [..., C, A]."""
        return bin_centres((self.end_of_words - 1 - words).clamp(min=0)).reshape(*words.shape[:-1], *self.shape)

    def reply(self, actions: torch.Tensor) -> torch.Tensor | None:
        return self.words(actions) if self.writes else None

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the words, and of the `</s>` behind them."""
        backbone, words = self._speaker[0], self.words(actions)
        # OFT has a place behind the last number too: its `</s>`
        states, recalled = states_of(features, self.numbers + (not self.writes), self.numbers + 1)
        words = F.pad(words, (0, 1), value=_EOS)
        loss = F.cross_entropy(backbone.logits(states + recalled).flatten(0, 1), words.flatten(), reduction="none")
        counted = weight.flatten(1)
        counted = torch.cat([counted, counted.any(1, keepdim=True)], 1)
        return masked_mean(loss.view_as(words), counted)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        backbone = self._speaker[0]
        if not self.writes:
            states, recalled = states_of(features, self.numbers + 1, self.numbers)
            return self.actions(backbone.logits(states + recalled).argmax(-1))
        assert features.continuation is not None
        states, recalled = states_of(features, 0, 1)
        longest = self.numbers + (self.reasoning_tokens + 1 if self.reasoning_tokens else 0)
        words = backbone.speak(states[:, 0], features.continuation, longest, recalled[:, 0])
        if self.reasoning_tokens:  # the numbers stand before the first `</s>`
            end = ((words == _EOS).cumsum(1) == 0).sum(1, keepdim=True)
            places = (end - self.numbers).clamp(min=0) + torch.arange(self.numbers, device=end.device)
            words = words.gather(1, places)
        return self.actions(words)

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over the words of actions, at the place of each number, behind those before it."""
        states, recalled = states_of(features, self.numbers + (not self.writes), self.numbers)
        logits = self._speaker[0].logits(states + recalled)
        logits = logits[..., self.end_of_words - NUM_BINS : self.end_of_words]
        numbers = bin_centres(torch.arange(NUM_BINS, device=logits.device)).flip(0)
        means: torch.Tensor = logits.softmax(-1) @ numbers
        return means.reshape(len(means), *self.shape)
