"""IPVLA = backbone -> memory -> head: a policy that decides from what it sees and what it remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from ipvla.models.backbones import Backbone, BackboneConfig, TinyConfig
from ipvla.models.heads import Head, HeadConfig, RegressionConfig
from ipvla.models.lora import LoRAConfig
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig, MemoryModule, PromptMemoryConfig
from ipvla.models.osf import OSFConfig
from ipvla.models.plan_readout import PlanReadout, PlanReadoutConfig
from ipvla.models.questions import Questions, QuestionsConfig
from ipvla.models.reasoning_loss import ReasoningLoss, ReasoningLossConfig
from ipvla.types import Memory, ModelInputs, StepBatch

T = TypeVar("T")


@dataclass(frozen=True)
class IPVLAConfig:
    """The model; `chunk` is C, the number of actions predicted per policy step.

    Attributes:
        backbone, memory, head: each a choice by its `type`.
        lora: adapters on the backbone, or None to train every weight.
        chunk: C, at least 1.
        plan_readout: an auxiliary loss on datasets with reasoning, or None for the actions' loss alone.
        questions: an auxiliary loss on datasets with questions, or None for none asked.
        reasoning_loss: an auxiliary loss on datasets with reasoning, the words themselves; or None.
        osf: instead of `lora`, training orthogonal to the backbone's large singular directions.
    """

    backbone: BackboneConfig = field(default_factory=TinyConfig)
    memory: MemoryConfig = field(default_factory=GRUMemoryConfig)
    head: HeadConfig = field(default_factory=RegressionConfig)
    lora: LoRAConfig | None = None
    chunk: int = 8
    plan_readout: PlanReadoutConfig | None = None
    questions: QuestionsConfig | None = None
    osf: OSFConfig | None = None
    reasoning_loss: ReasoningLossConfig | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"model.chunk is {self.chunk}; it must be at least 1")
        if self.lora is not None and self.osf is not None:
            raise ValueError("model.lora and model.osf are both set; set one of them to null")
        if self.reasoning_loss is not None:
            others = {
                "model.plan_readout": self.plan_readout is not None,
                "model.memory.type prompt": isinstance(self.memory, PromptMemoryConfig),
            }
            for other in (name for name, found in others.items() if found):
                raise ValueError(
                    f"model.reasoning_loss and {other} are both trained on a step's reasoning, at different "
                    "lengths; choose one of them"
                )

    @property
    def adapted(self) -> LoRAConfig | OSFConfig | None:
        """Whichever of `lora` and `osf` is set."""
        return self.lora or self.osf

    def build(
        self,
        action_varies: torch.Tensor,
        proprio_dim: int,
        num_views: int = 1,
        image_size: int = 64,
        start: IPVLA | None = None,
    ) -> IPVLA:
        """The model for data of these sizes; `action_varies` bool [A] is False where the dataset is constant.

        With `start` it begins with that model's weights (`IPVLA.start_from`); adapters are put on afterwards.

        Raises:
            ValueError: backbone or head of `start` have other sizes, or the plan readout reads more than a plan.
        """
        backbone = self.backbone.build(proprio_dim, num_views, image_size)
        memory = self.memory.build(backbone)
        head = self.head.build(
            backbone.width, backbone.perception_size, proprio_dim, self.chunk, len(action_varies)
        )
        readout = None
        if self.plan_readout is not None:
            readout = self.plan_readout.build(backbone.width, backbone.vocabulary)
            if 0 < memory.plan_tokens < self.plan_readout.tokens:
                raise ValueError(
                    f"model.plan_readout.tokens {self.plan_readout.tokens} exceeds memory.plan_tokens "
                    f"{memory.plan_tokens}: the plan in the prompt would be cut; raise the latter"
                )
        questions = None if self.questions is None else self.questions.build()
        words = None if self.reasoning_loss is None else self.reasoning_loss.build(backbone)
        model = IPVLA(backbone, memory, head, action_varies, readout, questions, words)
        if start is not None:
            model.start_from(start)
        if self.adapted is not None:
            self.adapted.apply(backbone)
            if self.adapted.freeze_rest:
                for part in (memory, head, *([readout] if readout else [])):
                    part.requires_grad_(False)
        return model


class IPVLA(nn.Module):
    """See the module's docstring. Constant action dimensions carry no loss: data/transforms emits them exactly.

    Attributes:
        terms: parts of the latest `loss` for the log, detached and unweighted.
    """

    action_varies: torch.Tensor

    def __init__(
        self,
        backbone: Backbone,
        memory: MemoryModule,
        head: Head,
        action_varies: torch.Tensor,
        plan_readout: PlanReadout | None = None,
        questions: Questions | None = None,
        reasoning_loss: ReasoningLoss | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.head = head
        self.plan_readout = plan_readout
        self.questions = questions
        self.reasoning_loss = reasoning_loss
        self.terms: dict[str, torch.Tensor] = {}
        self.register_buffer("action_varies", action_varies.clone())

    @property
    def plan_tokens(self) -> int:
        """Lp, tokens of the plans that training batches must carry; 0 for none."""
        readers = (self.plan_readout, self.reasoning_loss)
        return max(self.memory.plan_tokens, *(reader.config.tokens if reader else 0 for reader in readers))

    def tokenize_plan(self, text: str) -> list[int]:
        """A plan's tokens, without padding."""
        if self.reasoning_loss is not None:
            return self.reasoning_loss.tokenize(self.backbone, text)
        return self.backbone.tokenize_text(text)

    @property
    def question_tokens(self) -> int:
        """Lq, tokens of the questions that training batches must carry; 0 for none."""
        return self.backbone.max_prompt_tokens if self.questions else 0

    @property
    def answer_tokens(self) -> int:
        """La, tokens of the answers to them."""
        return self.questions.config.tokens if self.questions else 0

    def initial_memory(self, batch: int) -> Memory:
        """The memory of `batch` episodes that have not begun, on the model's device."""
        return {name: value.to(self.action_varies.device) for name, value in self.memory.initial(batch).items()}

    def forward(self, batch: StepBatch, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """`loss`, under the name that distributed wrappers call."""
        return self.loss(batch, memory)

    def whole(self, function: Callable[[], T]) -> T:
        """What `function` returns, which may call any part of the model.

        Where weights are sharded, each part of the model has its own in full meanwhile. To differentiate what it
        returns it must be tensors, or tuples, lists or dicts of them.
        """
        return function()

    def loss(self, batch: StepBatch, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """The loss of one window [B, K, ...] and the memory [B, ...] after it, still in the graph."""
        features, memory, memory_loss = self.memory.window(self.backbone, batch, memory)
        weight = batch.action_valid & batch.valid[..., None]
        weight = weight.flatten(0, 1)[..., None] & self.action_varies
        features = features.map(lambda x: x.flatten(0, 1))
        loss = self.head.loss(features, batch.actions.flatten(0, 1), weight)
        if memory_loss is not None:
            loss = loss + memory_loss
        if self.plan_readout is not None:
            loss = loss + self.plan_readout.loss(features.cognition, batch.plan.flatten(0, 1))
        if self.questions is not None:
            loss = loss + self.questions.loss(self.backbone, batch)
        self.terms = {}
        if (
            self.reasoning_loss is not None
            and (words := self.reasoning_loss.loss(self.backbone, batch)) is not None
        ):
            self.terms["reasoning_loss"] = words.detach()
            loss = loss + self.reasoning_loss.config.weight * words
        return loss, memory

    @torch.no_grad()
    def act(self, inputs: ModelInputs, memory: Memory, t: torch.Tensor) -> tuple[torch.Tensor, Memory]:
        """One policy step of inputs [B, ...] at control steps t int64 [B]: normalised chunk, memory."""
        features, memory = self.memory.observe(self.backbone, inputs, memory, t)
        return self.head.sample(features), memory

    def start_from(self, start: IPVLA) -> None:
        """Takes over the weights of backbone and head; of memory and plan readout, if they are the same there.

        Raises:
            ValueError: backbone or head of `start` have other sizes.
        """
        for name in ("backbone", "head"):
            ours, theirs = _shapes(getattr(self, name)), _shapes(getattr(start, name))
            wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            if wrong:
                raise ValueError(
                    f"start_from: its {name} differs in {len(wrong)} tensors; {wrong[0]} is "
                    f"{theirs.get(wrong[0], 'absent')} there and {ours.get(wrong[0], 'absent')} here; "
                    f"give model.{name} the sizes that it had there"
                )
        for name in ("backbone", "head", "memory", "plan_readout"):
            part, other = getattr(self, name), getattr(start, name)
            if part is not None and other is not None and _shapes(part) == _shapes(other):
                part.load_state_dict(other.state_dict())


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in part.state_dict().items()}


def fresh_parts(ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size]) -> set[str]:
    """Parts (memory, plan_readout) of a model that `start_from` leaves as they were drawn.

    Args:
        ours, theirs: shapes of the weights of the model and of what it starts from, by name.
    """
    parts = {name.partition(".")[0] for name in ours} - {"backbone", "head"}

    def inside(part: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        return {name: shape for name, shape in shapes.items() if name.startswith(f"{part}.")}

    return {part for part in parts if inside(part, ours) != inside(part, theirs)}
