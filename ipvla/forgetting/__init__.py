"""Fine-tuning that does not forget: fragile subspaces, gradient and update surgery, drift and its thermostat.

The room knows policies only as `probed.ProbedModel`, `method.Target` and a list of language layers. A method
against forgetting is one file, chosen by `forgetting.method.type`.
"""

from ipvla.forgetting.distillation import DistillationConfig
from ipvla.forgetting.hsw import HSWConfig
from ipvla.forgetting.method import Gains, Method, MethodConfig, Target
from ipvla.forgetting.moment_methods import CorDAConfig, GPMConfig, InputDecayConfig, TwoSidedConfig
from ipvla.forgetting.weight_penalty import EWCConfig, L2SPConfig
from ipvla.forgetting.writer_updates import ProjectedUpdateConfig, RoutedMomentsConfig

__all__ = [
    "CorDAConfig",
    "DistillationConfig",
    "EWCConfig",
    "GPMConfig",
    "Gains",
    "HSWConfig",
    "InputDecayConfig",
    "L2SPConfig",
    "Method",
    "MethodConfig",
    "ProjectedUpdateConfig",
    "RoutedMomentsConfig",
    "Target",
    "TwoSidedConfig",
]
