"""The student on the probe's records, as often as a Thermostat asks.

A reading takes no more than it needs: a forward pass through the language layers, without memory and head. Where
nothing in front of these layers is trained, what enters them never changes: then the whole probe is embedded at
the first reading and stays on the CPU, always in the same blocks, so that a run that resumes reads the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ipvla.data.probe import ProbeSet
from ipvla.data.transforms import Transforms
from ipvla.forgetting.layers import outputs
from ipvla.forgetting.probed import instruction_mean
from ipvla.models.backbones.protocol import Embedded
from ipvla.models.vla import IPVLA

#: Records that are embedded together.
_BLOCK = 64


class ProbeReader:
    """Pools what language layers put out for records of a probe, as `ipvla.forgetting.drift.pool` does.

    Embeddings are cached if no parameter before the language layers is trained when this is made.
    """

    def __init__(self, model: IPVLA, transforms: Transforms, probe: ProbeSet) -> None:
        self._model, self._transforms, self._probe = model, transforms, probe
        inside = {p for layer in model.backbone.language_layers() for p in layer.parameters()}
        self._frozen = {p for p in model.backbone.parameters() if p.requires_grad} <= inside
        self._cached: Embedded | None = None

    def __len__(self) -> int:
        return len(self._probe)

    @torch.no_grad()
    def pool(self, records: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
        """By layer float64 [len(records), D], on the CPU; the model's mode is as it was before, afterwards.

        Where weights are sharded, every worker must ask for the same.
        """
        return self._model.whole(lambda: self._pool(records, layers))

    def _pool(self, records: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
        model = self._model
        modules = model.backbone.language_layers()
        training = model.training
        model.eval()
        try:
            embedded = self._rows(records) if self._frozen else self._embed(records)
            with outputs({layer: modules[layer] for layer in layers}) as hidden:
                model.backbone.encode(embedded)
        finally:
            model.train(training)
        mask = embedded.instruction
        return {layer: instruction_mean(hidden[layer], mask).vectors.cpu() for layer in layers}

    def _rows(self, records: Sequence[int]) -> Embedded:
        if self._cached is None:
            starts = range(0, len(self), _BLOCK)
            blocks = (self._embed(range(first, min(first + _BLOCK, len(self)))) for first in starts)
            self._cached = Embedded.joined([_without_perception(block).map(Tensor.cpu) for block in blocks])
        rows, device = torch.tensor(records), self._model.action_varies.device
        return self._cached.map(lambda x: x[rows].to(device))

    def _embed(self, records: Sequence[int]) -> Embedded:
        inputs = self._probe.batch(self._transforms, records)
        return self._model.backbone.embed(inputs.to(self._model.action_varies.device))


def _without_perception(embedded: Embedded) -> Embedded:
    """No language layer reads it, and of a large model it weighs twice what the tokens do."""
    return replace(embedded, perception=embedded.perception[:, :0])
