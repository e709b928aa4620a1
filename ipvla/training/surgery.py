"""The choices of `forgetting.method`: gradient or update surgery, installed on a model before it is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import draccus
import torch

from ipvla.forgetting.hsw import HSW, HSWConfig
from ipvla.forgetting.module_statistics import ModuleStatistics
from ipvla.forgetting.subspaces import LayerSubspace, Subspaces
from ipvla.forgetting.thermostat import Gains
from ipvla.forgetting.update_surgery import (
    Factors,
    ProjectedUpdate,
    ProjectedUpdateConfig,
    RoutedMoments,
    RoutedMomentsConfig,
    TwoSided,
    TwoSidedConfig,
)
from ipvla.models.lora import factors, layer_of
from ipvla.models.vla import IPVLA


@dataclass(frozen=True)
class Target:
    """What surgery is done on, and what the teacher left for it."""

    model: IPVLA
    optimizer: torch.optim.AdamW
    subspaces: Subspaces
    statistics: ModuleStatistics | None


class Surgery:
    """Surgery that is installed."""

    def set_gains(self, gains: Gains) -> None:
        """From the next step on."""
        raise NotImplementedError

    def around(self) -> AbstractContextManager[None]:
        """Goes around the optimizer's step."""
        return nullcontext()

    def readings(self) -> dict[str, float]:
        """What it did since the last look, by name."""
        return {}


@dataclass(frozen=True)
class SurgeryConfig(draccus.ChoiceRegistry):
    """A choice by `type`: hsw, projected_update, routed_moments or two_sided."""

    @property
    def gains(self) -> Gains:
        """Those that hold until a Thermostat changes them."""
        raise NotImplementedError

    def install(self, target: Target) -> Surgery:
        """Puts it on the target. ValueError if model and artifacts do not fit."""
        raise NotImplementedError


class _Gradients(Surgery):
    def __init__(self, hsw: HSW) -> None:
        self._hsw = hsw

    def set_gains(self, gains: Gains) -> None:
        self._hsw.set_gains(gains.beta, gains.gamma)

    def readings(self) -> dict[str, float]:
        return {f"hsw/{name}": value for name, value in self._hsw.readings().items()}


class _GainedUpdate(Surgery):
    def __init__(self, update: ProjectedUpdate | RoutedMoments) -> None:
        self._update = update
        self.around = update.around  # type: ignore[method-assign]

    def set_gains(self, gains: Gains) -> None:
        self._update.set_strength(gains.beta, gains.gamma)


class _DampedUpdate(Surgery):
    def __init__(self, update: TwoSided) -> None:
        self._update = update
        self.around = update.around  # type: ignore[method-assign]

    def set_gains(self, gains: Gains) -> None:
        self._update.set_strength(gains.lam, gains.kappa)


@SurgeryConfig.register_subclass("hsw")
@dataclass(frozen=True)
class HSWSurgeryConfig(HSWConfig, SurgeryConfig):
    """See `ipvla.forgetting.hsw`."""

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        return _Gradients(self.build(target.model.backbone.language_layers(), target.subspaces))


@SurgeryConfig.register_subclass("projected_update")
@dataclass(frozen=True)
class ProjectedUpdateSurgeryConfig(ProjectedUpdateConfig, SurgeryConfig):
    """See `ipvla.forgetting.update_surgery`; `writers` name the modules that write into the residual stream."""

    writers: tuple[str, ...] = ("o_proj", "down_proj")

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        written = _writers(target, self.writers)
        return _GainedUpdate(self.build(written, _subspace_of(target, written)))


@SurgeryConfig.register_subclass("routed_moments")
@dataclass(frozen=True)
class RoutedMomentsSurgeryConfig(RoutedMomentsConfig, SurgeryConfig):
    """See `ipvla.forgetting.update_surgery`; `writers` name the modules that write into the residual stream."""

    writers: tuple[str, ...] = ("o_proj", "down_proj")

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        written = _writers(target, self.writers)
        return _GainedUpdate(self.build(written, _subspace_of(target, written), target.optimizer))


@SurgeryConfig.register_subclass("two_sided")
@dataclass(frozen=True)
class TwoSidedSurgeryConfig(TwoSidedConfig, SurgeryConfig):
    """See `ipvla.forgetting.update_surgery`; on every adapter."""

    @property
    def gains(self) -> Gains:
        return Gains(lam=self.lam, kappa=self.kappa)

    def install(self, target: Target) -> Surgery:
        if target.statistics is None:
            raise ValueError(
                "forgetting.method is two_sided, but the artifact has no module statistics; "
                "make it again by ray_jobs.subspaces with --statistics true"
            )
        return _DampedUpdate(self.build(factors(target.model.backbone), target.statistics.modules))


def _writers(target: Target, names: tuple[str, ...]) -> Factors:
    """The adapters of these modules in the protected layers."""
    backbone = target.model.backbone
    protected = {layer for group in target.subspaces.groups for layer in group.layers}
    return {
        name: pair
        for name, pair in factors(backbone).items()
        if name.rsplit(".", 1)[-1] in names and layer_of(backbone, name) in protected
    }


def _subspace_of(target: Target, written: Factors) -> dict[str, LayerSubspace]:
    numbers = {name: layer_of(target.model.backbone, name) for name in written}
    return {name: target.subspaces.for_layer(number) for name, number in numbers.items() if number is not None}
