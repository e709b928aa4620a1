"""PEFT LoRA adapters on chosen layers and modules of a backbone (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ipvla.models.adapted_modules import AdaptedModules
from ipvla.models.backbones.protocol import Backbone


@dataclass(frozen=True)
class LoRAConfig(AdaptedModules):
    """How large the adapters are.

    Attributes:
        rank, alpha: the update is (alpha / rank) B A.
        dropout: on the adapter's input, in [0, 1).
    """

    setting: ClassVar[str] = "lora"

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")

    def apply(self, backbone: Backbone) -> None:
        """Wraps `backbone.vlm` by PEFT and freezes what is not an adapter.

        Raises:
            ValueError: no module of the backbone has such a name.
        """
        import peft  # takes seconds

        pattern = self.existing_pattern(backbone)
        backbone.vlm = peft.get_peft_model(
            backbone.vlm,
            peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=pattern),
        )


def merge_adapters(backbone: Backbone) -> None:
    """Adds what LoRA adapters have learned to the weights and takes the adapters away; the function stays.

    Raises:
        ValueError: the backbone has adapters of another kind.
    """
    if adapters(backbone):
        backbone.vlm = backbone.vlm.merge_and_unload()


def save_adapters(backbone: Backbone, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes a backbone's adapters as `PeftModel.from_pretrained(base, directory)` reads them.

    `weights`: those of `backbone.vlm`, whole, where they were gathered already.
    """
    backbone.vlm.save_pretrained(str(directory), state_dict=weights)


@dataclass(frozen=True)
class Adapter:
    """What a module has learned is scale * B A.

    Attributes:
        a: [r, in], of a convolution [r, in, kernel ...].
        b: [out, r], of a convolution [out, r, 1 ...].
        scale: alpha / r.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float


def adapters(backbone: Backbone) -> dict[str, Adapter]:
    """Every LoRA adapter under its module's name inside the backbone without adapters; none where there are none.

    Raises:
        ValueError: the backbone has adapters of another kind.
    """
    if not hasattr(backbone.vlm, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    modules = {
        name.removeprefix(prefix): Adapter(
            module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        )
        for name, module in backbone.vlm.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not modules:
        kind = backbone.vlm.peft_config["default"].peft_type.value
        raise ValueError(
            f"the backbone's adapters are {kind}, not LoRA; set model.lora, or train without adapters"
        )
    return modules


def factors(backbone: Backbone) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A [r, in] and B [out, r] of every adapter on a linear module, under the name that `targets` gives it."""
    return {name: (one.a, one.b) for name, one in adapters(backbone).items() if one.a.ndim == 2}


def layer_of(backbone: Backbone, module: str) -> int | None:
    """The language layer that a module of `backbone.vlm` belongs to; None outside of them."""
    match = re.search(backbone.layer_pattern.replace("{layers}", r"\d+"), module)
    return int(match[1]) if match else None
