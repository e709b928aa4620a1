"""Models at their published sizes, or a saved policy's, without any weight: all of it is on the device `meta`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import draccus
import torch

from ipvla.choices import did_you_mean
from ipvla.data.conventions import Conventions
from ipvla.files import read_record
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import BackboneConfig, Pi0BackboneConfig, PrismaticConfig, SmolVLABackboneConfig
from ipvla.models.backbones.random_prismatic import OPENVLA_7B, save_random_prismatic
from ipvla.models.backbones.weightless import described_words, paligemma_3b, qwen_vl_3b, smolvlm_500m
from ipvla.models.heads import OFTConfig, OpenVLATokensConfig, Pi0HeadConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.models.vla import IPVLA, IPVLAConfig
from ray_jobs.planning.footprint import Frame, prompt_tokens


@dataclass(frozen=True)
class Planned:
    """A model of these settings for data of these sizes.

    Attributes:
        answers: passes of its last part per answer: words, or steps of a flow; 0 for none.
        views: cameras; image_size: pixels of a side, before the backbone resizes them.
        proprio, actions: numbers per state and per action.
    """

    config: IPVLAConfig
    answers: int = 0
    views: int = 1
    image_size: int = 224
    proprio: int = 8
    actions: int = 7

    def build(self, lora: LoRAConfig | None) -> IPVLA:
        """With these adapters, or without. ValueError if the weights would be looked for elsewhere."""
        config = replace(self.config, lora=lora, nf4=None, osf=None)
        varies = torch.ones(self.actions, dtype=torch.bool)
        with torch.device("meta"):
            model = config.build(varies, self.proprio, self.views, self.image_size)
        return model.to("meta")

    def frame(self, model: IPVLA) -> Frame:
        """One frame, whose action OpenVLA learns as words behind the prompt."""
        tokens = prompt_tokens(model.backbone, self.views)
        words = self.actions if isinstance(self.config.head, OpenVLATokensConfig) else 0
        return Frame(tokens + words, self.views, self.image_size, self.config.chunk, self.actions)


def planned(name: str, directory: Path) -> Planned:
    """A published model, or the policy in a directory.

    Args:
        directory: where descriptions are written; must outlive what is built.

    Raises:
        ValueError: there is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](directory)
    path = Path(name).expanduser() / "policy.json"
    if path.is_file():
        return _saved(path)
    raise ValueError(
        f"plan is {name!r}; give a policy's directory (`ipvla import` makes one of a checkpoint), or a published "
        f"model: {did_you_mean(name, PUBLISHED)}"
    )


def _saved(path: Path) -> Planned:
    described = read_record(path)
    config: IPVLAConfig = draccus.decode(IPVLAConfig, described["model"])
    config = replace(config, backbone=config.backbone.beside(path.parent), head=config.head.beside(path.parent))
    conventions = Conventions.from_dict(described["transforms"])
    return Planned(
        config,
        _passes(config, conventions.statistics.action.dim),
        len(conventions.cameras),
        conventions.image_size,
        conventions.proprio_dim,
        conventions.statistics.action.dim,
    )


def _passes(config: IPVLAConfig, actions: int) -> int:
    if isinstance(config.head, OpenVLATokensConfig):
        return actions
    return int(getattr(config.head, "steps", 0))


def _openvla(directory: Path) -> Planned:
    backbone = _prismatic(directory)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), OpenVLATokensConfig(), chunk=1), 7)


def _openvla_oft(directory: Path) -> Planned:
    """Of LIBERO: two pictures, the proprioception, 8 actions at once."""
    backbone = replace(_prismatic(directory), action_places=56, proprio=True)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), OFTConfig(), chunk=8), views=2)


def _prismatic(directory: Path) -> PrismaticConfig:
    save_random_prismatic(directory, OPENVLA_7B, ["a"], torch.bfloat16, weights=False)
    return PrismaticConfig(directory)


def _pi(variant: Any) -> Callable[[Path], Planned]:
    def of(directory: Path) -> Planned:
        backbone = Pi0BackboneConfig(pretrained=described_words(directory))
        head = Pi0HeadConfig(variant=variant)
        return Planned(
            IPVLAConfig(backbone, NoMemoryConfig(), head, chunk=50), head.steps, 3, proprio=32, actions=32
        )

    return of


def _smolvla(directory: Path) -> Planned:
    backbone = SmolVLABackboneConfig(pretrained=described_words(directory))
    head = Pi0HeadConfig(variant="smolvla", width=720, layers=16, mlp=2048, heads=15, key_heads=5, head_size=64)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), head, chunk=50), head.steps, 3, 256, 6, 6)


def _of(backbone: Callable[[Path], BackboneConfig], **sizes: int) -> Callable[[Path], Planned]:
    """With the default head, as training begins one on a model that never acted."""
    return lambda directory: Planned(IPVLAConfig(backbone(directory), NoMemoryConfig()), **sizes)


#: By the name that `ipvla doctor --plan` takes.
PUBLISHED: Final[Mapping[str, Callable[[Path], Planned]]] = {
    "openvla": _openvla,
    "openvla-oft": _openvla_oft,
    "pi0": _pi("pi0"),
    "pi05": _pi("pi05"),
    "smolvla": _smolvla,
    "paligemma": _of(paligemma_3b),
    "qwen2.5-vl-3b": _of(qwen_vl_3b),
    "smolvlm2-500m": _of(smolvlm_500m, image_size=512),
}
