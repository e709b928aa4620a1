"""The choice of speeds: one for the whole model, or a slow part that thinks now and then and a fast one that acts.

The slow part is the backbone. What it last made of an observation, its *thought*, and the control step of that
observation stay in the episode's row of the memory. The fast part answers every call from the present observation,
the thought and the thought's age.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

import draccus
import torch

from ipvla.models.backbones import Backbone, BackboneConfig
from ipvla.models.features import Reads
from ipvla.models.heads import HeadConfig
from ipvla.models.memory import MemoryConfig, MemoryModule

#: Where a mechanism of `model.memory` may sit.
PLACES: Final = ("slow", "fast", "both")


@dataclass(frozen=True)
class SlowPace:
    """How often the slow part thinks in rollout, and how long that takes; what is None is the policy's own.

    Attributes:
        period: control steps from one thought to the next, at least 1; of the calls of the policy, the first one
            at or after that time thinks.
        deadline: control steps from the observation that a thought begins with to the first call that acts on it;
            0 for at once.
    """

    period: int | None = None
    deadline: int | None = None

    def __post_init__(self) -> None:
        if self.period is not None and self.period < 1:
            raise ValueError(f"slow.period is {self.period}; give control steps, at least 1")
        if self.deadline is not None and self.deadline < 0:
            raise ValueError(f"slow.deadline is {self.deadline}; give control steps, 0 or more")

    def __str__(self) -> str:
        """What a result says of it; empty if nothing is set."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Shown:
    """What observations show.

    Attributes:
        proprio_dim: P.
        num_views: V.
        image_size: side of a picture in pixels.
    """

    proprio_dim: int
    num_views: int = 1
    image_size: int = 64


@dataclass(frozen=True)
class SpeedsConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the forms of this folder."""

    @property
    def kind(self) -> str:
        """The name of the choice."""
        name: str = self.get_choice_name(type(self))
        return name

    @property
    def two(self) -> bool:
        """Is there a slow part and a fast one?"""
        return False

    def reads(self, num_layers: int) -> Reads:
        """The slow part's language layers whose states are kept."""
        return Reads()

    def check(self, backbone: BackboneConfig, memory: MemoryConfig, head: HeadConfig) -> None:
        """ValueError in one line for parts that do not fit each other."""

    def paced(self, pace: SlowPace) -> Self:
        """The same with these settings of rollout. ValueError for a model without a slow part, or a pace at which
        thoughts become older than the fast part knows them."""
        if not str(pace):
            return self
        raise ValueError(
            f"slow: {pace}, and the policy has no slow part, only one speed; leave it out, or train with "
            "model.speeds.type latent or fast_in_slow"
        )

    def build(
        self, memory: MemoryConfig, backbone: Backbone, shown: Shown, chunk: int, action_varies: torch.Tensor
    ) -> MemoryModule:
        """From the backbone to the head's features, whatever is remembered in between.

        Args:
            memory: the mechanism.
            chunk: C.
            action_varies: bool [A], False where the dataset is constant.
        """
        raise NotImplementedError


@SpeedsConfig.register_subclass("single")
@dataclass(frozen=True)
class SingleSpeedConfig(SpeedsConfig):
    """One speed: the whole model answers every call. Has no settings."""

    def build(
        self, memory: MemoryConfig, backbone: Backbone, shown: Shown, chunk: int, action_varies: torch.Tensor
    ) -> MemoryModule:
        return memory.build(backbone)


@dataclass(frozen=True)
class TwoSpeedsConfig(SpeedsConfig):
    """Of every form with a slow and a fast part.

    Attributes:
        period: control steps from one thought to the next in rollout; `slow.period` plays another.
        deadline: control steps until a thought is acted on; `slow.deadline` plays another.
        staleness: no thought is acted on that is so many control steps old: the slow part thinks at once, however
            long that takes. Training draws ages below it.
        memory: where the mechanism of `model.memory` sits: `slow`, `fast` or `both`, each with its own weights.
    """

    period: int = 8
    deadline: int = 0
    staleness: int = 16
    memory: str = "slow"

    def __post_init__(self) -> None:
        for name, least in (("period", 1), ("deadline", 0), ("staleness", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"model.speeds.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.memory not in PLACES:
            raise ValueError(f"model.speeds.memory is {self.memory!r}; choose one of {', '.join(PLACES)}")
        self._require_fresh()

    def _require_fresh(self) -> None:
        """ValueError if the pace lets a thought get older than the fast part knows them."""
        if self.period + self.deadline > self.staleness:
            late = f" and its deadline {self.deadline}" if self.deadline else ""
            raise ValueError(
                f"model.speeds.period is {self.period}{late}, and the fast part has learned from thoughts "
                f"less than model.speeds.staleness, {self.staleness} control steps, old; set the period to at "
                f"most {max(self.staleness - self.deadline, 1)}, or train with a larger staleness"
            )
        if self.deadline > self.period:
            raise ValueError(
                f"model.speeds.deadline is {self.deadline} and the period {self.period}: a thought would begin "
                "before the one before it has ended; set the deadline to at most the period"
            )

    @property
    def two(self) -> bool:
        return True

    def check(self, backbone: BackboneConfig, memory: MemoryConfig, head: HeadConfig) -> None:
        form = f"model.speeds.type {self.kind}"
        if head.reads:
            raise ValueError(
                f"{form}: the fast part has no language layers of its own, and model.head.type "
                f"{head.get_choice_name(type(head))} reads them; choose regression, bins or "
                "reverse_chain"
            )
        if memory.longest_plan:
            raise ValueError(
                f"{form}: model.memory.type {memory.get_choice_name(type(memory))} chooses by itself when it "
                "thinks; choose another memory, or model.speeds.type single"
            )
        if memory.feeds_backbone and self.memory != "slow":
            raise ValueError(
                f"model.speeds.memory is {self.memory}, and model.memory.type "
                f"{memory.get_choice_name(type(memory))} feeds language layers, which the slow part alone has; "
                "set it to slow"
            )

    def paced(self, pace: SlowPace) -> Self:
        given = {name: value for name, value in vars(pace).items() if value is not None}
        try:
            return replace(self, **given)
        except ValueError as error:
            raise ValueError(str(error).replace("model.speeds.", "slow.", 1)) from None
