"""The dimensions of LIBERO-Plus that need no further assets: one file each, chosen by `perturbation.type`."""

from ipvla.sim.perturbations.camera import CameraConfig
from ipvla.sim.perturbations.language import LanguageConfig
from ipvla.sim.perturbations.light import LightConfig
from ipvla.sim.perturbations.noise import NoiseConfig
from ipvla.sim.perturbations.perturbation import (
    DIMENSIONS,
    LEVELS,
    Change,
    Perturbation,
    PerturbationConfig,
    perturbation_config,
    recorded_perturbation,
)
from ipvla.sim.perturbations.robot import RobotConfig

__all__ = [
    "DIMENSIONS",
    "LEVELS",
    "CameraConfig",
    "Change",
    "LanguageConfig",
    "LightConfig",
    "NoiseConfig",
    "Perturbation",
    "PerturbationConfig",
    "RobotConfig",
    "perturbation_config",
    "recorded_perturbation",
]
