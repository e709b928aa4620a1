"""IPVLA = backbone -> memory -> head: a policy that decides from what it sees and what it remembers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import draccus
import torch
from torch import nn

from ipvla.models.adapters import LoRAConfig, OSFConfig
from ipvla.models.auxiliary_losses import (
    PlanReadoutConfig,
    QuestionsConfig,
    ReasoningLossConfig,
)
from ipvla.models.backbones import Backbone, BackboneConfig, TinyConfig
from ipvla.models.features import Features
from ipvla.models.fusion import FusionConfig, NoFusionConfig
from ipvla.models.heads import HeadConfig, RegressionConfig
from ipvla.models.heads.protocol import Rest, draw_noise
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig
from ipvla.models.nf4 import NF4Config, quantised
from ipvla.models.speeds import Shown, SingleSpeedConfig, SlowPace, SpeedsConfig
from ipvla.types import Memory, ModelInputs, StepBatch

logger = logging.getLogger(__name__)

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
        nf4: the backbone's linear layers in 4 bits, frozen, or None.
        fusion: a choice by its `type`: how points of the pictures reach visual tokens.
        speeds: whether the whole model answers every call, or a slow part thinks now and then: a choice by `type`.
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
    nf4: NF4Config | None = None
    fusion: FusionConfig = field(default_factory=NoFusionConfig)
    speeds: SpeedsConfig = field(default_factory=SingleSpeedConfig)

    def __post_init__(self) -> None:
        if self.fusion.reads and self.head.insulates:
            raise ValueError(
                "model.head.detach lets no gradient through the backbone, and model.fusion learns through it; "
                "choose one of them"
            )
        if self.chunk < 1:
            raise ValueError(f"model.chunk is {self.chunk}; it must be at least 1")
        self.speeds.check(self.backbone, self.memory, self.head)
        if self.lora is not None and self.osf is not None:
            raise ValueError("model.lora and model.osf are both set; set one of them to null")
        if self.nf4 is not None and self.osf is not None:
            raise ValueError(
                "model.osf trains weights, and model.nf4 freezes them in 4 bits; set one of them to null"
            )
        if self.head.distils and self.adapted is not None:
            raise ValueError(
                "model.head.distil trains the head alone, and model.lora or model.osf adapts the backbone; set "
                "them to null"
            )
        if self.reasoning_loss is not None:
            others = {
                "model.plan_readout": self.plan_readout is not None,
                "model.memory.type prompt": self.memory.longest_plan > 0,
            }
            for other in (name for name, enabled in others.items() if enabled):
                raise ValueError(
                    f"model.reasoning_loss and {other} are both trained on a step's reasoning, at different "
                    "lengths; choose one of them"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as a saved policy has them: nothing of speeds where there is one, nor of no fusion."""
        values: dict[str, Any] = draccus.encode(self)
        for name, there in (("speeds", self.speeds.two), ("fusion", self.fusion.reads)):
            if not there:
                del values[name]
        return values

    def paced(self, pace: SlowPace) -> Self:
        """The same with these settings of rollout. ValueError for one speed, or too slow a pace."""
        return replace(self, speeds=self.speeds.paced(pace)) if str(pace) else self

    @property
    def adapted(self) -> LoRAConfig | OSFConfig | None:
        """Whichever of `lora` and `osf` is set."""
        return self.lora or self.osf

    def requires(self) -> dict[str, tuple[str, ...]]:
        """Step features of texts that training needs -> the settings that need them."""
        needed: dict[str, dict[str, object]] = {
            "reasoning": {
                "memory.type prompt": self.memory.longest_plan,
                "model.plan_readout": self.plan_readout,
                "model.reasoning_loss": self.reasoning_loss,
            },
            "question": {"model.questions": self.questions},
        }
        wrong = {path: tuple(name for name, value in by.items() if value) for path, by in needed.items()}
        return {path: settings for path, settings in wrong.items() if settings}

    def check(self, instructions: Sequence[str] = (), num_views: int = 1) -> None:
        """What can be known before anything is built, for these tasks in words and so many cameras.

        Raises:
            ValueError: parts do not fit each other, a prompt is too long, or the backbone's weights are none.
        """
        self.memory.check()
        self.head.check(self.chunk)
        longest = self.memory.longest_plan
        if self.plan_readout is not None and 0 < longest < self.plan_readout.tokens:
            raise ValueError(
                f"model.plan_readout.tokens {self.plan_readout.tokens} exceeds memory.plan_tokens "
                f"{longest}: the plan in the prompt would be cut; raise the latter"
            )
        self.backbone.check(instructions, num_views)
        if self.reasoning_loss is not None and (limits := self.backbone.text_limits) is not None:
            self.reasoning_loss.check(*limits)

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
            ValueError: backbone or head of `start` have other sizes, the head reads layers the backbone lacks,
                or `check` finds something.
        """
        self.check(num_views=num_views)
        backbone = self.backbone.build(proprio_dim, num_views, image_size)
        model = IPVLA(self, backbone, Shown(proprio_dim, num_views, image_size), action_varies)
        if self.fusion.reads:
            self._fuse(backbone, num_views)
        if start is not None:
            if self.nf4 is not None and quantised(start.backbone):
                self.nf4.apply(backbone)  # places for the same bits
            model.start_from(start)
            if self.head.distils:
                model.requires_grad_(False)
                model.head.requires_grad_(True)
        if self.nf4 is not None:
            self.nf4.apply(backbone)
        if self.adapted is not None:
            self.adapted.apply(backbone)
            if self.adapted.freeze_rest:
                for part in (model.memory, model.head, model.plan_readout, backbone.fusion):
                    if part is not None:
                        part.requires_grad_(False)
        return model

    def _fuse(self, backbone: Backbone, num_views: int) -> None:
        """Gives it the fusion, last and aside, so that all other weights are drawn as without."""
        patches = backbone.patches(num_views)
        if patches is None:
            kind = self.backbone.get_choice_name(type(self.backbone))
            raise ValueError(
                f"model.fusion has no square grid of visual tokens to act on in model.backbone.type {kind}; "
                "set its type to none, or choose another backbone"
            )
        with torch.random.fork_rng(devices=[]):
            backbone.fusion = self.fusion.build(patches[1])


class IPVLA(nn.Module):
    """See the module's docstring. Constant action dimensions carry no loss: data/transforms emits them exactly.

    Attributes:
        terms: parts of the latest `loss` for the log, detached and unweighted.
    """

    action_varies: torch.Tensor

    def __init__(self, config: IPVLAConfig, backbone: Backbone, shown: Shown, action_varies: torch.Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        reads = config.speeds.reads(backbone.num_layers) if config.speeds.two else config.head.reads
        backbone.reads = reads.of(backbone.num_layers)
        backbone.insulated = config.head.insulates
        self.memory = config.speeds.build(config.memory, backbone, shown, config.chunk, action_varies)
        if backbone.insulated and self.memory.feeds_backbone:
            raise ValueError(
                "model.head.detach lets no gradient through the backbone, and model.memory.type "
                f"{config.memory.get_choice_name(type(config.memory))} learns through it; choose one of them"
            )
        seen = self.memory.seen_through(backbone)
        self.head = config.head.build(seen, shown.proprio_dim, config.chunk, len(action_varies))
        self.head.set_varies(action_varies)
        readout, questions, words = config.plan_readout, config.questions, config.reasoning_loss
        self.plan_readout = None if readout is None else readout.build(seen.width, backbone.vocabulary)
        self.questions = None if questions is None else questions.build()
        self.reasoning_loss = None if words is None else words.build(backbone)
        self.terms: dict[str, torch.Tensor] = {}
        self.register_buffer("action_varies", action_varies.clone())

    def calibrate(self, mean_image: torch.Tensor) -> None:
        """Told the training data's mean image, as `Backbone.calibrate` is."""
        self.backbone.calibrate(mean_image)
        if (seen := self.memory.seen_through(self.backbone)) is not self.backbone:
            seen.calibrate(mean_image)

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
        features = self._for_head(features.map(lambda x: x.flatten(0, 1)))
        noise = None
        if self.head.loss_noise_shape is not None:
            noise = self._noise(batch.noise_seed.flatten().tolist(), self.head.loss_noise_shape)
        loss = self.head.loss(features, batch.actions.flatten(0, 1), weight, noise)
        if memory_loss is not None:
            loss = loss + memory_loss
        if self.plan_readout is not None:
            loss = loss + self.plan_readout.loss(features.cognition, batch.plan.flatten(0, 1))
        if self.questions is not None:
            loss = loss + self.questions.loss(self.backbone, batch)
        self.terms = dict(self.head.terms)
        words = None if self.reasoning_loss is None else self.reasoning_loss.loss(self.backbone, batch)
        if self.reasoning_loss is not None and words is not None:
            self.terms["reasoning_loss"] = words.detach()
            loss = loss + self.reasoning_loss.config.weight * words
        return loss, memory

    @torch.no_grad()
    def act(
        self,
        inputs: ModelInputs,
        memory: Memory,
        t: torch.Tensor,
        noise_seeds: Sequence[int] | None = None,
        rest: Rest | None = None,
    ) -> tuple[torch.Tensor, Memory]:
        """One policy step of inputs [B, ...] at control steps t int64 [B]: normalised chunk, memory.

        Args:
            noise_seeds: B seeds in [0, 2^63), for a head that takes noise; None for the same noise in every row.
            rest: what the chunks go on from; None for nothing.

        ValueError for a head that cannot go on from the rest.
        """
        features, memory = self.memory.observe(self.backbone, inputs, memory, t)
        return self.sample(features, noise_seeds, rest), memory

    def sample(
        self, features: Features, noise_seeds: Sequence[int] | None = None, rest: Rest | None = None
    ) -> torch.Tensor:
        """The head's chunks float32 [B, C, A] of features [B, ...]; seeds, rest and errors as in `act`."""
        seeds = [0] * len(features.cognition) if noise_seeds is None else noise_seeds
        features, noise = self._for_head(features), self._noise(seeds, self.head.noise_shape)
        return self.head.sample(features, noise) if rest is None else self.head.resume(features, noise, rest)

    def _for_head(self, features: Features) -> Features:
        return replace(features, language=self.backbone) if self.backbone.reads.language else features

    def expected(self, features: Features) -> torch.Tensor:
        """As `sample`, differentiable (`Head.expected`)."""
        return self.head.expected(
            self._for_head(features), self._noise([0] * len(features.cognition), self.head.noise_shape)
        )

    def _noise(self, seeds: Sequence[int], shape: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if shape is None else draw_noise(seeds, shape).to(self.action_varies.device)

    def start_from(self, start: IPVLA) -> None:
        """Takes over the weights of backbone and head; of memory and plan readout, if they are the same there.

        Another memory begins closed, if it can: at first the model acts as `start` does without one. So does
        fusion where `start` has none.

        Raises:
            ValueError: backbone or head of `start` have other sizes.
        """
        for name in ("backbone", "head"):
            own, started = _shapes(getattr(self, name)), _shapes(getattr(start, name))
            if name == "backbone" and start.backbone.fusion is None:  # its gate is closed at first
                own = {n: shape for n, shape in own.items() if not n.startswith("fusion.")}
            wrong = sorted(n for n in own.keys() | started.keys() if own.get(n) != started.get(n))
            if wrong:
                raise ValueError(
                    f"start_from: its {name} differs in {len(wrong)} tensors; {wrong[0]} is "
                    f"{started.get(wrong[0], 'absent')} there and {own.get(wrong[0], 'absent')} here; "
                    f"give model.{name} the sizes that it had there"
                )
        for name in ("backbone", "head", "memory", "plan_readout"):
            part, other = getattr(self, name), getattr(start, name)
            if name == "backbone" or (part is not None and other is not None and _shapes(part) == _shapes(other)):
                adopt(part, other.state_dict())
            elif name == "memory" and not self.memory.close():
                logger.warning(
                    "model.memory: this memory cannot begin closed: until it is trained, the policy acts "
                    "otherwise than the one in start_from"
                )
        self.head.learn_from(start.head)


def adopt(part: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies these weights into the part; where its own are not there yet (device `meta`), they become its own."""
    trained = {name: parameter.requires_grad for name, parameter in part.named_parameters()}
    absent = {name: value.dtype for name, value in part.state_dict().items() if value.is_meta}
    given = {name: weights[name].to(dtype) for name, dtype in absent.items() if name in weights}
    part.load_state_dict({name: x for name, x in weights.items() if name not in absent}, strict=False)
    part.load_state_dict(given, strict=False, assign=True)
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(trained[name])


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in part.state_dict().items()}


def fresh_parts(own: Mapping[str, torch.Size], start: Mapping[str, torch.Size]) -> set[str]:
    """Parts (memory, plan_readout) of a model that `start_from` leaves as they were drawn.

    Args:
        own, start: shapes of the weights of the model and of the policy that it starts from, by name.
    """
    parts = {name.partition(".")[0] for name in own} - {"backbone", "head"}

    def inside(part: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        return {name: shape for name, shape in shapes.items() if name.startswith(f"{part}.")}

    return {part for part in parts if inside(part, own) != inside(part, start)}
