"""A policy's one run in MLflow, which its training and its evaluations share, and the device that it acts on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ipvla.experiment import ExperimentConfig
from ipvla.models.heads import Sampling
from ipvla.models.speeds import SlowPace
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.fingerprint import fingerprint
from ipvla.storage import StorageRoots
from ipvla.tracking import MLflowSink, RunIdentity, waiting, without_password
from ray_jobs.running.cluster import Demand

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from evaluators.success import SuccessConfig

#: Aliases in the model registry: the last that was trained, and the one that a sweep chose.
NEWEST: Final = "newest"
BEST: Final = "best"


def policy_run(
    roots: StorageRoots,
    study: str,
    name: str,
    *,
    parent_run_key: str | None = None,
    parent_run_id: str | None = None,
    renews: bool = False,
) -> MLflowSink:
    """The run `name` of `study`, found again by its directory `run_root_dir/study/name`; see `RunIdentity`."""
    identity = RunIdentity(
        roots.mlflow_uri,
        study,
        name,
        str(roots.runs / study / name),
        parent_key=parent_run_key,
        parent_run_id=parent_run_id,
        renews=renews,
    )
    return MLflowSink(identity, roots.mlflow_spool)


def training_run(config: ExperimentConfig, *, renews: bool = False) -> MLflowSink:
    """The run of an experiment's policy."""
    parent = {"parent_run_key": config.parent_run_key, "parent_run_id": config.parent_run_id}
    return policy_run(config, config.study, config.name, renews=renews, **parent)


def warn_of_waiting(roots: StorageRoots) -> None:
    """Says at a job's end whether MLflow lacks records; workers' own warnings lie in the cluster's logs."""
    if records := waiting(roots.mlflow_spool):
        _logger.warning(
            "MLflow: %d records wait for %s; once it answers: ipvla mlflow_sync --run_root_dir %s",
            *(records, without_password(roots.mlflow_uri), roots.runs),
        )


def publish(sink: MLflowSink, config: ExperimentConfig, *, register: bool, alias: str = NEWEST) -> None:
    """Settings, adapters and policy of a finished training as artifacts, and as a version in the model registry.

    The version's tags are `policy_sha256`, `base_sha256` (of `start_from`, if any), `artifact` (whether it is the
    policy or, that being larger than `tracking.policy_mib`, its adapters) and the fingerprint.

    Args:
        alias: moved to this version.
    """
    directory = config.run_directory
    sink.log_artifact(directory / "experiment.json")
    registered = None
    if config.exports_adapters:
        registered = "adapters"
        sink.log_artifact(directory / registered)
    if _mib(directory / "policy") <= config.tracking.policy_mib:
        registered = "policy"
        sink.log_artifact(directory / registered)
    if register and registered is not None:
        base = {"base_sha256": _sha256(config.start_from)} if config.start_from else {}
        own = {"policy_sha256": _sha256(directory / "policy"), "artifact": registered}
        made_with = {f"fingerprint.{name}": value for name, value in fingerprint().items()}
        model = config.tracking.model_name(config.study, config.name)
        sink.register(model, registered, {**own, **base, **made_with}, alias)


def _sha256(policy: Path) -> str:
    return PolicySource(Policy.load, policy).sha256()


def _mib(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**20


def variant(unnorm_key: str | None, sampling: Sampling, slow: SlowPace | None = None) -> str | None:
    """What decides a policy's actions besides its files, for its hash; None for nothing."""
    return " ".join(filter(None, (unnorm_key, str(sampling), str(slow or "")))) or None


def policy_demand(success: SuccessConfig) -> Demand:
    """What the policy's actors ask Ray for, of `success` as `placed` gives it."""
    asked = success.policy_resources
    each = {"CPU": asked.get("num_cpus", 0.0), "GPU": asked.get("num_gpus", 0.0)}
    actors = "1 policy actor" if success.policy_replicas == 1 else f"{success.policy_replicas} policy actors"
    return Demand(actors, each, success.policy_replicas, "change success.policy_resources or policy_replicas")


def placed(success: SuccessConfig, use_gpu: bool) -> tuple[Callable[[Path], Policy], SuccessConfig]:
    """How the policy is loaded, and `success` with what its actor asks Ray for."""
    slow = success.slow if str(success.slow) else None
    if not use_gpu:
        return partial(Policy.load, slow=slow) if slow else Policy.load, success
    resources = {"num_gpus": 1.0, **success.policy_resources}
    return partial(Policy.load, device="cuda", slow=slow), replace(success, policy_resources=resources)
