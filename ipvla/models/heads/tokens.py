"""The language model writes the actions as tokens.

So do OpenVLA (arXiv 2406.09246), pi0-FAST (2501.09747) and RDT2's first stage (2602.03310).

Behind the observation stand a first token, made of the memory-augmented cognition and the proprioception, and then
the action tokens y_1..y_L of a tokenizer of `action_tokens`. They read the keys and values that every language
layer has of the observation, and

    autoregressive: y_i ~ softmax(W h_i), h_i reads the first token and y_1..y_{i-1}; training is teacher forced
    parallel:       all h_i in one pass, each reads all, from learned queries (OpenVLA-OFT, arXiv 2502.19645)

A token that could not follow is never chosen: its logit is masked. So a row of tokens always means a chunk; if it
did not, `ActionTokenError` would end the episode rather than move the robot. Action dimensions that are constant
in the dataset are not written. Past an episode's end the last action stands, whatever fills the targets there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.action_tokens import ActionTokenError, ActionTokenizer, ActionTokenizerConfig, BinTokensConfig
from ipvla.models.action_tokens.protocol import vocabulary_ids
from ipvla.models.backbones import Backbone
from ipvla.models.features import Features, LanguageModel, LayerStates, Reads
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean
from ipvla.types import NO_TOKEN

_DECODINGS = ("autoregressive", "parallel")
_IDS = ("own", "last")
#: Where a policy's directory holds the tokenizer's files.
DIRECTORY = "action_tokenizer"


@HeadConfig.register_subclass("tokens")
@dataclass(frozen=True)
class TokensConfig(HeadConfig):
    """How actions are written.

    Attributes:
        tokenizer: a choice by its `type`: bins, fast or rvq.
        decoding: "autoregressive", or "parallel" for a tokenizer that writes every chunk with as many tokens.
        temperature: of sampling in rollout, from the episode's noise; 0 takes the likeliest token.
        ids: "own" adds the action tokens to the vocabulary, with embeddings of their own; "last" writes them with
            the last ids of the backbone's vocabulary, as published checkpoints do.
        skip: of these last ids, how many stay free: 64 in OpenVLA, 128 in pi0-FAST.
    """

    tokenizer: ActionTokenizerConfig = field(default_factory=BinTokensConfig)
    decoding: str = "autoregressive"
    temperature: float = 0.0
    ids: str = "own"
    skip: int = 0

    def __post_init__(self) -> None:
        if self.decoding not in _DECODINGS:
            raise ValueError(f"head.decoding is {self.decoding!r}; choose one of {', '.join(_DECODINGS)}")
        if self.ids not in _IDS:
            raise ValueError(f"head.ids is {self.ids!r}; choose one of {', '.join(_IDS)}")
        if self.temperature < 0:
            raise ValueError(f"head.temperature is {self.temperature}; give 0 for the likeliest token, or more")
        if self.skip < 0 or (self.skip and self.ids == "own"):
            raise ValueError(
                f'head.skip is {self.skip}; give 0 or more, and more than 0 with head.ids "last" alone'
            )

    @property
    def bounded(self) -> bool:
        return self.tokenizer.bounded

    @property
    def reads(self) -> Reads:
        return Reads(language=True)

    def check(self, chunk: int) -> None:
        tokenizer = self.tokenizer.build()
        tokenizer.check(chunk, None)
        if self.decoding == "parallel" and not tokenizer.fixed:
            kind = self.tokenizer.get_choice_name(type(self.tokenizer))
            raise ValueError(
                f"head.decoding is parallel, and tokenizer {kind} writes chunks of different lengths; "
                "choose autoregressive, or another tokenizer"
            )

    def beside(self, directory: Path) -> TokensConfig:
        return replace(self, tokenizer=self.tokenizer.beside(directory / DIRECTORY))

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> TokensHead:
        self.check(chunk)
        return TokensHead(self, backbone, proprio, (chunk, action_dim))


class TokensHead(Head):
    """See the module's docstring. Tokens are int64 [B, L], NO_TOKEN past their ends; the end is token V."""

    fingerprint: torch.Tensor

    def __init__(self, config: TokensConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]) -> None:
        super().__init__()
        if type(backbone).extend is Backbone.extend:
            raise ValueError(
                f"head.type tokens needs a backbone that writes on behind an observation, and "
                f"{type(backbone).__name__} has no `extend`; choose another backbone or head"
            )
        self.config, self.chunk = config, shape[0]
        self.tokenizer: ActionTokenizer = config.tokenizer.build()
        self.size = self.tokenizer.vocabulary + (not self.tokenizer.fixed)
        longest, width = self.tokenizer.longest(*shape), backbone.width
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width + proprio, width)
        if config.ids == "last":
            self.vocabulary = backbone.vocabulary
            if self.size + config.skip > self.vocabulary:
                raise ValueError(
                    f'head.ids is "last", and {self.size} action tokens and head.skip {config.skip} exceed the '
                    f"backbone's {self.vocabulary} ids; choose own"
                )
        else:
            if config.decoding == "autoregressive":
                self.embedding = nn.Embedding(self.tokenizer.vocabulary, width)
            self.out = nn.Linear(width, self.size)
        self.places = nn.Parameter(torch.randn(longest + 1, width))
        self._scale_as(backbone)
        self.register_buffer("fingerprint", torch.tensor(fingerprint(self.tokenizer)))
        self.register_load_state_dict_pre_hook(refuse_other_tokenizer)  # type: ignore[no-untyped-call]
        self._write_only(torch.ones(shape[1], dtype=torch.bool))  # until the model knows what varies in its data

    @torch.no_grad()
    def _scale_as(self, backbone: Backbone) -> None:
        """What enters the language layers begins as large as the words that they know."""
        scale = backbone.embed_ids(torch.arange(min(backbone.vocabulary, 64))).float().std()
        self.places.mul_(0.3 * scale)
        self.first.weight.mul_(scale)
        self.first.bias.zero_()
        if hasattr(self, "embedding"):
            self.embedding.weight.mul_(scale)

    def set_varies(self, action_varies: torch.Tensor) -> None:
        """ValueError if the tokenizer was fitted on chunks of another shape."""
        self._write_only(action_varies)
        self.tokenizer.check(self.chunk, len(self.written))

    def _write_only(self, action_varies: torch.Tensor) -> None:
        super().set_varies(action_varies)
        self.action_dim = len(action_varies)
        self.written: list[int] = action_varies.nonzero()[:, 0].tolist()
        self.longest = self.tokenizer.longest(self.chunk, len(self.written))
        self.noise_shape = (self.longest,) if self.config.temperature else None

    def save_description(self, directory: Path) -> None:
        self.tokenizer.save(directory / DIRECTORY)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the tokens, averaged over those of actions that exist."""
        valid = weight[..., self.written].any(-1)
        tokens = self.tokenizer.encode(held(actions[..., self.written].float(), valid))
        counted = self.tokenizer.weight(tokens, valid) & (tokens != NO_TOKEN)
        if not self.tokenizer.fixed:
            tokens, counted = _ended(tokens, counted, self.tokenizer.vocabulary)
        logits = self._logits_of(features, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.clamp(min=0).flatten(), reduction="none")
        return masked_mean(loss.view_as(tokens), counted)

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """As `Head.sample`. ActionTokenError if the tokens mean no chunk, or the logits are not finite."""
        tokens = self.write(features, noise)
        actions = torch.zeros(len(tokens), self.chunk, self.action_dim, device=tokens.device)
        actions[..., self.written] = self.tokenizer.decode(tokens, self.chunk, len(self.written)).float()
        return actions

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over the tokens at each place of the likeliest chunk. ValueError for FAST, which has none."""
        shares = self._logits_of(features, self.write(features)).softmax(-1)
        actions = torch.zeros(len(shares), self.chunk, self.action_dim, device=shares.device)
        actions[..., self.written] = self.tokenizer.expected(shares, self.chunk, len(self.written)).float()
        return actions

    @torch.no_grad()
    def write(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens of features [B, ...]; `noise` as in `sample`."""
        uniform = None if noise is None or not self.config.temperature else torch.special.ndtr(noise.double())
        if self.config.decoding == "parallel":
            return chosen(self._at_once(features), None, uniform, self.config.temperature)
        past, end = features.layers, self.tokenizer.vocabulary
        assert past is not None
        x = self._first(features)
        alone = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        tokens = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        going = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for i in range(self.longest + (not self.tokenizer.fixed)):
            state, past = self._extend(replace(features, layers=past), x + self.places[i], alone, keep=True)
            legal = self.tokenizer.legal(tokens, self.chunk, len(self.written))
            if legal is not None:
                # what a row that has ended would write does not count
                legal = legal[:, : self.size] | ~going[:, None]
            drawn = None if uniform is None else uniform[:, min(i, self.longest - 1)]
            logits = self._logits(features.language, state)[:, 0]
            token = chosen(logits, legal, drawn, self.config.temperature)
            going = going & (token != end)
            if not going.any():
                break
            tokens = torch.cat([tokens, token.masked_fill(~going, NO_TOKEN)[:, None]], 1)
            x = self._embed(features.language, token.clamp(max=end - 1))[:, None]
        return tokens

    def _logits_of(self, features: Features, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [B, L, V], or V + 1 with the end: of each token, after those before it."""
        if self.config.decoding == "parallel":
            return self._at_once(features)
        before = self._embed(features.language, tokens[:, :-1].clamp(0, self.tokenizer.vocabulary - 1))
        x = torch.cat([self._first(features), before], 1)
        reads = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        states, _ = self._extend(features, x + self.places[: x.shape[1]], reads)
        return self._logits(features.language, states)

    def _at_once(self, features: Features) -> torch.Tensor:
        x = F.pad(self._first(features), (0, 0, 0, self.longest)) + self.places[: self.longest + 1]
        reads = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        states, _ = self._extend(features, x, reads)
        return self._logits(features.language, states[:, 1:])

    def _first(self, features: Features) -> torch.Tensor:
        seen = self.norm(features.cognition)
        first: torch.Tensor = self.first(torch.cat([seen, features.proprio.to(seen.dtype)], -1))
        return first[:, None]

    def _extend(
        self, features: Features, x: torch.Tensor, reads: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, LayerStates]:
        assert features.layers is not None
        return _of(features.language).extend(x, features.layers, reads, keep)

    def _embed(self, language: LanguageModel | None, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.ids == "own":
            embedded: torch.Tensor = self.embedding(tokens)
            return embedded
        return _of(language).embed_ids(vocabulary_ids(tokens, self.vocabulary, self.config.skip))

    def _logits(self, language: LanguageModel | None, states: torch.Tensor) -> torch.Tensor:
        """float32 [..., V], or V + 1 with the end."""
        if self.config.ids == "own":
            logits: torch.Tensor = self.out(states.to(self.out.weight.dtype))
        else:
            ids = vocabulary_ids(torch.arange(self.size, device=states.device), self.vocabulary, self.config.skip)
            logits = _of(language).logits(states)[..., ids]
        return logits.float()


def chosen(
    logits: torch.Tensor,
    legal: torch.Tensor | None,
    uniform: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """int64 [...] of logits [..., V]: the likeliest, or the one at `uniform` [...] of their distribution.

    Args:
        legal: bool [..., V], which may be chosen; None for all.

    Raises:
        ActionTokenError: the logits are not finite.
    """
    finite = logits.isfinite().flatten(1).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ActionTokenError(f"row {row}: the logits of its action tokens are not finite; use other weights")
    if legal is not None:
        logits = logits.masked_fill(~legal, -torch.inf)
    if uniform is None:
        return logits.argmax(-1)
    share = (logits.double() / temperature).softmax(-1).cumsum(-1)
    place = (uniform.clamp(max=1 - 1e-12) * share[..., -1])[..., None].contiguous()
    return torch.searchsorted(share, place, right=True)[..., 0]


def held(actions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Chunks [B, C, A] with the last valid action, or zeros before one, where valid bool [B, C] is False."""
    place = torch.arange(actions.shape[1], device=actions.device).where(valid, -1).cummax(1).values
    last = actions.gather(1, place.clamp(min=0)[..., None].expand_as(actions))
    return last.masked_fill((place < 0)[..., None], 0.0)


def _ended(tokens: torch.Tensor, counted: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With the end behind each row's tokens, as long as the longest row."""
    lengths = (tokens != NO_TOKEN).sum(1, keepdim=True)
    longest = int(lengths.max()) + 1
    tokens = F.pad(tokens, (0, 1), value=NO_TOKEN).scatter(1, lengths, end)[:, :longest]
    any_counted = counted.any(1, keepdim=True)
    return tokens, (tokens != NO_TOKEN) & any_counted


def _of(language: LanguageModel | None) -> LanguageModel:
    if language is None:
        raise ValueError(
            "head.type tokens needs Features.language; call IPVLA.loss and IPVLA.sample, not the head"
        )
    return language


def fingerprint(tokenizer: ActionTokenizer) -> int:
    """In [0, 2^63), of what a tokenizer is without weights; the same in every process."""
    return int.from_bytes(hashlib.sha256(tokenizer.identity.encode()).digest()[:8], "big") >> 1


def refuse_other_tokenizer(head: Any, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`, of a head with a `tokenizer` and its `fingerprint`."""
    saved = state.get(f"{prefix}fingerprint")
    if saved is not None and int(saved) != int(head.fingerprint):
        raise ActionTokenError(
            f"head.tokenizer {head.tokenizer.identity[:60]} is not the one that these weights were trained with; "
            "give head.tokenizer.file the file of that policy (its directory action_tokenizer)"
        )
