"""PEFT's orthogonal subspace fine-tuning: large singular directions stay (Nayak et al., arXiv 2504.07097)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ipvla.models.adapted_modules import AdaptedModules
from ipvla.models.backbones.protocol import Backbone


@dataclass(frozen=True)
class OSFConfig(AdaptedModules):
    """W = U S V' is split at a rank: the larger singular values keep their directions, the others are trained.

    PEFT makes gradients orthogonal to the frozen directions, but not AdamW's steps: the directions are preserved
    only approximately. A trained module is as large as its weight: far larger than LoRA.

    Attributes:
        effective_rank: share of a weight's singular directions that is frozen, in (0, 1).
    """

    setting: ClassVar[str] = "osf"

    effective_rank: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.effective_rank < 1:
            raise ValueError(f"osf.effective_rank is {self.effective_rank}; it must be between 0 and 1")

    def apply(self, backbone: Backbone) -> None:
        """Wraps `backbone.vlm` by PEFT and freezes what is not trained under OSF; the function stays as it is.

        Raises:
            ValueError: the backbone has no module of such a name, or one that is not linear or too small to split.
        """
        pattern = self.existing_pattern(backbone)
        linear = self.targets(backbone)
        if other := sorted({name.removesuffix(".weight") for name in self.weights(backbone)} - linear.keys()):
            raise ValueError(f"osf names {other}, which are not linear; OSF splits matrices only")
        smallest = min(min(module.weight.shape) for module in linear.values())
        if smallest * self.effective_rank < 1:
            raise ValueError(
                f"osf.effective_rank is {self.effective_rank}, which freezes nothing of a weight with {smallest} "
                f"singular directions; make it at least {math.ceil(1000 / smallest) / 1000}"
            )
        import peft  # takes seconds
        from peft.tuners.osf import OSFLayer

        backbone.vlm = peft.get_peft_model(
            backbone.vlm, peft.OSFConfig(effective_rank=self.effective_rank, target_modules=pattern)
        )
        for layer in backbone.vlm.modules():
            if isinstance(layer, OSFLayer):
                _save_what_the_forward_pass_reads(layer)


def _save_what_the_forward_pass_reads(layer: nn.Module) -> None:
    """PEFT would split the weights again, but a policy is loaded onto others than those that were split."""
    from peft.tuners._buffer_dict import BufferDict

    for buffers in layer.children():
        if isinstance(buffers, BufferDict):
            for name, tensor in list(buffers.items()):
                buffers.register_buffer(name, tensor, persistent=True)
