"""The choices of `forgetting.method`: on gradients, on updates or on the loss; installed before training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import draccus
from torch import Tensor

from ipvla.forgetting.adapter_update import (
    Factors,
    InputDecay,
    InputDecayConfig,
    ProjectedUpdate,
    ProjectedUpdateConfig,
    RoutedMoments,
    RoutedMomentsConfig,
    TwoSided,
    TwoSidedConfig,
)
from ipvla.forgetting.distillation import DistillationConfig
from ipvla.forgetting.gpm import GPM, GPMConfig
from ipvla.forgetting.hsw import HSW, HSWConfig
from ipvla.forgetting.subspaces import LayerSubspace
from ipvla.forgetting.thermostat import Gains
from ipvla.forgetting.weight_penalty import EWCConfig, L2SPConfig, WeightPenalty
from ipvla.models.corda import begin_by_corda
from ipvla.models.lora import factors, layer_of
from ipvla.models.vla import fresh_parts
from ipvla.training.target import Target
from ipvla.training.whole_factors import WholeFactors


class Surgery:
    """Surgery that is installed; this one leaves training alone."""

    def set_gains(self, gains: Gains) -> None:
        """From the next step on."""
        raise NotImplementedError

    def penalty(self, _step: int) -> Tensor | None:
        """What the loss of optimizer step `step` gains, a scalar in the graph of the weights; None for nothing."""
        return None

    def around(self) -> AbstractContextManager[None]:
        """Goes around the optimizer's step."""
        return nullcontext()

    def readings(self) -> dict[str, float]:
        """What it did since the last look, by name."""
        return {}


@dataclass(frozen=True)
class SurgeryConfig(draccus.ChoiceRegistry):
    """A choice by `type`; each says in its class what it does.

    Attributes:
        reads_probe: training takes the probe's records, not only what was measured on them.
        moves_base: installation changes the frozen weights, so that the adapters alone are not what was learned.
        gained: the gains that it is turned by, of "beta", "gamma", "lambda" and "kappa".
        shards: it works where weights are sharded over workers, `training.sharding` fsdp.
    """

    reads_probe: ClassVar[bool] = False
    moves_base: ClassVar[bool] = False
    gained: ClassVar[tuple[str, ...]] = ()
    shards: ClassVar[bool] = False

    @property
    def gains(self) -> Gains | None:
        """Those that hold until a Thermostat changes them; None for a method that no Thermostat can regulate."""
        return None

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
    def __init__(self, update: ProjectedUpdate | RoutedMoments, copies: WholeFactors) -> None:
        self._update = update
        self.around = partial(copies.around, update)  # type: ignore[method-assign]

    def set_gains(self, gains: Gains) -> None:
        self._update.set_strength(gains.beta, gains.gamma)


class _DampedUpdate(Surgery):
    def __init__(self, update: TwoSided, copies: WholeFactors) -> None:
        self._update = update
        self.around = partial(copies.around, update)  # type: ignore[method-assign]

    def set_gains(self, gains: Gains) -> None:
        self._update.set_strength(gains.lam, gains.kappa)


@SurgeryConfig.register_subclass("hsw")
@dataclass(frozen=True)
class HSWSurgeryConfig(HSWConfig, SurgeryConfig):
    """See `ipvla.forgetting.hsw`."""

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")
    shards: ClassVar[bool] = True

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        return _Gradients(self.build(target.model.backbone.language_layers(), target.subspaces))


@SurgeryConfig.register_subclass("projected_update")
@dataclass(frozen=True)
class ProjectedUpdateSurgeryConfig(ProjectedUpdateConfig, SurgeryConfig):
    """See `ipvla.forgetting.adapter_update`; `writers` name the modules that write into the residual stream."""

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")
    shards: ClassVar[bool] = True

    writers: tuple[str, ...] = ("o_proj", "down_proj")

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        copies = WholeFactors(_writers(target, self.writers))
        return _GainedUpdate(self.build(copies.factors, _subspace_of(target, copies.factors)), copies)


@SurgeryConfig.register_subclass("routed_moments")
@dataclass(frozen=True)
class RoutedMomentsSurgeryConfig(RoutedMomentsConfig, SurgeryConfig):
    """See `ipvla.forgetting.adapter_update`; `writers` name the modules that write into the residual stream."""

    gained: ClassVar[tuple[str, ...]] = ("beta", "gamma")
    writers: tuple[str, ...] = ("o_proj", "down_proj")

    @property
    def gains(self) -> Gains:
        return Gains(self.beta, self.gamma)

    def install(self, target: Target) -> Surgery:
        written = _writers(target, self.writers)
        update = self.build(written, _subspace_of(target, written), target.optimizer)
        return _GainedUpdate(update, WholeFactors(written))


