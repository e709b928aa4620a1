"""ICSM: which directions of the instruction's hidden states the teacher's output depends on. Offline, once.

Per representative layer, over a probe of n records with an instruction:

    pool        s_i = mean hidden state over the instruction's own tokens, X = S - mu
    directions  u_k = the first r right singular vectors of X (float64, largest entry positive)
    scale       a = sqrt(trace C_T): how far records lie apart, so that epsilon means the same disturbance in
                every layer, however large the residual stream has grown and whatever all records share
    injection   score_k = mean over records and both signs of KL(p || p with +-epsilon a u_k added to the
                layer's output at every instruction position)
    fisher      score_k = (epsilon a)^2 / 2 * u_k' F u_k, F = mean of g g', g = gradient of -log p(y), y ~ p,
                summed over the instruction's tokens; what injection is to second order, for all k at once
    split       by descending score: the first share is Uf (fragile), the rest Up (plastic)

Two orders are controls, which a method must beat to owe its success to fragility: "variance" keeps the directions
as the SVD gives them, largest variance first, and "random" takes any directions at all, with no regard to the
probe.

Where nothing behind a layer reads its instruction positions (the last layer, if the head reads an action position)
every score there is 0 and the order means nothing. The gradient's energy shows this; the nearest earlier layer
with a gradient then represents the group.

Run the teacher in float32: an injection of a few percent drowns in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipvla.forgetting.artifact import identity_of
from ipvla.forgetting.probed import ProbedModel, edited, instruction_mean, sampled_gradients
from ipvla.forgetting.subspaces import LayerGroup, LayerSubspace, Subspaces, layer_groups

#: Below this share of the gradient's energy a layer's instruction positions carry nothing but rounding.
NOTHING = 1e-12


@dataclass(frozen=True)
class ICSMConfig:
    """How subspaces are found.

    Attributes:
        rank: r, directions per representative layer.
        epsilon: size of an injection, as a share of `a` (see the module's docstring).
        order: "sensitivity", by score; or, as a control, "variance" or "random".
        scoring: "injection" (2 r forward passes per batch and layer) or "fisher" (nothing beyond the first pass);
            for the order "sensitivity" only.
        fragile_share: of the directions that become Uf.
        last: layers to cover, the last ones, in two groups.
        labels: sampled per record for the Fisher gradients; the surer the teacher is, the more it takes, since
            what would rarely be chosen then makes up most of F.
        seed: of the sampled labels, and of random directions.
    """

    rank: int = 128
    epsilon: float = 0.1
    order: str = "sensitivity"
    scoring: str = "injection"
    fragile_share: float = 0.5
    last: int = 4
    labels: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"icsm.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"icsm.epsilon is {self.epsilon}; it must be positive")
        if self.order not in ("sensitivity", "variance", "random"):
            raise ValueError(f'icsm.order is {self.order!r}; choose "sensitivity", "variance" or "random"')
        if self.scoring not in ("injection", "fisher"):
            raise ValueError(f'icsm.scoring is {self.scoring!r}; choose "injection" or "fisher"')
        if not 0 <= self.fragile_share <= 1:
            raise ValueError(f"icsm.fragile_share is {self.fragile_share}; it must be in [0, 1]")
        layer_groups(self.last, self.last)

    def build(self) -> ICSM:
        return ICSM(self)


@dataclass(frozen=True)
class _Measured:
    """One layer over the probe's n records with an instruction, all float64 on the CPU.

    Attributes:
        vectors: [n, D], pooled.
        gradients: [n * labels, D], of the sampled loss, summed over the instruction's tokens.
        inside, energy: squared norm of that gradient per token, over instruction tokens and over all.
    """

    vectors: Tensor
    gradients: Tensor
    inside: float
    energy: float

    @property
    def share(self) -> float:
        return self.inside / self.energy if self.energy else 0.0

    @property
    def carries_nothing(self) -> bool:
        return self.share <= NOTHING

    @property
    def scale(self) -> float:
        """a: root of the mean squared distance of the pooled vectors from their mean."""
        total = (self.vectors - self.vectors.mean(0)).square().sum().item()
        return math.sqrt(total / max(len(self.vectors) - 1, 1))


class ICSM:
    """See the module's docstring."""

    def __init__(self, config: ICSMConfig) -> None:
        self.config = config

    def fit(self, model: ProbedModel, batches: Sequence[Any], meta: Mapping[str, Any]) -> Subspaces:
        """The teacher's subspaces over the probe's batches, which are read in order.

        Needs memory for a backward pass through all language layers of the largest batch.

        Args:
            meta: at least `probe_sha256` and `commit`; goes into the result's meta, JSON values.

        Raises:
            ValueError: meta lacks these; no record has an instruction; the probe spans fewer directions than
                `rank`; no layer's instruction positions reach the output; the output is not finite.
        """
        identity = identity_of(model, meta)
        measured, records, empty = self._measure(model, batches, range(len(model.layers)))
        nominal = layer_groups(len(model.layers), self.config.last)
        groups = tuple(replace(group, representative=_carrier(measured, group)) for group in nominal)
        representatives = sorted({group.representative for group in groups})
        layers = {
            number: self._subspace(model, batches, number, measured[number], (records, empty))
            for number in representatives
        }
        injected = self.config.order == "sensitivity" and self.config.scoring == "injection"
        measurements = {
            **meta,
            **asdict(self.config),
            "agreement": {str(n): self._agreement(measured[n], layer) for n, layer in layers.items() if injected},
            "records": records,
            "empty_masks": empty,
            **identity,
            "carries_nothing": any(measured[group.representative].carries_nothing for group in nominal),
            "energy": {str(number): self._energy(layer) for number, layer in measured.items()},
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }
        return Subspaces(groups, layers, measurements)

    def _agreement(self, measured: _Measured, subspace: LayerSubspace) -> float | None:
        """Spearman's correlation of the columns' scores by injection with their Fisher scores.

        None where either are all the same, as they are where a layer carries nothing.
        """
        injections = subspace.basis.double() * self.config.epsilon * measured.scale
        agreement = _spearman(subspace.scores, _fisher_scores(measured.gradients, injections))
        return None if math.isnan(agreement) else agreement

    def _subspace(
        self, model: ProbedModel, batches: Sequence[Any], number: int, layer: _Measured, counts: tuple[int, int]
    ) -> LayerSubspace:
        """Of layer `number`; `counts` are the probe's records and those of them without an instruction."""
        mean, covariance = layer.vectors.mean(0), _covariance(layer.vectors)
        if self.config.order == "random":
            directions = _random_directions(len(mean), self.config.rank, (self.config.seed, number))
            scores = torch.full((self.config.rank,), math.nan, dtype=torch.float64)
        else:
            directions = _directions(layer.vectors, self.config.rank, *counts)
            scores = self._scores(model, batches, number, layer, directions)
        order = scores.argsort(descending=True, stable=True)
        fragile, plastic = order.tensor_split([int(self.config.fragile_share * self.config.rank + 0.5)])
        basis = directions.float()
        return LayerSubspace(number, basis[:, fragile], basis[:, plastic], mean, covariance, scores[order])

    def _scores(
        self, model: ProbedModel, batches: Sequence[Any], number: int, layer: _Measured, directions: Tensor
    ) -> Tensor:
        """float64 [r]: what the directions [D, r] are ordered by."""
        if self.config.order == "variance":
            return ((layer.vectors - layer.vectors.mean(0)) @ directions).square().sum(0) / (
                len(layer.vectors) - 1
            )
        injections = directions * self.config.epsilon * layer.scale
        if self.config.scoring == "fisher":
            return _fisher_scores(layer.gradients, injections)
        return _injection_scores(model, batches, number, injections)

    def _energy(self, measured: _Measured) -> dict[str, Any]:
        """The energy report of one layer; its fragility is the sum of Fisher scores over a basis of R^D."""
        size = self.config.epsilon * measured.scale
        fragility = 0.5 * size**2 * measured.gradients.square().sum(1).mean().item()
        nothing = measured.carries_nothing
        return {"instruction_share": measured.share, "fragility": fragility, "carries_nothing": nothing}

    def _measure(
        self, model: ProbedModel, batches: Sequence[Any], numbers: Sequence[int]
    ) -> tuple[dict[int, _Measured], int, int]:
        """(by layer number, records, records without an instruction)"""
        generator = torch.Generator().manual_seed(self.config.seed)
        layers = {number: model.layers[number] for number in numbers}
        vectors: dict[int, list[Tensor]] = {number: [] for number in numbers}
        gradients: dict[int, list[Tensor]] = {number: [] for number in numbers}
        inside, energy = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0.0)
        records = empty = 0
        for batch in batches:
            reading, sampled = sampled_gradients(model, batch, layers, self.config.labels, generator)
            instructed = reading.mask.any(1)
            records, empty = records + len(instructed), empty + int((~instructed).sum())
            for number in numbers:
                pooled = instruction_mean(reading.hidden[number].detach(), reading.mask)
                vectors[number].append(pooled[instructed].cpu())
            for by_layer in sampled:
                for number, gradient in by_layer.items():
                    within = gradient.double() * reading.mask[..., None]
                    gradients[number].append(within.sum(1)[instructed].cpu())
                    inside[number] += within.square().sum().item()
                    energy[number] += gradient.double().square().sum().item()
        if records == empty:
            raise ValueError(
                f"none of the probe's {records} records has an instruction token; check the model's mask"
            )
        return (
            {n: _Measured(torch.cat(vectors[n]), torch.cat(gradients[n]), inside[n], energy[n]) for n in numbers},
            records,
            empty,
        )


