"""OpenVLA's action tokens (arXiv 2406.09246): the words behind the prompt are the action, one number each.

A number's word is `end_of_words - 1 - bin` (`bins.action_bins`). Written greedily, one after another, with cached
keys and values; or, where the backbone has places for a whole chunk, all at once (OpenVLA-OFT without own head).

OpenVLA's own code reads any other word as an outermost bin. Here none is written where a number belongs: the
likeliest of the 256 is, and a reasoning ends behind a whole action alone, or in one where its words run out.

What a memory has added to the cognition is added to the state of every word: nothing while its gate is closed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ipvla.models.action_tokens import ActionTokenError
from ipvla.models.action_tokens.bins import NUM_BINS, action_bins, bin_centres
from ipvla.models.backbones import Backbone
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.features import Features, LanguageModel, Reads
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean
from ipvla.models.heads.tokens import chosen

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


def _language(features: Features) -> LanguageModel:
    assert features.language is not None
    return features.language


@HeadConfig.register_subclass("openvla")
@dataclass(frozen=True)
class OpenVLATokensConfig(HeadConfig):
    """Needs `model.backbone.type prismatic`.

    Attributes:
        reasoning_tokens: words that may stand before the action (ECoT); 0 if the action comes at once.
    """

    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        if self.reasoning_tokens < 0:
            raise ValueError(f"head.reasoning_tokens is {self.reasoning_tokens}; give 0 or more")

    @property
    def bounded(self) -> bool:
        return True

    @property
    def reads(self) -> Reads:
        return Reads(hidden=(-1,), language=True)

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
        self.parallel = backbone.config.action_places > 0  # all words are said at once
        if backbone.config.action_places not in (0, self.numbers):
            raise ValueError(
                f"model.backbone.action_places is {backbone.config.action_places}, and a chunk has {shape[0]} "
                f"actions of {shape[1]} numbers; set it to {self.numbers}"
            )

    def words(self, actions: torch.Tensor) -> torch.Tensor:
        """Normalised actions [..., C, A] -> int64 [..., C * A]."""
        return self.end_of_words - 1 - action_bins(actions).flatten(-2)

    def actions(self, words: torch.Tensor) -> torch.Tensor:
        """The inverse, up to half a bin: int64 [..., C * A] -> float32 [..., C, A].

        Raises:
            ActionTokenError: a word is no number's.
        """
        if (foreign := ~self._numbers(words)).any():
            raise ActionTokenError(
                f"word {int(words[foreign][0])} stands where a number belongs, and those of numbers are "
                f"{self.end_of_words - NUM_BINS} to {self.end_of_words - 1}"
            )
        return bin_centres(self.end_of_words - 1 - words).reshape(*words.shape[:-1], *self.shape)

    def _numbers(self, words: torch.Tensor) -> torch.Tensor:
        """Which words int64 [...] are those of numbers, bool [...]."""
        return (words >= self.end_of_words - NUM_BINS) & (words < self.end_of_words)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the words, and of the `</s>` behind them."""
        words = self.words(actions)
        if self.parallel:  # there is a place behind the last number too, of its `</s>`
            states, recalled = states_of(features, self.numbers + 1, self.numbers + 1)
        else:
            states, recalled = self.heard(features, words)
        words = F.pad(words, (0, 1), value=_EOS)
        logits = _language(features).logits(states + recalled)
        loss = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none")
        counted = weight.flatten(1)
        counted = torch.cat([counted, counted.any(1, keepdim=True)], 1)
        return masked_mean(loss.view_as(words), counted)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        if self.parallel:
            states, recalled = states_of(features, self.numbers + 1, self.numbers)
            logits = _language(features).logits(states + recalled)
            return self.actions(
                chosen(logits, self._numbers(torch.arange(logits.shape[-1], device=logits.device)))
            )
        words = self.write(features)
        return self.actions(words.gather(1, self._places(words)))

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over the words of actions, at each place of what `sample` says."""
        if self.parallel:
            states, recalled = states_of(features, self.numbers + 1, self.numbers)
        else:
            words = self.write(features)
            states, recalled = self.heard(features, words[:, :-1])
            states = states.gather(1, self._places(words)[..., None].expand(-1, -1, states.shape[-1]))
        logits = _language(features).logits(states + recalled)
        logits = logits[..., self.end_of_words - NUM_BINS : self.end_of_words]
        numbers = bin_centres(torch.arange(NUM_BINS, device=logits.device)).flip(0)
        means: torch.Tensor = logits.softmax(-1) @ numbers
        return means.reshape(len(means), *self.shape)

    @torch.no_grad()
    def write(self, features: Features) -> torch.Tensor:
        """int64 [B, n], the likeliest words behind the prompts, one by one; `</s>` where every row has ended.

        The numbers stand at the end, or before the first `</s>`.
        """
        language, past = _language(features), features.layers
        assert past is not None
        longest = self.numbers + (self.reasoning_tokens + 1 if self.reasoning_tokens else 0)
        states, recalled = states_of(features, 0, 1)
        words = torch.full((len(states), longest), _EOS, device=states.device)
        alone = torch.ones(1, 1, dtype=torch.bool, device=states.device)
        run = torch.zeros(len(states), dtype=torch.long, device=states.device)  # of numbers, up to here
        for i in range(longest):
            logits = language.logits(states + recalled)[:, 0]
            every = torch.arange(logits.shape[-1], device=states.device)
            legal = self._numbers(every).repeat(len(states), 1)
            legal |= longest - i > self.numbers + 1
            legal[:, _EOS] = run >= self.numbers
            words[:, i] = chosen(logits, legal)
            run = (run + 1) * self._numbers(words[:, i])
            if i + 1 == longest or (words[:, : i + 1] == _EOS).any(1).all():
                break
            states, past = language.extend(language.embed_ids(words[:, i : i + 1]), past, alone, keep=True)
        return words

    def heard(self, features: Features, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `states_of`, of the prompt's last token and these words int64 [B, n] behind it."""
        language = _language(features)
        assert features.layers is not None
        causal = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool, device=words.device).tril()
        states, recalled = states_of(features, 0, 1)
        heard, _ = language.extend(language.embed_ids(words), features.layers, causal)
        return torch.cat([states, heard.float()], 1), recalled

    def _places(self, words: torch.Tensor) -> torch.Tensor:
        """int64 [B, C * A], where the numbers stand among them: at the end, or before the first `</s>`."""
        ended = (words == _EOS).cumsum(1) > 0
        end = (~ended).sum(1) if self.reasoning_tokens else torch.full_like(words[:, 0], self.numbers)
        return (end[:, None] - self.numbers).clamp(min=0) + torch.arange(self.numbers, device=end.device)
