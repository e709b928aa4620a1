"""Action heads: one file each, chosen by `head.type`."""

from ipvla.models.heads.bins import BinsConfig
from ipvla.models.heads.pi0 import Pi0HeadConfig
from ipvla.models.heads.protocol import Head, HeadConfig
from ipvla.models.heads.regression import RegressionConfig

__all__ = ["BinsConfig", "Head", "HeadConfig", "Pi0HeadConfig", "RegressionConfig"]
