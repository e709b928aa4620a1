"""Action heads: one file each, chosen by `head.type`."""

from ipvla.models.heads.bins import BinsConfig
from ipvla.models.heads.protocol import Head, HeadConfig
from ipvla.models.heads.regression import RegressionConfig
from ipvla.models.heads.reverse_chain import ReverseChainConfig
from ipvla.models.heads.tokens import TokensConfig

__all__ = ["BinsConfig", "Head", "HeadConfig", "RegressionConfig", "ReverseChainConfig", "TokensConfig"]
