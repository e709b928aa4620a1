"""A policy's one run in MLflow, which its training and its evaluations share, and the device that it acts on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from evaluators.success import SuccessConfig
from ipvla.policy import Policy
from ipvla.storage import StorageRoots
from ipvla.tracking import MLflowSink


def policy_run(roots: StorageRoots, study: str, name: str, parent_run_id: str | None) -> MLflowSink:
    """The run of policy `name` of `study`, found again by its directory `run_root_dir/study/name`."""
    return MLflowSink(
        roots.mlflow_uri,
        experiment=study,
        run_name=name,
        run_key=str(roots.runs / study / name),
        parent_run_id=parent_run_id,
    )


def placed(success: SuccessConfig, use_gpu: bool) -> tuple[Callable[[Path], Policy], SuccessConfig]:
    """How the policy is loaded, and `success` with what its actor asks Ray for."""
    if not use_gpu:
        return Policy.load, success
    resources = {"num_gpus": 1.0, **success.policy_resources}
    return partial(Policy.load, device="cuda"), replace(success, policy_resources=resources)
