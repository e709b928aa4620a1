"""PEFT LoRA adapters on chosen layers and modules of a backbone (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import peft
from torch import nn

from ipvla.models.backbones.protocol import Backbone


@dataclass(frozen=True)
class LoRAConfig:
    """Which weights get an adapter.

    Attributes:
        rank, alpha: the update is (alpha / rank) B A.
        dropout: on the adapter's input, in [0, 1).
        last_layers: how many of the last language layers; 0 means all of them.
        modules: names of linear modules inside a language layer.
        extra: full names of modules outside the language layers, e.g. `trunk.conv1` or `trunk.mix`.
        freeze_rest: memory and head are frozen too, so that adapters alone are trained.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    last_layers: int = 0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    extra: tuple[str, ...] = ()
    freeze_rest: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")
        if not self.modules and not self.extra:
            raise ValueError("lora.modules and lora.extra are both empty; name at least one module")

    def target_pattern(self, backbone: Backbone) -> str:
        """Regular expression over module names, as PEFT's `target_modules` takes it."""
        count = backbone.num_layers
        if self.last_layers > count:
            raise ValueError(
                f"lora.last_layers is {self.last_layers}, but the backbone has {count} language layers"
            )
        layers = range(count - (self.last_layers or count), count)
        inside = backbone.layer_pattern.replace("{layers}", "|".join(map(str, layers)))
        choices = [rf"{inside}(.*\.)?({'|'.join(map(re.escape, self.modules))})"] if self.modules else []
        choices += [re.escape(name) for name in self.extra]
        return rf"(.*\.)?({'|'.join(choices)})"

    def targets(self, backbone: Backbone) -> dict[str, nn.Linear]:
        """The linear modules of a backbone without adapters that would get one, by name inside `backbone.vlm`."""
        pattern = re.compile(self.target_pattern(backbone))
        named = backbone.vlm.named_modules()
        return {name: m for name, m in named if isinstance(m, nn.Linear) and pattern.fullmatch(name)}

    def apply(self, backbone: Backbone) -> None:
        """Wraps `backbone.vlm` by PEFT and freezes what is not an adapter.

        Raises:
            ValueError: no module of the backbone has such a name.
        """
        names = [name for name, _ in backbone.vlm.named_modules()]
        pattern = self.target_pattern(backbone)
        missing = [
            m for m in (*self.modules, *self.extra) if not any(n == m or n.endswith(f".{m}") for n in names)
        ]
        if missing:
            raise ValueError(f"lora names {missing}, which {type(backbone.vlm).__name__} does not have")
        backbone.vlm = peft.get_peft_model(
            backbone.vlm,
            peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=pattern),
        )


def save_adapters(backbone: Backbone, directory: Path) -> None:
    """Writes a backbone's adapters as `PeftModel.from_pretrained(base, directory)` reads them."""
    backbone.vlm.save_pretrained(str(directory))


def factors(backbone: Backbone) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A [r, in] and B [out, r] of every adapter on a linear module, under the name that `targets` gives it."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in backbone.vlm.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def layer_of(backbone: Backbone, module: str) -> int | None:
    """The language layer that a module of `backbone.vlm` belongs to; None outside of them."""
    match = re.search(backbone.layer_pattern.replace("{layers}", r"\d+"), module)
    return int(match[1]) if match else None
