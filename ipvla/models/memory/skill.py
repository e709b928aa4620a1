"""A library of skill embeddings, learned across episodes and looked up by instruction and context.

The library is N keys k_i [a] and values v_i [D]: parameters, trained with the policy, saved with its checkpoint
and never written in rollout, so its size is N whatever is played. At an episode's first policy step the cognition
z, which holds the instruction and the first view, asks for the few that fit:

    q = W_q norm(z),  s_i = q . k_i / sqrt(a),  skill = sum over the top k of softmax(s)_i v_i
    z' = z + W_o skill                                     at each step, with the skill that the memory holds

The softmax runs over the chosen k only, so gradients move the keys and values that were chosen, and the query.
With `refresh` = n the skill is looked up anew every n policy steps. The idea of learned keys and values for what
recurs across tasks is that of prompt pools (L2P, arXiv 2112.08654).

This is no memory of an episode's events: what happened after the (last) look-up cannot act through it, so on a
task whose cue comes later it is no better than none. Nothing balances the load over the library.

Memory: skill float32 [B, D], count int64 [B], the episode's policy steps so far (0: nothing looked up yet).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule, Segments, silence
from ipvla.types import Memory


@MemoryConfig.register_subclass("skill")
@dataclass(frozen=True)
class SkillMemoryConfig(MemoryConfig):
    """Sizes of the library.

    Attributes:
        slots: N, skills in the library.
        top_k: skills that one look-up mixes, at most `slots`.
        key: a, size of a key.
        refresh: policy steps from one look-up to the next; 0 looks up once an episode.
    """

    slots: int = 320
    top_k: int = 8
    key: int = 128
    refresh: int = 0

    def __post_init__(self) -> None:
        for name in ("slots", "top_k", "key"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.slots:
            raise ValueError(f"memory.top_k is {self.top_k}; it must be at most memory.slots, {self.slots}")
        if self.refresh < 0:
            raise ValueError(f"memory.refresh is {self.refresh}; it must be 0 (never) or a number of policy steps")

    def build(self, backbone: Backbone) -> SkillMemory:
        return SkillMemory(self, backbone.width)


class SkillMemory(MemoryModule):
    """See the module's docstring."""

    def __init__(self, config: SkillMemoryConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, config.key)
        self.keys = nn.Parameter(torch.randn(config.slots, config.key))
        self.values = nn.Parameter(torch.randn(config.slots, width) * 0.02)  # almost silent at first
        self.out = nn.Linear(width, width)

    def initial(self, batch: int) -> Memory:
        return {
            "skill": self.values.new_zeros(batch, self.values.shape[1], dtype=torch.float32),
            "count": torch.zeros(batch, dtype=torch.long, device=self.values.device),
        }

    def close(self) -> bool:
        silence(self.out)
        return True

    def step(self, features: Features, memory: Memory, t: torch.Tensor) -> tuple[Features, Memory]:
        count = memory["count"]
        skill = torch.where(self._due(count)[:, None], self._look_up(features.cognition), memory["skill"])
        return self._with(features, skill), {"skill": skill, "count": count + 1}

    def scan(
        self, features: Features, memory: Memory, t: torch.Tensor, is_first: torch.Tensor, valid: torch.Tensor
    ) -> tuple[Features, Memory]:
        """The whole window at once: each step takes the skill of the last look-up before it."""
        at = Segments.of(memory["count"], is_first, valid)
        due, place = self._due(at.step), torch.arange(valid.shape[1], device=t.device)
        latest = torch.where(due & valid, place, -1).cummax(1).values
        # place 0 is the skill that the memory came with
        skills = torch.cat([memory["skill"][:, None], self._look_up(features.cognition)], 1)
        source = torch.where(due, place, latest) + 1
        skill = skills.gather(1, source[..., None].expand(-1, -1, skills.shape[-1]))
        last = skills.gather(1, (latest[:, -1:] + 1)[..., None].expand(-1, -1, skills.shape[-1]))
        return self._with(features, skill), {"skill": last[:, 0], "count": at.after}

    def _due(self, step: torch.Tensor) -> torch.Tensor:
        """bool: whether the policy steps that an episode has behind it call for a look-up."""
        return step == 0 if self.config.refresh == 0 else step % self.config.refresh == 0

    def _look_up(self, cognition: torch.Tensor) -> torch.Tensor:
        """float32 [..., D]: the skill that cognition [..., D] asks for."""
        with torch.autocast(cognition.device.type, enabled=False):  # what is remembered stays float32
            score = self.query(self.norm(cognition.float())) @ self.keys.T * self.config.key**-0.5
            best = score.topk(self.config.top_k)
            skill: torch.Tensor = (best.values.softmax(-1)[..., None] * self.values[best.indices]).sum(-2)
            return skill

    def _with(self, features: Features, skill: torch.Tensor) -> Features:
        return features.with_cognition(features.cognition + self.out(skill))
