"""Fine-tuning that does not forget: fragile subspaces, gradient and update surgery, drift and its thermostat.

The room knows policies only as `probed.ProbedModel`, `method.Target` and a list of language layers. A method
against forgetting is one file, chosen by `forgetting.method.type`.
"""

from ipvla.forgetting.corda import CorDAConfig
from ipvla.forgetting.distillation import DistillationConfig
from ipvla.forgetting.gains import Gains
from ipvla.forgetting.gpm import GPMConfig
from ipvla.forgetting.hsw import HSWConfig
from ipvla.forgetting.input_decay import InputDecayConfig
from ipvla.forgetting.method import Method, MethodConfig, Target
from ipvla.forgetting.projected_update import ProjectedUpdateConfig
from ipvla.forgetting.routed_moments import RoutedMomentsConfig
from ipvla.forgetting.two_sided import TwoSidedConfig
from ipvla.forgetting.weight_penalty import EWCConfig, L2SPConfig

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
