"""The jobs by name: what `ipvla NAME` and `ray_jobs.submit -- NAME` run, each a module of this package.

`data show` is two words on the command line, and the module `ray_jobs.data.show`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

#: Job -> the class of its settings, by name: a job is imported only when it runs.
JOBS: Final[Mapping[str, str]] = {
    "doctor": "DoctorConfig",
    "quickstart": "QuickstartConfig",
    "collect": "CollectConfig",
    "statistics": "StatisticsConfig",
    "convert": "ConvertConfig",
    "data show": "ShowConfig",
    "train": "ExperimentConfig",
    "subspaces": "SubspacesConfig",
    "interpolate": "InterpolateConfig",
    "evaluate": "EvaluateConfig",
    "robustness": "RobustnessConfig",
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


def named(words: Sequence[str]) -> tuple[str, list[str]]:
    """The job that a command line begins with, and the words behind it; its first word if that is no job."""
    first, *rest = words
    if rest and (both := f"{first} {rest[0]}") in JOBS:
        return both, rest[1:]
    return first, rest


def module(job: str) -> str:
    """The name of a job's module."""
    return f"ray_jobs.{job.replace(' ', '.')}"


def config_class(job: str) -> type[Any]:
    """The class of a job's settings; imports the job."""
    config_class: type[Any] = getattr(import_module(module(job)), JOBS[job])
    return config_class


def summary(job: str) -> str:
    """What a job does: the first line of its module, which is read, not imported."""
    path = Path(__file__).parents[1].joinpath(*job.split()).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0].removeprefix(f"`python -m {module(job)}`: ").rstrip(".")
