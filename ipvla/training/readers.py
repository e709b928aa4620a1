"""A policy read on a probe, as `ipvla.forgetting` asks: hidden states, instruction mask, an output to disturb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ipvla.data.probe import ProbeSet
from ipvla.data.transforms import Transforms
from ipvla.forgetting.probed import Reading, instruction_mean, outputs
from ipvla.models.backbones.protocol import Embedded
from ipvla.models.vla import IPVLA
from ipvla.types import ModelInputs

#: Records that are embedded together.
_BLOCK = 64


@contextmanager
def _evaluating(model: IPVLA) -> Iterator[None]:
    """Evaluation mode; the model's mode is as it was before, afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class FeatureReader:
    """`ipvla.forgetting.probed.ProbedModel` of a policy: its first step of an episode, deterministic.

    Batches are `ModelInputs` [B]. The output distribution is a unit Gaussian around the normalised actions that
    vary: its KL divergence is half the squared distance, in the unit in which the action loss is measured. A
    memory that feeds the backbone itself is left out: at an episode's first step there is nothing to remember.

    Attributes:
        name: of the backbone, as in `model.backbone.type`.
    """

    def __init__(self, model: IPVLA, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def width(self) -> int:
        return self.model.backbone.width

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.backbone.language_layers()

    def read(self, batch: ModelInputs) -> Reading:
        return Reading(*self.model.whole(lambda: self._read(batch)))

    def _read(self, batch: ModelInputs) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        model, inputs = self.model, batch.to(self.model.action_varies.device)
        with _evaluating(model):
            with outputs(dict(enumerate(self.layers))) as hidden:
                output = model.backbone(inputs)
            features = model.memory.at_once(model.backbone, inputs, output.features)
            actions = model.expected(features)[..., model.action_varies]
        return tuple(hidden.values()), output.instruction_mask, actions.flatten(1)

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * (output.double() - reference.double()).square().sum(-1)

    def sampled_loss(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return 0.5 * (output - (output.detach() + noise)).square().sum()


class ProbeReader:
    """Pools what language layers put out for records of a probe, as `ipvla.forgetting.drift.pool` does.

    A reading takes no more than it needs: a forward pass through the language layers, without memory and head.
    Where nothing in front of these layers is trained when this is made, what enters them never changes: then the
    whole probe is embedded at the first reading and stays on the CPU, always in the same blocks, so that a run
    that resumes reads the same bits.
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
        """By layer float64 [len(records), D], on the CPU. Where weights are sharded, every worker must ask."""
        return self._model.whole(lambda: self._pool(records, layers))

    def _pool(self, records: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
        modules = self._model.backbone.language_layers()
        with _evaluating(self._model):
            embedded = self._rows(records) if self._frozen else self._embed(records)
            with outputs({layer: modules[layer] for layer in layers}) as hidden:
                self._model.backbone.encode(embedded)
        return {layer: instruction_mean(hidden[layer], embedded.instruction).cpu() for layer in layers}

    def _rows(self, records: Sequence[int]) -> Embedded:
        if self._cached is None:
            starts = range(0, len(self), _BLOCK)
            blocks = (self._embed(range(first, min(first + _BLOCK, len(self)))) for first in starts)
            # No language layer reads the perception, and of a large model it weighs twice what the tokens do.
            slim = (replace(block, perception=block.perception[:, :0]) for block in blocks)
            self._cached = Embedded.joined([block.map(Tensor.cpu) for block in slim])
        rows, device = torch.tensor(records), self._model.action_varies.device
        return self._cached.map(lambda x: x[rows].to(device))

    def _embed(self, records: Sequence[int]) -> Embedded:
        inputs = self._probe.batch(self._transforms, records)
        return self._model.backbone.embed(inputs.to(self._model.action_varies.device))
