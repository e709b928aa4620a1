"""What of a training run MLflow gets beside its metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackingConfig:
    """What of a training run MLflow gets beside metrics, settings and adapters.

    Attributes:
        policy_mib: the finished policy becomes an artifact too if it has at most so many MiB; 0 for never. The
            default leaves out what fills a server's disk, 7e9 weights in bfloat16 say (13 GiB).
        register: the policy, or its adapters where it is no artifact, becomes a version of a model in the
            registry.
        model: that model's name; None for STUDY.NAME.
        system_every_s: seconds between two looks at CPU, memory and GPU of every worker; 0 for none.
    """

    policy_mib: float = 1024.0
    register: bool = True
    model: str | None = None
    system_every_s: float = 10.0

    def __post_init__(self) -> None:
        if self.policy_mib < 0:
            raise ValueError(f"tracking.policy_mib is {self.policy_mib}; give a size, or 0 for no policy")
        if self.system_every_s != 0 and self.system_every_s < 2:
            raise ValueError(f"tracking.system_every_s is {self.system_every_s}; give at least 2, or 0 for none")
        if self.model is not None and (not self.model or set(self.model) & set("/:")):
            raise ValueError(f"tracking.model is {self.model!r}; MLflow takes names without / and :")

    def model_name(self, study: str, name: str) -> str:
        """The registered model of run `name` of `study`."""
        return self.model or f"{study}.{name}".replace("/", "_").replace(":", "_")
