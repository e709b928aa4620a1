"""Action heads: one file each, chosen by `head.type`."""

from ipvla.models.heads.bins import BinsConfig
from ipvla.models.heads.oft import OFTConfig
from ipvla.models.heads.openvla_tokens import OpenVLATokensConfig
from ipvla.models.heads.pi0 import Pi0HeadConfig
from ipvla.models.heads.protocol import Head, HeadConfig
from ipvla.models.heads.regression import RegressionConfig

__all__ = [
    "BinsConfig",
    "Head",
    "HeadConfig",
    "OFTConfig",
    "OpenVLATokensConfig",
    "Pi0HeadConfig",
    "RegressionConfig",
]
