"""A policy as `ipvla.forgetting` reads it: hidden states per layer, instruction mask, and an output to disturb."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipvla.forgetting.layers import outputs
from ipvla.forgetting.probed import Reading
from ipvla.models.vla import IPVLA
from ipvla.types import ModelInputs


class FeatureReader:
    """The policy's first step of an episode, deterministic; batches are `ModelInputs` [B].

    The output distribution is a unit Gaussian around the normalised actions that vary: its KL divergence is half
    the squared distance, in the unit in which the action loss is measured. A memory that feeds the backbone itself
    is left out: at an episode's first step there is nothing to remember.

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
        """See `ipvla.forgetting.probed.ProbedModel`; the model's mode is as it was before, afterwards."""
        return Reading(*self.model.whole(lambda: self._read(batch)))

    def _read(self, batch: ModelInputs) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        model, inputs = self.model, batch.to(self.model.action_varies.device)
        training = model.training
        model.eval()
        try:
            with outputs(dict(enumerate(self.layers))) as hidden:
                output = model.backbone(inputs)
            features = output.features
            if not model.memory.feeds_backbone:
                t = torch.zeros(len(inputs.images), dtype=torch.long, device=inputs.images.device)
                features, _ = model.memory.step(features, model.initial_memory(len(t)), t)
            actions = model.sample(features)[..., model.action_varies]
        finally:
            model.train(training)
        return tuple(hidden.values()), output.instruction_mask, actions.flatten(1)

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * (output.double() - reference.double()).square().sum(-1)

    def sampled_loss(self, output: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return 0.5 * (output - (output.detach() + noise)).square().sum()