def _carrier(measured: Mapping[int, _Measured], group: LayerGroup) -> int:
    """The group's representative, or the nearest layer before it whose instruction positions reach the output."""
    for number in range(group.representative, -1, -1):
        if not measured[number].carries_nothing:
            return number
    raise ValueError(
        f"up to layer {group.representative} no instruction token reaches the output; "
        "check the mask and that `read` keeps the graph"
    )


def _covariance(vectors: Tensor) -> Tensor:
    """float64 [D, D] of vectors [n, D], divided by n - 1."""
    centred = vectors - vectors.mean(0)
    return centred.T @ centred / max(len(vectors) - 1, 1)


def _directions(vectors: Tensor, rank: int, records: int, empty: int) -> Tensor:
    """First `rank` principal directions of vectors float64 [n, D] as columns [D, rank], largest entry positive."""
    _, values, rows = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    spanned = int((values > vectors.norm() * max(vectors.shape) * torch.finfo(values.dtype).eps).sum())
    if rank > spanned:
        raise ValueError(
            f"icsm.rank is {rank}, but {records} records less {empty} without an instruction span only {spanned} "
            f"of {vectors.shape[1]} directions around their mean; lower icsm.rank or take a larger probe"
        )
    rows = rows[:rank]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    signed: Tensor = rows * largest.sign()
    return signed.T


