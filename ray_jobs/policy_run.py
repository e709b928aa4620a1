"""A policy's one run in MLflow, which its training and its evaluations share, and the device that it acts on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from evaluators.success import SuccessConfig
from ipvla.policy import Policy
from ipvla.storage import StorageRoots
from ipvla.tracking import MLflowSink, RunIdentity


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


def placed(success: SuccessConfig, use_gpu: bool) -> tuple[Callable[[Path], Policy], SuccessConfig]:
    """How the policy is loaded, and `success` with what its actor asks Ray for."""
    if not use_gpu:
        return Policy.load, success
    resources = {"num_gpus": 1.0, **success.policy_resources}
    return partial(Policy.load, device="cuda"), replace(success, policy_resources=resources)
