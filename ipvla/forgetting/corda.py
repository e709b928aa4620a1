"""CorDA: adapters begin in the directions that matter least to the teacher (arXiv 2406.05223).

The arithmetic is PEFT's (`ipvla.models.adapters`); training itself is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ipvla.forgetting.method import Method, MethodConfig, Target
from ipvla.forgetting.module_statistics import ModuleStatistics


@MethodConfig.register_subclass("corda")
@dataclass(frozen=True)
class CorDAConfig(MethodConfig):
    """On every adapter, in the knowledge-preserved mode; all of them must be on linear modules."""

    moves_base: ClassVar[bool] = True

    def install(self, target: Target) -> Method:
        names = target.all_factors()
        moments = target.measured(ModuleStatistics).of_inputs
        target.begin_by_corda({name: moment for name, moment in moments.items() if name in names})
        return Method()