def _random_directions(width: int, rank: int, seed: tuple[int, int]) -> Tensor:
    """float64 [width, rank], orthonormal columns of a uniformly random subspace."""
    if rank > width:
        raise ValueError(f"icsm.rank is {rank}, but the layer is only {width} wide; lower icsm.rank")
    drawn = np.random.default_rng(seed).standard_normal((width, rank))
    columns: Tensor = torch.linalg.qr(torch.from_numpy(drawn))[0]
    return columns


def _fisher_scores(gradients: Tensor, injections: Tensor) -> Tensor:
    """float64 [r]: half of v' F v for injections v [D, r] and F the second moment of gradients [n, D]."""
    return 0.5 * (gradients @ injections).square().mean(0)


@torch.no_grad()
def _injection_scores(model: ProbedModel, batches: Sequence[Any], number: int, injections: Tensor) -> Tensor:
    """float64 [r]: mean divergence over records with an instruction when +-v of injections [D, r] is added."""
    total, records = torch.zeros(injections.shape[1], dtype=torch.float64), 0
    for batch in batches:
        clean = model.read(batch)
        instructed = clean.mask.any(1)
        records += int(instructed.sum())
        for k, injection in enumerate(injections.T):
            for signed in (injection, -injection):

                def inject(hidden: Tensor, signed: Tensor = signed, mask: Tensor = clean.mask) -> Tensor:
                    return hidden + mask[..., None] * signed.to(hidden)

                with edited(model.layers[number], inject):
                    output = model.read(batch).output
                total[k] += model.divergence(output, clean.output)[instructed].sum().cpu() / 2
    return total / records


def _spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of a and b [n]; NaN where it is undefined: n < 2, or one of them is constant."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # takes a second

    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)
