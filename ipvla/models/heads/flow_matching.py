"""Flow matching (Lipman et al., arXiv 2210.02747): what heads share that learn a velocity and integrate it.

    x_t = (1 - t) z + t a,   z standard normal, t in [0, 1]
    loss = mean (v(x_t, t) - (a - z))^2,   chunk = z + integral of v from 0 to 1

Dimensions that are constant in the dataset are 0 in z, a and v, and carry no loss. `steps` and `integrator` are
settings of rollout: they have no part in the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

import torch
from torch import nn

from ipvla.choices import did_you_mean
from ipvla.models.backbones import Backbone
from ipvla.models.features import Features
from ipvla.models.heads.guidance import resumed, usable
from ipvla.models.heads.integrators import INTEGRATORS, integrate, require_integrator
from ipvla.models.heads.protocol import (
    Glimpse,
    GlimpseHeadConfig,
    Head,
    HeadConfig,
    Rest,
    Sampling,
    masked_mean,
)
from ipvla.models.heads.quality import QualityConfig
from ipvla.models.heads.routing import Routes

#: Name -> t of a standard normal draw. `beta` has pi0's density (arXiv 2410.24164), most of it near the noise:
#: t = 0.999 (1 - y), y ~ Beta(1.5, 1).
TIMES: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "uniform": torch.special.ndtr,
    "logit_normal": torch.sigmoid,
    "beta": lambda drawn: 0.999 * (1 - torch.special.ndtr(drawn) ** (2 / 3)),
}
DISTILLATIONS: Final = ("regression", "reflow")


class IntegratingConfig(HeadConfig):
    """Of any head that integrates a velocity, with these three among its settings."""

    steps: int
    integrator: str
    prefix: int

    @property
    def has_velocity(self) -> bool:
        return True

    @property
    def longest_prefix(self) -> int:
        return self.prefix

    def check(self, chunk: int) -> None:
        if not 0 <= self.prefix < chunk:
            raise ValueError(
                f"head.prefix is {self.prefix}, and model.chunk {chunk}; set it to 0 for none, or to the longest "
                f"latency in control steps, at most {chunk - 1}"
            )

    @property
    def evaluations(self) -> int:
        """Of the velocity, per chunk."""
        return self.steps * INTEGRATORS[self.integrator].evaluations

    def sampled(self, sampling: Sampling) -> Self:
        return replace(self, **{name: value for name, value in vars(sampling).items() if value is not None})

    def describe(self) -> dict[str, str]:
        return {name: str(getattr(self, name)) for name in ("steps", "integrator", "evaluations")}


@dataclass(frozen=True)
class FlowMatchingConfig(IntegratingConfig, GlimpseHeadConfig):
    """Of a head that integrates a velocity; `hidden` is its width.

    Attributes:
        steps, integrator: from noise to a chunk in rollout; `evaluate` and `serve` take others as well.
        time: how training draws t: uniform, logit_normal, or beta.
        draws: pairs (z, t) per observation in training: the backbone runs once for all of them.
        quality: further terms of the loss, on the chunk that one step from x_t to t = 1 gives; null for none.
        distil: learn from the head of the policy in `start_from`, with its own steps and integrator, instead of
            from demonstrations: `regression` on the chunk that it makes of the same noise, for one step (RDT2,
            arXiv 2602.03310, equation 5: `steps` must be 1), or `reflow`, on straight lines from the noise to that
            chunk (Liu et al., arXiv 2209.03003). Only the head is trained. null for demonstrations.
        detach: actions send no gradient into the backbone (knowledge insulation, arXiv 2505.23705); what it
            learns it learns from words. Memory learns, if it stands behind the backbone.
        prefix: training gives the first 0 to so many actions of a chunk, as many as are drawn, and the head learns
            to go on from them (arXiv 2512.05964): their t is 1, and they carry no loss. It can then be played by
            `success.chunking.type trained`. 0 for none.
    """

    steps: int = 4
    integrator: str = "euler"
    time: str = "uniform"
    draws: int = 1
    quality: QualityConfig | None = None
    distil: str | None = None
    detach: bool = False
    prefix: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integrator(self.steps, self.integrator, "head")
        if self.time not in TIMES:
            raise ValueError(f"head.time: {self.time!r} is unknown; {did_you_mean(self.time, TIMES)}")
        if self.draws < 1:
            raise ValueError(f"head.draws is {self.draws}; it must be at least 1")
        if self.distil is not None and self.distil not in DISTILLATIONS:
            raise ValueError(
                f"head.distil: {self.distil!r} is unknown; {did_you_mean(self.distil, DISTILLATIONS)}"
            )
        if self.distil is not None and self.prefix:
            raise ValueError(
                "head.distil learns whole chunks, and head.prefix is set; set one of them to null or 0"
            )
        if self.distil == "regression" and (self.steps, self.integrator) != (1, "euler"):
            raise ValueError(
                f"head.distil regression trains one Euler step, and head.steps is {self.steps}, head.integrator "
                f"{self.integrator}; set them to 1 and euler, or head.distil to reflow"
            )

    def check(self, chunk: int) -> None:
        super().check(chunk)
        if self.quality is not None:
            self.quality.check(chunk)

    @property
    def distils(self) -> bool:
        return self.distil is not None

    @property
    def insulates(self) -> bool:
        return self.detach

    def sampled(self, sampling: Sampling) -> Self:
        return replace(super().sampled(sampling), distil=None) if str(sampling) else self


@dataclass(frozen=True)
class Conditions:
    """What a velocity depends on beside x and t: computed once per chunk, whatever the number of evaluations.

    Attributes:
        vector: [B, H].
        pairs: of each block keys and values [B, key heads, N, size of a head]; None for a block that reads none.
        readable: bool [B, 1, 1, N], False on padding.
        routes: of a head that chooses among layers.
    """

    vector: torch.Tensor
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]
    readable: torch.Tensor
    routes: Routes | None = None

    def repeated(self, times: int) -> Conditions:
        """Each row `times` times."""
        return self if times == 1 else self.mapped(lambda x: x.repeat_interleave(times, 0))

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Conditions:
        """`function` of each tensor that the velocity reads."""
        pairs = [pair and (function(pair[0]), function(pair[1])) for pair in self.pairs]
        return Conditions(function(self.vector), pairs, function(self.readable))


class FlowMatchingHead(Head):
    """A subclass computes `conditions` of features, and `velocity`.

    Attributes:
        times_per_action: `velocity` takes t float32 [B, C] as well, a time for each action.
        glimpse: [B, hidden], what the (memory-augmented) cognition asks for: so memory reaches the actions.
    """

    times_per_action: ClassVar[bool] = False

    def __init__(
        self, config: FlowMatchingConfig, backbone: Backbone, proprio: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        if config.prefix and not self.times_per_action:
            raise ValueError(
                f"head.prefix is {config.prefix}, and a head of type {config.get_choice_name(type(config))} has "
                "one time for all actions; set it to 0, or choose flow, layerwise or pi0"
            )
        if config.quality is not None:
            config.quality.check(*shape)
        self.flow = config
        self.noise_shape = shape
        self.loss_noise_shape = (config.draws, math.prod(shape) + 1 + bool(config.prefix))
        self.glimpse = Glimpse(config, backbone, proprio)
        self._teacher: tuple[FlowMatchingHead, ...] = ()  # in a tuple, so that it is no part of this module

    def conditions(self, features: Features) -> Conditions:
        raise NotImplementedError

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float32 [B, C, A] at x float32 [B, C, A] and t float32 [B] in [0, 1]; see `times_per_action`."""
        raise NotImplementedError

    def further_terms(self, conditions: Conditions, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What else the loss adds up, by name; `weight` as in `loss`."""
        return {}

    def readings(self, conditions: Conditions) -> dict[str, torch.Tensor]:
        """What else is logged in training."""
        return {}

    def learn_from(self, teacher: Head) -> None:
        if self.flow.distils and isinstance(teacher, FlowMatchingHead):
            self._teacher = (copy.deepcopy(teacher).eval().requires_grad_(False),)

    def loss(
        self, features: Features, actions: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert noise is not None
        draws, noise, size = self.flow.draws, noise.flatten(0, 1), math.prod(actions.shape[1:])
        start = self._varying(noise[:, :size].reshape(-1, *actions.shape[1:]))
        t = TIMES[self.flow.time](noise[:, size])
        conditions = self.conditions(features)
        terms = self.further_terms(conditions, weight)
        readings, conditions = self.readings(conditions), conditions.repeated(draws)
        weight = weight.repeat_interleave(draws, 0)
        if self.flow.distils:
            actions = self._taught(features, start)
            t = t * 0 if self.flow.distil == "regression" else t
        else:
            actions = actions.repeat_interleave(draws, 0)
        actions, times, left = actions.where(weight, 0.0), t, (1 - t)[:, None, None]
        if self.flow.prefix:
            given = drawn_prefix(noise[:, size + 1], self.flow.prefix, actions.shape[1])
            times, weight = torch.where(given, 1.0, t[:, None]), weight & ~given[..., None]
            x = torch.lerp(actions, start, (1 - times)[..., None])
        else:
            x = torch.lerp(actions, start, left)
        v = self.velocity(x, times, conditions)
        terms["flow"] = masked_mean((v - (actions - start)).square(), weight)
        if self.flow.quality is not None:
            # an estimate from near the noise says little
            terms["quality"] = self.flow.quality.loss(x + left * v, actions, weight, (1 - left).square())
        self.terms = {name: value.detach() for name, value in (terms | readings).items()}
        return torch.stack(list(terms.values())).sum()

    def sample(self, features: Features, noise: torch.Tensor | None = None) -> torch.Tensor:
        assert noise is not None
        return self._chunk(self.conditions(features), self._varying(noise))

    def resume(self, features: Features, noise: torch.Tensor | None, rest: Rest) -> torch.Tensor:
        assert noise is not None
        conditions = self.conditions(features)
        varies = self.action_varies
        if varies is None:
            varies = torch.ones(noise.shape[-1], dtype=torch.bool, device=noise.device)
        with torch.inference_mode(False):
            conditions = conditions.mapped(usable)
        return resumed(
            lambda x, t: self._varying(self.velocity(x, t, conditions)),
            self._varying(noise),
            replace(rest, actions=self._varying(rest.actions)),
            varies,
            self.flow.steps,
            self.flow.integrator,
        )

    def _chunk(self, conditions: Conditions, start: torch.Tensor) -> torch.Tensor:
        def field(x: torch.Tensor, t: float) -> torch.Tensor:
            return self._varying(self.velocity(x, torch.full_like(x[:, 0, 0], t), conditions))

        return integrate(field, start, self.flow.steps, self.flow.integrator)

    @torch.no_grad()
    def _taught(self, features: Features, start: torch.Tensor) -> torch.Tensor:
        if not self._teacher:
            raise ValueError("model.head.distil: no policy was given to learn from; set start_from")
        teacher = self._teacher[0].to(start.device)
        return teacher._chunk(teacher.conditions(features).repeated(self.flow.draws), start)

    def _varying(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.action_varies is None else x * self.action_varies


def drawn_prefix(drawn: torch.Tensor, longest: int, chunk: int) -> torch.Tensor:
    """bool [B, C], True on as many first actions as a standard normal draw [B] says: 0 to `longest` alike."""
    count = (torch.special.ndtr(drawn) * (longest + 1)).floor().clamp(max=longest)
    given: torch.Tensor = torch.arange(chunk, device=drawn.device) < count[:, None]
    return given


class TimeEmbedding(nn.Module):
    """t float32 [...] -> [..., width]: sines of 128 frequencies from 1 down to 1/10000, then two layers.

    `shift` 1 has the lowest frequency at 1/10000 itself (diffusers), 0 one step above (GLIDE, arXiv 2112.10741).
    """

    def __init__(self, width: int, shift: int = 0, sines: int = 256) -> None:
        super().__init__()
        self.sines, self.shift = sines, shift
        self.layers = nn.Sequential(nn.Linear(sines, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(torch.cat(waves(t, self.sines, self.shift)[::-1], -1))
        return out


def waves(t: torch.Tensor, size: int, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sines and cosines [..., size / 2] of t [...] times 10000^-(i / (size / 2 - shift))."""
    places = torch.arange(size // 2, device=t.device) / (size // 2 - shift)
    angles = t[..., None] * torch.exp(-math.log(10000) * places)
    return angles.sin(), angles.cos()
