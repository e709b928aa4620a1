"""The jobs by name: what `ipvla NAME` and `ray_jobs.submit -- NAME` run, each a module of this package."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

#: Job -> the class of its settings, by name: a job is not imported before it is wanted.
JOBS: Final[Mapping[str, str]] = {
    "doctor": "DoctorConfig",
    "quickstart": "QuickstartConfig",
    "collect": "CollectConfig",
    "statistics": "StatisticsConfig",
    "convert": "ConvertConfig",
    "train": "ExperimentConfig",
    "subspaces": "SubspacesConfig",
    "interpolate": "InterpolateConfig",
    "evaluate": "EvaluateConfig",
    "memory_use": "MemoryUseJobConfig",
    "compare": "CompareConfig",
    "replay": "ReplayConfig",
    "merge": "MergeConfig",
    "paired": "PairedConfig",
    "serve": "ServeConfig",
    "tune": "SweepConfig",
    "mlflow_sync": "SyncConfig",
    "submit": "SubmitConfig",
}


def config_class(job: str) -> type[Any]:
    """The class of a job's settings; imports the job."""
    found: type[Any] = getattr(import_module(f"ray_jobs.{job}"), JOBS[job])
    return found


def summary(job: str) -> str:
    """What a job does: the first line of its module, which is read, not imported."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{job}.py").read_text())) or ""
    return text.splitlines()[0].removeprefix(f"`python -m ray_jobs.{job}`: ").rstrip(".")
