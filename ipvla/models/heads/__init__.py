"""Action heads: one file each, chosen by `head.type`."""

from ipvla.models.heads.bins import BinsConfig
from ipvla.models.heads.flow import FlowConfig
from ipvla.models.heads.layerwise import LayerwiseConfig
from ipvla.models.heads.oft import OFTConfig
from ipvla.models.heads.openvla_tokens import OpenVLATokensConfig
from ipvla.models.heads.pi0 import Pi0HeadConfig
from ipvla.models.heads.pi0_fast import Pi0FastHeadConfig
from ipvla.models.heads.protocol import Head, HeadConfig, Sampling
from ipvla.models.heads.regression import RegressionConfig
from ipvla.models.heads.reverse_chain import ReverseChainConfig
from ipvla.models.heads.tokens import TokensConfig

__all__ = [
    "BinsConfig",
    "FlowConfig",
    "Head",
    "HeadConfig",
    "LayerwiseConfig",
    "OFTConfig",
    "OpenVLATokensConfig",
    "Pi0FastHeadConfig",
    "Pi0HeadConfig",
    "RegressionConfig",
    "ReverseChainConfig",
    "Sampling",
    "TokensConfig",
]
