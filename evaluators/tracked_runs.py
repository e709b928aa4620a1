"""Runs in an MLflow store, for reading: how to find them, and to distinguish them by what results depend on."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from ipvla.tracking import without_password

FINGERPRINT: Final = "fingerprint."
#: Of the fingerprint, what makes success another quantity; what else differs is told.
PLAYED_BY: Final = ("protocol", "suite", "suite_version", "perturbation")
#: Results without one do not have it.
_PERTURBATION = FINGERPRINT + "perturbation"
#: Differs between any two policies.
_OF_THE_POLICY = "policy_sha256"


class TrackingError(ValueError):
    """An MLflow store cannot be read, or has no such runs."""


@dataclass(frozen=True)
class TrackedRun:
    """One run.

    Attributes:
        study: its experiment's name.
        status: "finished", "running", "failed" or "killed", as MLflow has it.
        wall_s: from its first start to its last end, pauses included; to now while it runs.
        metrics: name -> latest value.
    """

    run_id: str
    name: str
    study: str
    status: str = "finished"
    wall_s: float = 0.0
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """What was logged as `metric/low` and `metric/high`."""
        ends = [self.metrics.get(f"{metric}/{end}") for end in ("low", "high")]
        return None if None in ends else (ends[0], ends[1])  # type: ignore[return-value]


class RunStore:
    """Reads from an MLflow server or database.

    Args:
        uri: a server's address, or `sqlite:////absolute/path/mlflow.db`.

    Raises:
        TrackingError: there is no such database, or it is not MLflow's. Every method: the store does not answer.
    """

    def __init__(self, uri: str) -> None:
        if uri.startswith("sqlite:///"):
            _require_database(Path(uri.removeprefix("sqlite:///")))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's own would take minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        #: The address, without a password.
        self.uri = without_password(uri)
        with self._answering():
            self._client = MlflowClient(uri)

    def studies(self) -> dict[str, str]:
        """Name -> id of every experiment, those made last first."""
        with self._answering():
            page = self._client.search_experiments()
            found = list(page)
            while page.token:
                page = self._client.search_experiments(page_token=page.token)
                found += page
        return {one.name: str(one.experiment_id) for one in found}

    def find(
        self, studies: Mapping[str, str], filter_string: str = "", *, order_by: str = "", limit: int = 1000
    ) -> list[TrackedRun]:
        """The first `limit` runs of these studies (name -> id) that MLflow's filter lets through.

        Args:
            order_by: MLflow's, e.g. "metrics.`success/place` DESC"; by default in the order of their starts.
        """
        names = {identifier: name for name, identifier in studies.items()}
        order = order_by or "attributes.start_time ASC"
        with self._answering("filter or order_by"):
            found = self._client.search_runs([*names], filter_string, max_results=limit, order_by=[order])
        return [_read(run, names[run.info.experiment_id]) for run in found]

    def curve(self, run: TrackedRun, metric: str) -> list[tuple[int, float]]:
        """(step, value) in the order of steps; of a step that was logged again, the last value."""
        with self._answering():
            history = self._client.get_metric_history(run.run_id, metric)
        return sorted({one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}.items())

    @contextmanager
    def _answering(self, question: str = "the store's address") -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            refused = error.error_code == "INVALID_PARAMETER_VALUE"
            trouble = f"does not understand {question}" if refused else "does not answer"
            reason = shorten(str(error), 240, placeholder=" ...")
            raise TrackingError(without_password(f"MLflow at {self.uri} {trouble}: {reason}")) from error


def _require_database(path: Path) -> None:
    """Checks the file: MLflow would create its tables in any file."""
    if not path.is_file():
        raise TrackingError(f"there is no MLflow database {path}; name another store, or train something first")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("SELECT 1 FROM experiments, runs LIMIT 1")
    except sqlite3.Error as error:
        raise TrackingError(f"{path} is no database of MLflow's ({error}); name another store") from error


def _read(run: Any, study: str) -> TrackedRun:
    info = run.info
    end_ms = None if info.status == "RUNNING" else info.end_time  # a run that goes on keeps its last end
    end_ms = end_ms or time.time() * 1000
    return TrackedRun(
        info.run_id,
        info.run_name,
        study,
        info.status.lower(),
        (end_ms - info.start_time) / 1000,
        dict(run.data.params),
        dict(run.data.metrics),
    )


def labels(runs: Sequence[TrackedRun]) -> list[str]:
    """A name for each: its own; with its study, or the beginning of its id, where that is not enough."""
    studies = {run.study for run in runs}
    names = [run.name if len(studies) < 2 else f"{run.study}/{run.name}" for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} {run.run_id[:8]}"
        for name, run in zip(names, runs, strict=True)
    ]


def differing_fingerprints(runs: Sequence[TrackedRun]) -> dict[str, dict[str, list[str]]]:
    """Of what results depend on, what is not the same for all: name -> value -> runs."""
    by_value: dict[str, dict[str, list[str]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        played = FINGERPRINT + "protocol" in run.params
        for name, value in {**({_PERTURBATION: "none"} if played else {}), **run.params}.items():
            if name.startswith(FINGERPRINT) and name != FINGERPRINT + _OF_THE_POLICY:
                by_value.setdefault(name.removeprefix(FINGERPRINT), {}).setdefault(value, []).append(label)
    return {name: values for name, values in by_value.items() if len(values) > 1}
