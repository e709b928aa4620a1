"""Which weights of a backbone an adapter is put on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ipvla.models.backbones.protocol import Backbone


@dataclass(frozen=True)
class AdaptedModules:
    """Weights by their modules' names.

    Attributes:
        setting: what errors call these settings.
        last_layers: how many of the last language layers; 0 means all of them.
        modules: names of linear modules inside a language layer. The default is what layers of every backbone
            have: `gate_proj`, which Gemma's have besides, is adapted only if it is named.
        extra: full names of modules outside the language layers, e.g. `trunk.conv1` or `trunk.mix`.
        freeze_rest: memory and head are frozen too, so that adapters alone are trained.
    """

    setting: ClassVar[str]

    last_layers: int = 0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    extra: tuple[str, ...] = ()
    freeze_rest: bool = False

    def __post_init__(self) -> None:
        if not self.modules and not self.extra:
            raise ValueError(
                f"{self.setting}.modules and {self.setting}.extra are both empty; name at least one module"
            )

    def target_pattern(self, backbone: Backbone) -> str:
        """Regular expression over module names, as PEFT's `target_modules` takes it."""
        count = backbone.num_layers
        if self.last_layers > count:
            raise ValueError(
                f"{self.setting}.last_layers is {self.last_layers}, but the backbone has {count} language layers"
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

    def weights(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """What adapters would be added to, convolutions too, by name inside `backbone.vlm` without adapters."""
        pattern = re.compile(self.target_pattern(backbone))
        named = backbone.vlm.named_modules()
        return {f"{name}.weight": module.weight for name, module in named if pattern.fullmatch(name)}

    def existing_pattern(self, backbone: Backbone) -> str:
        """`target_pattern`, if the backbone has a module of every name; ValueError otherwise."""
        names = [name for name, _ in backbone.vlm.named_modules()]
        missing = [
            m for m in (*self.modules, *self.extra) if not any(n == m or n.endswith(f".{m}") for n in names)
        ]
        if missing:
            raise ValueError(f"{self.setting} names {missing}, which {type(backbone.vlm).__name__} does not have")
        return self.target_pattern(backbone)