@SurgeryConfig.register_subclass("two_sided")
@dataclass(frozen=True)
class TwoSidedSurgeryConfig(TwoSidedConfig, SurgeryConfig):
    """See `ipvla.forgetting.adapter_update`; on every adapter."""

    gained: ClassVar[tuple[str, ...]] = ("lambda", "kappa")
    shards: ClassVar[bool] = True

    @property
    def gains(self) -> Gains:
        return Gains(lam=self.lam, kappa=self.kappa)

    def install(self, target: Target) -> Surgery:
        copies = WholeFactors(factors(target.model.backbone))
        return _DampedUpdate(self.build(copies.factors, target.statistics.modules), copies)


class _DecayingInputs(Surgery):
    def __init__(self, update: InputDecay, copies: WholeFactors) -> None:
        self._update = update
        self.around = partial(copies.around, update)  # type: ignore[method-assign]

    def set_gains(self, gains: Gains) -> None:
        self._update.set_strength(gains.lam)


@SurgeryConfig.register_subclass("input_decay")
@dataclass(frozen=True)
class InputDecaySurgeryConfig(InputDecayConfig, SurgeryConfig):
    """See `ipvla.forgetting.adapter_update`; on every adapter of a linear module."""

    gained: ClassVar[tuple[str, ...]] = ("lambda",)
    shards: ClassVar[bool] = True

    @property
    def gains(self) -> Gains:
        return Gains(lam=self.lam)

    def install(self, target: Target) -> Surgery:
        copies = WholeFactors(target.linear_factors())
        return _DecayingInputs(self.build(copies.factors, target.statistics.of_inputs), copies)


@SurgeryConfig.register_subclass("gpm")
@dataclass(frozen=True)
class GPMSurgeryConfig(GPMConfig, SurgeryConfig):
    """See `ipvla.forgetting.gpm`; on every adapter, with the artifact's module statistics."""

    shards: ClassVar[bool] = True

    def install(self, target: Target) -> Surgery:
        copies = WholeFactors(target.linear_factors())
        update = self.build(copies.factors, target.statistics.of_inputs)
        copies.put_back()  # it projects at once
        return _ProjectedInputs(update, copies)


class _ProjectedInputs(Surgery):
    def __init__(self, update: GPM, copies: WholeFactors) -> None:
        self._update = update
        self.around = partial(copies.around, update)  # type: ignore[method-assign]

    def readings(self) -> dict[str, float]:
        return {"gpm/protected_share": self._update.protected_share}


@SurgeryConfig.register_subclass("corda")
@dataclass(frozen=True)
class CorDASurgeryConfig(SurgeryConfig):
    """See `ipvla.models.corda`; on every adapter, with the artifact's module statistics, before training only."""

    moves_base: ClassVar[bool] = True

    def install(self, target: Target) -> Surgery:
        names = target.linear_factors()
        moments = {name: moment for name, moment in target.statistics.of_inputs.items() if name in names}
        begin_by_corda(target.model.backbone, moments)
        return Surgery()


class _Penalty(Surgery):
    def __init__(self, penalty: Callable[[int], Tensor]) -> None:
        self._penalty = penalty

    def penalty(self, step: int) -> Tensor:
        return self._penalty(step)


class _WeightPenalty(Surgery):
    def __init__(self, penalty: WeightPenalty) -> None:
        self._penalty = penalty

    def penalty(self, _step: int) -> Tensor:
        return self._penalty()


@SurgeryConfig.register_subclass("l2_sp")
@dataclass(frozen=True)
class L2SPSurgeryConfig(L2SPConfig, SurgeryConfig):
    """See `ipvla.forgetting.weight_penalty`; on the adapters, or without any on all that is trained.

    Needs no artifact.
    """

    def install(self, target: Target) -> Surgery:
        return _WeightPenalty(self.build(target.changes())) if self.strength else Surgery()


@SurgeryConfig.register_subclass("ewc")
@dataclass(frozen=True)
class EWCSurgeryConfig(EWCConfig, SurgeryConfig):
    """See `ipvla.forgetting.weight_penalty`; on the adapters, or without any on all that the teacher has.

    A memory of another mechanism than the teacher's is left free: there is nothing in it to forget.
    """

    def install(self, target: Target) -> Surgery:
        if not self.strength:
            return Surgery()
        fisher, changes = target.fisher.weights, target.changes()
        fresh = fresh_parts({n: c.shape for n, c in changes.items()}, {n: f.shape for n, f in fisher.items()})
        known = {name: change for name, change in changes.items() if name.partition(".")[0] not in fresh}
        return _WeightPenalty(self.build(known, fisher))


@SurgeryConfig.register_subclass("distillation")
@dataclass(frozen=True)
class DistillationSurgeryConfig(DistillationConfig, SurgeryConfig):
    """See `ipvla.forgetting.distillation`; on `forgetting.probe`."""

    reads_probe: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    def install(self, target: Target) -> Surgery:
        if not self.weight:
            return Surgery()
        probe, transforms = target.probe, target.transforms
        assert probe is not None, "opened for a method that reads it"
        built = self.build(
            target.policy, lambda records: probe.batch(transforms, records), target.outputs, target.seed
        )
        return _Penalty(built)


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
