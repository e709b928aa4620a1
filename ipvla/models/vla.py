"""IPVLA = backbone -> memory -> head: a policy that decides from what it sees and what it remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ipvla.models.backbones import Backbone, BackboneConfig, TinyConfig
from ipvla.models.heads import Head, HeadConfig, RegressionConfig
from ipvla.models.lora import LoRAConfig
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig, MemoryModule
from ipvla.types import Memory, ModelInputs, StepBatch


@dataclass(frozen=True)
class IPVLAConfig:
    """The model; `chunk` is C, the number of actions predicted per policy step.

    Attributes:
        backbone, memory, head: each a choice by its `type`.
        lora: adapters on the backbone, or None to train every weight.
        chunk: C, at least 1.
    """

    backbone: BackboneConfig = field(default_factory=TinyConfig)
    memory: MemoryConfig = field(default_factory=GRUMemoryConfig)
    head: HeadConfig = field(default_factory=RegressionConfig)
    lora: LoRAConfig | None = None
    chunk: int = 8

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"model.chunk is {self.chunk}; it must be at least 1")

    def build(
        self, action_varies: torch.Tensor, proprio_dim: int, num_views: int = 1, image_size: int = 64
    ) -> IPVLA:
        """The model for data of these sizes; `action_varies` bool [A] is False where the dataset is constant."""
        backbone = self.backbone.build(proprio_dim, num_views, image_size)
        memory = self.memory.build(backbone.width)
        head = self.head.build(
            backbone.width, backbone.perception_size, proprio_dim, self.chunk, len(action_varies)
        )
        if self.lora is not None:
            self.lora.apply(backbone)
        return IPVLA(backbone, memory, head, action_varies)


class IPVLA(nn.Module):
    """See the module's docstring. Constant action dimensions carry no loss: data/transforms emits them exactly."""

    action_varies: torch.Tensor

    def __init__(self, backbone: Backbone, memory: MemoryModule, head: Head, action_varies: torch.Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.head = head
        self.register_buffer("action_varies", action_varies.clone())

    def initial_memory(self, batch: int) -> Memory:
        """The memory of `batch` episodes that have not begun, on the model's device."""
        return {name: value.to(self.action_varies.device) for name, value in self.memory.initial(batch).items()}

    def forward(self, batch: StepBatch, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """`loss`, under the name that distributed wrappers call."""
        return self.loss(batch, memory)

    def loss(self, batch: StepBatch, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """The action loss of one window [B, K, ...] and the memory [B, ...] after it, still in the graph."""
        shape = batch.is_first.shape
        features = self.backbone(batch.inputs.flatten()).features.map(lambda x: x.unflatten(0, shape))
        features, memory = self.memory.scan(features, memory, batch.t, batch.is_first, batch.valid)
        weight = batch.action_valid & batch.valid[..., None]
        weight = weight.flatten(0, 1)[..., None] & self.action_varies
        features = features.map(lambda x: x.flatten(0, 1))
        return self.head.loss(features, batch.actions.flatten(0, 1), weight), memory

    @torch.no_grad()
    def act(self, inputs: ModelInputs, memory: Memory, t: torch.Tensor) -> tuple[torch.Tensor, Memory]:
        """One policy step of inputs [B, ...] at control steps t int64 [B]: normalised chunk, memory."""
        features, memory = self.memory.step(self.backbone(inputs).features, memory, t)
        return self.head.sample(features), memory
