"""Vision-language models behind one protocol: one file each, chosen by `backbone.type`."""

from ipvla.models.backbones.paligemma import PaliGemmaConfig
from ipvla.models.backbones.pi0 import PaliGemmaSizes, Pi0BackboneConfig
from ipvla.models.backbones.prismatic import PrismaticConfig
from ipvla.models.backbones.protocol import Backbone, BackboneConfig, BackboneOutput, Context, Embedded, KeysValues
from ipvla.models.backbones.qwen_vl import QwenVLConfig
from ipvla.models.backbones.smolvla import SmolVLABackboneConfig, SmolVLMSizes
from ipvla.models.backbones.smolvlm import SmolVLMConfig
from ipvla.models.backbones.tiny import TinyConfig

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneOutput",
    "Context",
    "Embedded",
    "KeysValues",
    "PaliGemmaConfig",
    "PaliGemmaSizes",
    "Pi0BackboneConfig",
    "PrismaticConfig",
    "QwenVLConfig",
    "SmolVLABackboneConfig",
    "SmolVLMConfig",
    "SmolVLMSizes",
    "TinyConfig",
]
