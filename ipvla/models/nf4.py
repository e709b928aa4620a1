"""NF4 (Dettmers et al., QLoRA, arXiv 2305.14314): frozen linear layers in 4 bits, by bitsandbytes.

Each weight is one of 16 numbers times the largest of its block of 64; those scales are quantised again, to 8 bits.
A layer multiplies by the numbers that its bits stand for, in the compute dtype, and adapters train on top.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ipvla.models.backbones.hugging_face import DTYPES
from ipvla.models.backbones.protocol import Backbone

if TYPE_CHECKING:
    from ipvla.models.nf4_linear import NF4Linear


@dataclass(frozen=True)
class NF4Config:
    """Which frozen layers have 4 bits per weight, and how they multiply.

    Attributes:
        double: scales are quantised too: 4.13 bits per weight instead of 4.5.
        compute: "float32", "bfloat16" or "float16"; None for the dtype of the backbone's weights.
        towers: the linear layers of vision towers and projectors too, not of the language layers alone.
            Embeddings, convolutions and the last layer, from states to words, keep their dtype.
    """

    double: bool = True
    compute: str | None = None
    towers: bool = False

    def __post_init__(self) -> None:
        if self.compute is not None and self.compute not in DTYPES:
            raise ValueError(f"model.nf4.compute is {self.compute!r}; choose one of {sorted(DTYPES)}, or null")

    def same_bits(self, other: NF4Config) -> bool:
        """Are the same layers stored in the same way?"""
        return (self.double, self.towers) == (other.double, other.towers)

    def chosen(self, backbone: Backbone) -> dict[str, nn.Linear]:
        """The layers that get 4 bits, by name inside `backbone.vlm`, but those that have them."""
        inside = re.compile(".*" if self.towers else backbone.layer_pattern.replace("{layers}", r"\d+"))
        return {
            name: module
            for name, module in backbone.vlm.named_modules()
            if type(module) is nn.Linear
            and inside.search(name)
            and not name.endswith("lm_head")
            and module.in_features % 2 == 0  # or a row would share a byte with the next
        }

    def apply(self, backbone: Backbone) -> None:
        """Replaces layers that are not in 4 bits yet; on device `meta`, by places for those of a saved policy.

        Raises:
            ValueError: the backbone has none.
        """
        from ipvla.models.nf4_linear import NF4Linear  # takes seconds

        chosen = self.chosen(backbone)
        if not chosen and not quantised(backbone):
            raise ValueError("model.nf4 finds no linear layer in this backbone; set it to null")
        for name, module in chosen.items():
            compute = module.weight.dtype if self.compute is None else DTYPES[self.compute]
            _replace(backbone.vlm, name, NF4Linear(module, self.double, compute))
        backbone.vlm.is_loaded_in_4bit = True  # where PEFT looks


def quantised(module: nn.Module) -> dict[str, NF4Linear]:
    """The layers in 4 bits, by name."""
    if not any(is_packed(parameter) for parameter in module.parameters()):
        return {}
    from ipvla.models.nf4_linear import NF4Linear

    return NF4Linear.inside(module)


def is_packed(parameter: torch.Tensor) -> bool:
    """Does it hold two numbers in each of its bytes?"""
    return hasattr(parameter, "quant_state")


def parameter_count(module: nn.Module) -> int:
    """Numbers in the weights, however they are stored."""
    shapes = (p.quant_state.shape if is_packed(p) else p.shape for p in module.parameters())  # type: ignore[attr-defined]
    return sum(shape.numel() for shape in shapes)


def dequantise(backbone: Backbone) -> None:
    """Gives each layer the numbers that its bits stand for, and adds what LoRA on it has learned.

    The function stays, up to the rounding of that sum; where nothing was learned on a layer, bit for bit.
    """
    layers = quantised(backbone.vlm)
    if not layers:
        return
    from peft.tuners.lora import LoraLayer  # takes seconds

    for name, layer in layers.items():
        linear, place = layer.dequantised(), name.removesuffix(".base_layer")
        adapter = backbone.vlm.get_submodule(place)
        if isinstance(adapter, LoraLayer):
            with torch.no_grad():
                linear.weight += adapter.get_delta_weight("default").to(linear.weight.dtype)
        _replace(backbone.vlm, place, linear)
    backbone.vlm.is_loaded_in_4bit = False


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
