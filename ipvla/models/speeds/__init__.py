"""At how many speeds a model runs: one file per form, chosen by `speeds.type`."""

from ipvla.models.speeds.fast_in_slow import FastInSlowConfig
from ipvla.models.speeds.latent import LatentSpeedsConfig
from ipvla.models.speeds.protocol import Shown, SingleSpeedConfig, SlowPace, SpeedsConfig, TwoSpeedsConfig
from ipvla.models.speeds.two_speeds import FastPart, TwoSpeeds

__all__ = [
    "FastInSlowConfig",
    "FastPart",
    "LatentSpeedsConfig",
    "Shown",
    "SingleSpeedConfig",
    "SlowPace",
    "SpeedsConfig",
    "TwoSpeeds",
    "TwoSpeedsConfig",
]
