"""The student on the probe's records, as often as a Thermostat asks.

A reading takes no more than it needs: a forward pass through the language layers, without memory and head. Where
nothing in front of these layers is trained, what enters them never changes: then each record is embedded once, and
kept on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvla.data.probe import ProbeSet
from ipvla.data.transforms import Transforms
from ipvla.forgetting.layers import edited
from ipvla.forgetting.pooling import instruction_mean
from ipvla.models.backbones.protocol import Embedded
from ipvla.models.vla import IPVLA


class ProbeReader:
    """Pools what language layers put out for records of a probe, as `ipvla.forgetting.drift.pool` does.

    Whether records can be kept is told from the parameters that are trained when this is made.
    """

    def __init__(self, model: IPVLA, transforms: Transforms, probe: ProbeSet) -> None:
        self._model, self._transforms, self._probe = model, transforms, probe
        inside = {p for layer in model.backbone.language_layers() for p in layer.parameters()}
        trained = {p for p in model.backbone.parameters() if p.requires_grad}
        self._kept: dict[int, Embedded] | None = {} if trained <= inside else None

    @torch.no_grad()
    def pool(self, records: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
        """By layer float64 [len(records), D], on the CPU; the model's mode is as it was before, afterwards."""
        model, hidden = self._model, dict[int, Tensor]()
        modules = model.backbone.language_layers()
        training = model.training
        model.eval()
        try:
            embedded = self._embedded(records)
            with ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(edited(modules[layer], _keep(hidden, layer)))
                model.backbone.encode(embedded)
        finally:
            model.train(training)
        mask = embedded.instruction
        return {layer: instruction_mean(hidden[layer], mask).vectors.cpu() for layer in layers}

    def _embedded(self, records: Sequence[int]) -> Embedded:
        if self._kept is None:
            return self._embed(records)
        missing = [record for record in records if record not in self._kept]
        if missing:
            fresh = self._embed(missing).map(Tensor.cpu)
            for row, record in enumerate(missing):
                self._kept[record] = fresh.map(lambda x, row=row: x[row : row + 1].clone())  # type: ignore[misc]
        device = self._model.action_varies.device
        return _joined([self._kept[record] for record in records]).map(lambda x: x.to(device))

    def _embed(self, records: Sequence[int]) -> Embedded:
        inputs = self._probe.batch(self._transforms, records)
        return self._model.backbone.embed(inputs.to(self._model.action_varies.device))


def _keep(hidden: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def edit(output: Tensor) -> Tensor:
        hidden[layer] = output
        return output

    return edit


def _joined(rows: Sequence[Embedded]) -> Embedded:
    """Along the batch; rows of fewer tokens are padded at the end, as prompts are."""
    longest = max(row.tokens.shape[1] for row in rows)

    def padded(row: Embedded, name: str) -> Tensor:
        value: Tensor = getattr(row, name)
        more = longest - row.tokens.shape[1]
        if name == "tokens":
            return F.pad(value, (0, 0, 0, more))
        return F.pad(value, (0, more)) if name in ("valid", "instruction") else value

    return Embedded(
        **{field.name: torch.cat([padded(row, field.name) for row in rows]) for field in fields(Embedded)}
    )
