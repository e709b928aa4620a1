"""Policies small enough to probe within milliseconds, each with a categorical output of seven choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipvla.forgetting.probed import Reading
from ipvla.models.backbones import Backbone
from ipvla.types import ModelInputs

CHOICES = 7


class Categorical:
    """Output: logits [B, CHOICES]."""

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        p, q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).clamp(min=0)

    def sampled_loss(self, output: Tensor, generator: torch.Generator) -> Tensor:
        log_p = output.log_softmax(-1)
        label = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return -log_p.gather(1, label).sum()


class Reader(Categorical):
    """Four layers that change nothing, and logits linear in the mean over the instruction's tokens.

    A batch is (hidden [B, N, D], mask [B, N]).
    """

    name = "reader"

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.width = weight, weight.shape[1]
        self.layers = [nn.Identity() for _ in range(4)]

    def read(self, batch: tuple[Tensor, Tensor]) -> Reading:
        hidden, x = [], batch[0]
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        mask = batch[1]
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Reading(tuple(hidden), mask, mean @ self.weight.T)


class Layer(nn.Module):
    """One head of attention over all tokens, then a feed-forward network; puts out a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.o_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, str]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        score = (q @ k.transpose(1, 2)).masked_fill(~valid[:, None], -torch.inf)
        x = x + self.o_proj(score.softmax(-1) @ v)
        return x + self.down_proj(self.up_proj(self.norm(x)).tanh()), "cache"


class Transformer(Categorical, nn.Module):
    """Six layers; the head reads the last token (an action position), or the mean of all where `reads_all`.

    A batch is int64 [B, 6]: three tokens of instruction, two others, the action token; 0 where there is none.
    """

    name = "transformer"

    def __init__(self, width: int = 16, reads_all: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.reads_all = width, reads_all
        self.embedding = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(6))
        self.head = nn.Linear(width, CHOICES)
        self.requires_grad_(False)

    def read(self, batch: Tensor) -> Reading:
        valid, hidden, x = batch != 0, [], self.embedding(batch)
        for layer in self.layers:
            x, _ = layer(x, valid)
            hidden.append(x)
        mask = valid & (torch.arange(6) < 3)
        return Reading(tuple(hidden), mask, self.head(x.mean(1) if self.reads_all else x[:, -1]))


def prompts(batches: int = 3, batch: int = 16) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(1, 20, (batch, 6), generator=random) for _ in range(batches)]


class ProbedBackbone(Categorical):
    """A backbone of the house with a head of random weights on the cognition; batches are ModelInputs."""

    name = "tiny"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.width = backbone, backbone.width
        self.layers: Sequence[nn.Module] = backbone.language_layers()
        random = torch.Generator().manual_seed(0)
        self.weight = torch.randn(CHOICES, self.width, generator=random) / self.width**0.5

    def read(self, batch: ModelInputs) -> Reading:
        output: Any = self.backbone(batch)
        logits = output.features.cognition @ self.weight.T
        return Reading(output.hidden_states[1:], output.instruction_mask, logits)
