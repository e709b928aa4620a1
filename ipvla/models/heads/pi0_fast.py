"""The `pi0_fast` head: pi0-FAST, whose language model writes a chunk behind the prompt (arXiv 2501.09747).

    [<bos>] `Action: ` FAST tokens `|` <eos>

Token k of FAST is id `vocabulary - 1 - skip - k` of the backbone's own. A token reads the prompt and the tokens
before it. With `constrained` only what may follow is written, so that every row means a chunk. Without, the
likeliest of all ids is, as in the published programs. Of ids that mean no chunk these make zeros, or they fill up
with zeros; here such ids are an `ActionTokenError`.

What a memory has added to the cognition is added to the state of every token: nothing while its gate is closed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ipvla.models.action_tokens import ActionTokenError, ActionTokenizer, ActionTokenizerConfig, FastTokensConfig
from ipvla.models.action_tokens.protocol import vocabulary_ids
from ipvla.models.backbones import Backbone
from ipvla.models.backbones.pi0 import Pi0Backbone
from ipvla.models.backbones.protocol import padded
from ipvla.models.features import Features, LayerStates, Reads
from ipvla.models.heads.openvla_tokens import states_of
from ipvla.models.heads.protocol import Head, HeadConfig, masked_mean
from ipvla.models.heads.tokens import DIRECTORY, chosen, fingerprint, held, refuse_other_tokenizer
from ipvla.types import NO_TOKEN


@HeadConfig.register_subclass("pi0_fast")
@dataclass(frozen=True)
class Pi0FastHeadConfig(HeadConfig):
    """Needs `model.backbone.type pi0`.

    Attributes:
        tokenizer: of `type` fast; its `file` is the FAST tokenizer that the weights were trained with.
        begins: a `<bos>` stands before what is written: LeRobot's pi0-FAST when it is trained. When it acts the
            prompt ends in that one (`backbone.closing`), and openpi's has none.
        gap: positions that acting leaves free behind the prompt: 0 in LeRobot, 1 in openpi. Training leaves none.
        skip: of the last ids, how many stay free behind those of FAST.
        constrained: write only what may follow, until a chunk is complete.
        max_tokens: of what is written without, `Action: ` and `|` included.
        temperature: of sampling in rollout, from the episode's noise; 0 takes the likeliest token.
    """

    tokenizer: ActionTokenizerConfig = field(default_factory=FastTokensConfig)
    begins: bool = False
    gap: int = 0
    skip: int = 128
    constrained: bool = True
    max_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"gap": 0, "skip": 0, "temperature": 0, "max_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"head.{name} is {getattr(self, name)}; give {least} or more")
        if not isinstance(self.tokenizer, FastTokensConfig):
            raise ValueError(
                f"head.tokenizer is of type {self.tokenizer.get_choice_name(type(self.tokenizer))}, and pi0-FAST "
                "writes FAST tokens; give type fast, or choose head.type tokens"
            )

    @property
    def reads(self) -> Reads:
        return Reads(hidden=(-1,), language=True)

    def check(self, chunk: int) -> None:
        self.tokenizer.build().check(chunk, None)

    def beside(self, directory: Path) -> Pi0FastHeadConfig:
        return replace(self, tokenizer=self.tokenizer.beside(directory / DIRECTORY))

    def build(self, backbone: Backbone, proprio: int, chunk: int, action_dim: int) -> Pi0FastHead:
        if not isinstance(backbone, Pi0Backbone):
            raise ValueError(
                "model.head.type pi0_fast writes the words of model.backbone.type pi0; choose both or neither"
            )
        return Pi0FastHead(self, backbone, (chunk, action_dim))


class Pi0FastHead(Head):
    """See the module's docstring. It has no weights: it speaks with the backbone's.

    Attributes:
        opening: ids of `Action: `.
        ids: int64 [V + 1], of the FAST tokens, and last that of `|`, which ends them.
    """

    ids: torch.Tensor
    fingerprint: torch.Tensor

    def __init__(self, config: Pi0FastHeadConfig, backbone: Pi0Backbone, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.tokenizer: ActionTokenizer = config.tokenizer.build()
        self.tokenizer.check(*shape)
        self.vocabulary, count = backbone.vocabulary, self.tokenizer.vocabulary
        first = vocabulary_ids(torch.tensor(0), self.vocabulary, config.skip).item()
        self.opening, mark = backbone.tokenize_text("Action: "), backbone.tokenize_text("|")
        if len(backbone.tokenizer) <= first or first < count or not self.opening or len(mark) != 1:
            raise ValueError(
                f"model.backbone.pretrained {backbone.config.pretrained!r} has {len(backbone.tokenizer)} tokens, "
                f"and actions are written with {first - count + 1} to {first}, behind `Action: ` and before `|`; "
                "give the tokenizer of PaliGemma, which the weights were trained with"
            )
        self.lead = [int(backbone.tokenizer.bos_token_id)] if config.begins else []
        self.end = backbone.end
        ids = vocabulary_ids(torch.arange(count), self.vocabulary, config.skip)
        self.register_buffer("ids", torch.cat([ids, torch.tensor(mark)]), persistent=False)
        self.register_buffer("fingerprint", torch.tensor(fingerprint(self.tokenizer)))
        self.register_load_state_dict_pre_hook(refuse_other_tokenizer)  # type: ignore[no-untyped-call]
        whole = len(self.opening) + self.tokenizer.longest(*shape) + 1
        self.longest = whole if config.constrained else config.max_tokens
        self.noise_shape = (self.longest,) if config.temperature else None

    def save_description(self, directory: Path) -> None:
        self.tokenizer.save(directory / DIRECTORY)

    def said(self, actions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Ids int64 [B, L] of normalised chunks [B, C, A], NO_TOKEN past their ends: all that a loss counts.

        Past an episode's end (`valid` bool [B, C]) the last action stands.
        """
        tokens = self.tokenizer.encode(held(actions.float(), valid)).tolist()
        ids = self.ids.tolist()
        rows = [[*self.opening, *(ids[t] for t in row if t != NO_TOKEN), ids[-1], self.end] for row in tokens]
        return padded(rows).to(actions.device)

    def logits(self, features: Features, said: torch.Tensor) -> torch.Tensor:
        """float32 [B, L, ids]: of each of the ids int64 [B, L], after those before it."""
        fed = said[:, :-1].clamp(min=0)
        fed = torch.cat([fed.new_tensor(self.lead).expand(len(fed), -1), fed], 1)
        states, _ = self._heard(features, fed, features.layers, 0)
        before, recalled = states_of(features, 0, 1)
        if not self.lead:
            states = torch.cat([before, states], 1)
        return _language(features).logits(states + recalled)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy, averaged over the tokens of all chunks."""
        valid = weight.any(-1)
        said = self.said(actions, valid)
        logits = self.logits(features, said)
        loss = F.cross_entropy(logits.flatten(0, 1), said.clamp(min=0).flatten(), reduction="none")
        return masked_mean(loss.view_as(said), (said != NO_TOKEN) & valid.any(1, keepdim=True))

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """As `Head.sample`. ActionTokenError if what is written means no chunk, or the logits are not finite."""
        return self.actions(self.write(features, noise))

    def expected(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """ValueError: FAST has none."""
        return self.tokenizer.expected(features.cognition, *self.shape)

    def actions(self, written: torch.Tensor) -> torch.Tensor:
        """Chunks float32 [B, C, A] of ids int64 [B, L], NO_TOKEN past their ends. ActionTokenError for none."""
        begun = len(self.opening)
        wrong = (written[:, :begun] != written.new_tensor(self.opening)).any(1)
        behind = written[:, begun:]
        ended = (behind == self.ids[-1]).cumsum(1) > 0
        for rows, what in ((wrong, "does not begin with `Action: `"), (~ended.any(1), "has no `|` at its end")):
            if rows.any():
                row = int(rows.nonzero()[0])
                ids = [i for i in written[row].tolist() if i != NO_TOKEN]
                raise ActionTokenError(f"row {row}: what was written {what}: {len(ids)} ids, {ids[:6]}...")
        tokens = vocabulary_ids(behind, self.vocabulary, self.config.skip).masked_fill(ended, NO_TOKEN)
        return self.tokenizer.decode(tokens, *self.shape).float()

    @torch.no_grad()
    def write(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Ids int64 [B, L] behind the prompts, up to `|`, then NO_TOKEN; `noise` as in `sample`."""
        config, language, past = self.config, _language(features), features.layers
        state, recalled = states_of(features, 0, 1)
        uniform = None if noise is None or not config.temperature else torch.special.ndtr(noise.double())
        begun = self.opening if config.constrained else []
        if begun or self.lead:
            ids = torch.tensor([*self.lead, *begun], device=state.device)
            state, past = self._heard(features, ids.expand(len(state), -1), past, config.gap)
        words = torch.tensor(begun, dtype=torch.long, device=state.device).expand(len(state), -1)
        tokens = words[:, :0]
        going = torch.ones(len(state), dtype=torch.bool, device=state.device)
        for i in range(len(begun), self.longest):
            logits, drawn = (
                language.logits(state[:, -1] + recalled[:, 0]),
                None if uniform is None else uniform[:, i],
            )
            if config.constrained:
                legal = self.tokenizer.legal(tokens, *self.shape)
                assert legal is not None
                # what a row that has ended would write does not count
                token = chosen(logits[:, self.ids], legal | ~going[:, None], drawn, config.temperature)
                over = ~going | (token == self.tokenizer.vocabulary)
                tokens = torch.cat([tokens, token.masked_fill(over, NO_TOKEN)[:, None]], 1)
                word = self.ids[token]
            else:
                word = chosen(logits, None, drawn, config.temperature)
            words = torch.cat([words, word.masked_fill(~going, NO_TOKEN)[:, None]], 1)
            going = going & (word != self.ids[-1])
            if not going.any():
                break
            state, past = self._heard(features, word[:, None], past, config.gap)
        return words

    def _heard(
        self, features: Features, ids: torch.Tensor, past: LayerStates | None, gap: int
    ) -> tuple[torch.Tensor, LayerStates]:
        """Last hidden states float32 [B, L, D] of these ids int64 [B, L], and what stands before the next one."""
        assert past is not None
        language = _language(features)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        states, past = language.extend(language.embed_ids(ids), past, causal, keep=True, gap=gap)
        return states.float(), past


def _language(features: Features) -> Pi0Backbone:
    assert isinstance(features.language, Pi0Backbone)
    return features.language
