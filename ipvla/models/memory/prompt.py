"""The plan in text, stored in the prompt: reasoning once and acting on it many times.

The model writes a plan of ECoT tags (Zawalski et al., arXiv 2407.08693) when an episode starts, and acts on the
prompt `instruction, plan`. At every step a trigger, p = sigmoid(w . cognition + b), decides from the same pass
whether the plan still holds. Only if it does not (a sub-goal is reached, the scene has shown something new) or is
`refresh` steps old is it written anew, from the old plan and the present picture, and the step is decided with the
new one.

Training is teacher-forced on plan labels y_k, so that a window needs no recurrence:

    action loss on (observation_k, y_k)
    + cross-entropy of y_k given (observation_k, y_{k-1}), where y_k != y_{k-1} and on a share of the other steps
    + trigger: 1 on (observation_k, y_{k-1}) where y_k != y_{k-1}; 0 on (observation_k, y_k)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.memory.protocol import MemoryConfig, MemoryModule
from ipvla.reasoning import ReasoningError, parse
from ipvla.types import NO_TOKEN, Memory, ModelInputs, StepBatch

#: Of the steps at which the plan stays, one in so many is trained to write the same plan again.
_REHEARSED = 8


@MemoryConfig.register_subclass("prompt")
@dataclass(frozen=True)
class PromptMemoryConfig(MemoryConfig):
    """How plans are written and renewed.

    Attributes:
        plan_tokens: longest plan, in the backbone's tokens.
        refresh: policy steps after which a plan is written anew at the latest; 0 leaves it to the trigger, 1
            reasons at every step.
        weight: of the plan's loss beside the action's.
    """

    plan_tokens: int = 24
    refresh: int = 0
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.plan_tokens < 1:
            raise ValueError(f"memory.plan_tokens is {self.plan_tokens}; it must be at least 1")
        if self.refresh < 0:
            raise ValueError(f"memory.refresh is {self.refresh}; it must be 0 (never) or a number of policy steps")
        if self.weight <= 0:
            raise ValueError(f"memory.weight is {self.weight}; it must be above 0, or no plan is learned")

    @property
    def feeds_backbone(self) -> bool:
        return True

    @property
    def shards(self) -> bool:
        return False

    @property
    def longest_plan(self) -> int:
        return self.plan_tokens

    def build(self, backbone: Backbone) -> PromptMemory:
        return PromptMemory(self, backbone.width)


class PromptMemory(MemoryModule):
    """See the module's docstring.

    State, int64: `plan` [B, Lp], NO_TOKEN past its end; `age` [B], policy steps since it was written, -1 before
    the first; `written` [B], tokens written in the episode so far; `refused` [B], plans that did not parse and so
    were not taken.
    """

    feeds_backbone = True

    def __init__(self, config: PromptMemoryConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.plan_tokens = config.plan_tokens
        self.trigger = nn.Linear(width, 1)

    def initial(self, batch: int) -> Memory:
        def full(value: int, *shape: int) -> torch.Tensor:
            return torch.full((batch, *shape), value, device=self.trigger.weight.device)

        return {"plan": full(NO_TOKEN, self.plan_tokens), "age": full(-1), "written": full(0), "refused": full(0)}

    def observe(
        self, backbone: Backbone, inputs: ModelInputs, memory: Memory, t: torch.Tensor
    ) -> tuple[Features, Memory]:
        features = backbone(with_plan(inputs, memory["plan"])).features
        due = (memory["age"] < 0) | (self._due(features) > 0)
        if self.config.refresh:
            due |= memory["age"] + 1 >= self.config.refresh
        memory = {**memory, "age": memory["age"] + 1}
        if due.any():
            rows = due.nonzero()[:, 0]
            some = inputs.map(lambda x: x[rows])
            new = self._rewrite(backbone, some, {name: value[rows] for name, value in memory.items()})
            memory = {name: value.index_copy(0, rows, new[name]) for name, value in memory.items()}
            renewed = backbone(with_plan(some, new["plan"])).features
            features = features.with_rows(rows, renewed)
        return features, memory

    def window(
        self, backbone: Backbone, batch: StepBatch, memory: Memory
    ) -> tuple[Features, Memory, torch.Tensor | None]:
        shape = batch.is_first.shape
        inputs, plan, last = batch.inputs.flatten(), batch.plan.flatten(0, 1), batch.last_plan.flatten(0, 1)
        valid = batch.valid.flatten()
        if valid.any() and not (plan[valid] != NO_TOKEN).any():
            raise ValueError(
                "memory.type is prompt, but these episodes carry no plans (step feature `reasoning`); "
                "collect the dataset again, or choose another memory"
            )
        features = backbone(with_plan(inputs, plan)).features
        changed = (plan != last).any(-1) & valid
        rehearsed = (batch.t + batch.episode_key).flatten() % _REHEARSED == 0
        stays = self._due(features)[valid]
        loss = F.binary_cross_entropy_with_logits(stays, torch.zeros_like(stays)) if len(stays) else stays.sum()
        if changed.any():
            before = with_plan(inputs.map(lambda x: x[changed]), last[changed])
            due = self._due(backbone(before).features)
            loss = loss + F.binary_cross_entropy_with_logits(due, torch.ones_like(due))
            taught = changed | (rehearsed & valid)
            asked = with_plan(inputs.map(lambda x: x[taught]), last[taught])
            loss = loss + backbone.write_loss(asked, plan[taught])
        last_valid = torch.where(batch.valid[:, -1:], batch.plan[:, -1], memory["plan"])
        memory = {**memory, "plan": last_valid, "age": torch.zeros_like(memory["age"])}
        return features.map(lambda x: x.reshape(*shape, *x.shape[1:])), memory, self.config.weight * loss

    def _due(self, features: Features) -> torch.Tensor:
        """Logits [B] that the plan no longer holds."""
        logits: torch.Tensor = self.trigger(features.cognition)[:, 0].float()
        return logits

    def _rewrite(self, backbone: Backbone, inputs: ModelInputs, memory: Memory) -> Memory:
        """A new plan for every row, where it parses."""
        written = backbone.write(with_plan(inputs, memory["plan"]), self.plan_tokens)
        taken = torch.tensor([_is_plan(backbone.detokenize(ids)) for ids in written.tolist()]).to(written.device)
        return {
            "plan": torch.where(taken[:, None], written, memory["plan"]),
            "age": torch.zeros_like(memory["age"]),
            "written": memory["written"] + (written != NO_TOKEN).sum(-1),
            "refused": memory["refused"] + ~taken,
        }


def with_plan(inputs: ModelInputs, plan: torch.Tensor) -> ModelInputs:
    """The same observations with `plan` int64 [B, Lp], NO_TOKEN past its end, put in the prompt before its last
    token."""
    length, place = (
        inputs.input_ids.shape[1],
        torch.arange(inputs.input_ids.shape[1] + plan.shape[1], device=plan.device),
    )
    end = inputs.attention_mask.sum(-1, keepdim=True) - 1
    size = (plan != NO_TOKEN).sum(-1, keepdim=True)
    source = torch.where(place < end, place, length + place - end)
    source = torch.where(place == end + size, end, source)
    mask = place <= end + size
    ids = torch.cat([inputs.input_ids, plan], 1).gather(1, source.clamp(max=length + plan.shape[1] - 1))
    return replace(inputs, input_ids=ids.masked_fill(~mask, 0), attention_mask=mask)


def _is_plan(text: str) -> bool:
    try:
        return "PLAN" in parse(text)
    except ReasoningError:
        return False
