"""The backbone's last layers as the fast part: one network, two speeds (FiS-VLA, arXiv 2506.01953).

The slow part is the whole backbone. Of its pass the last n layers' keys and values are kept. The fast part puts
through these n layers alone what is new at a call: the observation's tokens but for the instruction's, the slow
cognition, memory included, and the thought's age. They read each other and what was kept. The instruction is known
from there, and where the backbone's eye reads it (`tiny`'s does) from the pictures' tokens.

Two things are not as in the public program. There the tokens that the slow part is trained to say stand behind the
noised true action and read it; here nothing of the slow pass reads the fast one, so that its own loss rests on
what it has seen alone. And a layer adapts the tokens that enter without having been through the layers before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone, BackboneConfig
from ipvla.models.backbones.protocol import Embedded
from ipvla.models.features import Features, LayerStates, Reads
from ipvla.models.heads import HeadConfig
from ipvla.models.heads.protocol import masked_mean
from ipvla.models.memory import MemoryConfig
from ipvla.models.speeds.protocol import Shown, SpeedsConfig, TwoSpeedsConfig
from ipvla.models.speeds.two_speeds import Age, FastPart, TwoSpeeds
from ipvla.types import Memory, ModelInputs, StepBatch


@SpeedsConfig.register_subclass("fast_in_slow")
@dataclass(frozen=True)
class FastInSlowConfig(TwoSpeedsConfig):
    """See the module's docstring.

    Attributes:
        layers: n, of the backbone's language layers, fewer than it has.
        slow_weight: of the slow part's own loss: a linear layer tells the actions from its cognition, squared
            error; 0 for none.
    """

    layers: int = 2
    slow_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"model.speeds.layers is {self.layers}; it must be at least 1")
        if not (math.isfinite(self.slow_weight) and self.slow_weight >= 0):
            raise ValueError(f"model.speeds.slow_weight is {self.slow_weight}; it must be finite, 0 or more")

    def reads(self, num_layers: int) -> Reads:
        return Reads(keys_values=tuple(range(-self.layers, 0)))

    def check(self, backbone: BackboneConfig, memory: MemoryConfig, head: HeadConfig) -> None:
        super().check(backbone, memory, head)
        if backbone.split_layers is None:
            raise ValueError(
                "model.speeds.type fast_in_slow runs the last language layers alone, which model.backbone.type "
                f"{backbone.get_choice_name(type(backbone))} cannot; choose tiny, or model.speeds.type latent"
            )
        if self.layers >= backbone.split_layers:
            raise ValueError(
                f"model.speeds.layers is {self.layers}, and the backbone has {backbone.split_layers}: a fast part "
                "without a slow one; leave the slow part one layer or more"
            )

    def build(
        self, memory: MemoryConfig, backbone: Backbone, shown: Shown, chunk: int, action_varies: torch.Tensor
    ) -> TwoSpeeds:
        return TwoSpeeds.around(LastLayers(self, backbone, chunk, action_varies), self, memory, backbone)


class LastLayers(FastPart):
    """See the module's docstring.

    A thought is the cognition, keys and values [B, n, N, Dk] and their `valid` bool [B, N].
    """

    action_varies: torch.Tensor

    def __init__(
        self, config: FastInSlowConfig, backbone: Backbone, chunk: int, action_varies: torch.Tensor
    ) -> None:
        super().__init__()
        self.config, self.width, self.perception_size = config, backbone.width, backbone.perception_size
        self.cache_size, self.kept_tokens = backbone.cache_size, backbone.max_observation_tokens
        width = self.width
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.known = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.age = Age(config.staleness, width)
        self.tell = nn.Linear(width, chunk * len(action_varies)) if config.slow_weight else None
        self.register_buffer("action_varies", action_varies.clone(), persistent=False)

    def blank(self, batch: int) -> Memory:
        device, tokens = self.action_varies.device, self.kept_tokens
        cache = torch.zeros(batch, self.config.layers, tokens, self.cache_size, device=device)
        return {
            "cognition": torch.zeros(batch, self.width, device=device),
            "keys": cache,
            "values": cache.clone(),
            "valid": torch.zeros(batch, tokens, dtype=torch.bool, device=device),
        }

    def thought(self, features: Features) -> Memory:
        assert features.layers is not None
        kept = features.layers.padded(self.kept_tokens)
        padding = ~kept.valid[..., None, :, None]
        keys, values = (x.float().masked_fill(padding, 0) for x in (kept.keys, kept.values))
        return {"cognition": features.cognition.float(), "keys": keys, "values": values, "valid": kept.valid}

    def look(self, slow: Backbone, inputs: ModelInputs, thought: Memory, age: torch.Tensor) -> Features:
        embedded = slow.embed(inputs)
        tokens, valid = without_instruction(embedded)
        told = torch.stack([self.known(thought["cognition"]), self.age(age)], 1)
        tokens = torch.cat([told.to(tokens.dtype), self.enter(tokens)], 1)
        valid = torch.cat([valid.new_ones(len(valid), 2), valid], 1)
        keys, values = thought["keys"], thought["values"]
        past = LayerStates(keys.new_zeros(len(keys), 0, keys.shape[2], self.width), keys, values, thought["valid"])
        states = slow.last_layers(tokens, valid, past)
        last = states[torch.arange(len(states), device=states.device), valid.sum(-1) - 1]
        return Features(last, embedded.perception, embedded.proprio)

    def thinking_loss(self, features: Features, batch: StepBatch, due: torch.Tensor) -> torch.Tensor | None:
        if self.tell is None:
            return None
        told = self.tell(features.cognition).float().unflatten(-1, batch.actions.shape[-2:])
        weight = (batch.action_valid & due[..., None])[..., None] & self.action_varies
        return self.config.slow_weight * masked_mean((told - batch.actions).square(), weight)


def without_instruction(embedded: Embedded) -> tuple[torch.Tensor, torch.Tensor]:
    """The observation's tokens [B, M, D] without those of its instruction, in their order, padding last; and bool
    [B, M], False on that padding."""
    kept = embedded.valid & ~embedded.instruction
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(kept.sum(-1).max())]
    tokens = embedded.tokens.gather(1, order[..., None].expand(-1, -1, embedded.tokens.shape[-1]))
    return tokens, kept.gather(1, order)
