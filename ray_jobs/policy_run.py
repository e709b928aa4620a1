"""A policy's one run in MLflow: its training and its evaluations write to the same place."""

from __future__ import annotations

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
