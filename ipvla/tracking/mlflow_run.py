"""A run at an MLflow server: found by its key or created, and sent records so that none counts twice."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

from ipvla.files import locked
from ipvla.tracking.mlflow_spool import Record, RunIdentity

_Item = TypeVar("_Item")
_logger = logging.getLogger("ipvla.tracking")

_METRICS_PER_CALL = 1000  # MLflow's limits
_PARAMS_PER_CALL = 100
_TAG_CHARACTERS = 8000
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc", "uc")
#: What no repetition will mend.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
KEY: Final = "ipvla.run_key"
PARENT_KEY: Final = "ipvla.parent_key"
_PARENT: Final = "mlflow.parentRunId"
NOTE: Final = "mlflow.note.content"
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/\s'\"]*@")


def without_password(text: str) -> str:
    """The text with `***` for what stands before the @ of an address, as people may see it."""
    return _CREDENTIALS.sub("***@", text)


def require_usable(tracking_uri: str) -> None:
    """ValueError for a URI that can never be reached, or means another place in each working directory."""
    scheme = tracking_uri.partition(":")[0].partition("+")[0]
    shown = without_password(tracking_uri)
    if scheme not in _SCHEMES:
        raise ValueError(
            f"tracking URI {shown!r} is of no kind that MLflow takes; use http://HOST:PORT or "
            "sqlite:////absolute/path/mlflow.db"
        )
    if scheme in ("http", "https") and not tracking_uri.partition("://")[2]:
        raise ValueError(f"tracking URI {shown!r} names no host; use http://HOST:PORT")
    if scheme == "sqlite" and not tracking_uri.partition(":")[2].startswith("////"):
        raise ValueError(f"tracking URI {shown} is relative; use sqlite:////absolute/path/mlflow.db")


class MLflowRun:
    """One run; the first `send` is the first request to the server.

    Args:
        spool: a directory that the processes of this run share; one of them creates it.
        tracking_uri: another server than the identity's.

    Attributes:
        run_id, experiment_id: None until then.
    """

    def __init__(self, identity: RunIdentity, spool: Path, tracking_uri: str | None = None) -> None:
        self._identity, self._directory = identity, spool
        self._uri = tracking_uri or identity.tracking_uri
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._client: Any = None
        #: Of an existing run: metric -> what it had before this process: steps, or steps and values.
        self._logged: dict[str, set[Any]] | None = None

    def send(self, records: Sequence[tuple[Record, int]], delivered: Callable[[int], None]) -> None:
        """Sends these in order and says after each how far it has come.

        A record that is sent twice changes nothing: a metric's point is the same by name, step, time and value;
        parameters that are there stay; files, tags and the status are set again. A record is one of

            {"metrics": {name: value}, "step", "time"}   time in ms since the epoch
            {"params": {name: value}}
            {"tags": {name: value}}
            {"artifact": path}                           a file or a directory
            {"model": name, "artifact", "tags", "alias"} a version in the registry, made of an artifact's name
            {"status": "RUNNING" or how it ended, "time"}

        What the server refuses for good is reported and left out.

        Raises:
            Exception: MLflow's own, when the server is away.
        """
        if not records:
            return
        if self.run_id is None:
            self._connect()
            with locked(self._directory / ".lock"):
                self._open()
        for kind, group in groupby(records, key=lambda one: _kind(one[0])):
            for part in _batches(list(group), _METRICS_PER_CALL if kind == "metrics" else 1):
                self._unless_refused(kind, [record for record, _ in part])
                delivered(part[-1][1])

    def _unless_refused(self, kind: str, records: Sequence[Record]) -> None:
        from mlflow.exceptions import MlflowException

        send: dict[str, Callable[[Record], None]] = {
            "params": self._params,
            "tags": self._set_tags,
            "artifact": self._artifact,
            "model": self._register,
            "status": self._status,
        }
        try:
            if kind == "metrics":
                self._metrics(records)
            else:
                send[kind](records[0])
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            _logger.warning("MLflow refuses %s of %s: %s", kind, self._identity.name, error)

    def _connect(self) -> None:
        # MLflow's own retries would hold a job's end for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri, os.environ.get("MLFLOW_REGISTRY_URI") or self._uri)

    def _open(self) -> None:
        identity = self._identity
        self.experiment_id = self._experiment()
        found = self._with_tag(KEY, identity.key)
        if found:
            self._logged = {}
            run_id = found[0].info.run_id
        else:
            tags = {**identity.tags, KEY: _quotable(identity.key)}
            if identity.parent_run_id:
                tags[_PARENT] = identity.parent_run_id
            if identity.parent_key:
                tags[PARENT_KEY] = _quotable(identity.parent_key)
            created = self._client.create_run(
                self.experiment_id, start_time=identity.started_ms, tags=tags, run_name=identity.name
            )
            run_id = created.info.run_id
        self._nest(run_id)
        self.run_id = run_id

    def _nest(self, run_id: str) -> None:
        """Links the run to its parent and children, whichever came first: each looks once it exists itself."""
        if self._identity.parent_key:
            for parent in self._with_tag(KEY, self._identity.parent_key):
                self._client.set_tag(run_id, _PARENT, parent.info.run_id)
        for child in self._with_tag(PARENT_KEY, self._identity.key, most=1000):
            if child.data.tags.get(_PARENT) != run_id:
                self._client.set_tag(child.info.run_id, _PARENT, run_id)

    def _with_tag(self, tag: str, value: str, most: int = 1) -> list[Any]:
        condition = f"tags.`{tag}` = '{_quotable(value)}'"
        found: list[Any] = self._client.search_runs([self.experiment_id], condition, max_results=most)
        return found

    def _experiment(self) -> str:
        name = self._identity.experiment
        for create in (True, False):  # another process may create it between our two calls
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name, self._artifact_location()))
            except Exception:
                if not create:
                    raise
        raise AssertionError("unreachable")

    def _artifact_location(self) -> str | None:
        """Beside a SQLite file (MLflow's own default is the working directory); a server knows its own."""
        if not self._uri.startswith("sqlite:"):
            return None
        return (
            Path(self._uri.removeprefix("sqlite:///")).parent / "mlartifacts" / self._identity.experiment
        ).as_uri()

    def _metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["metrics"].items()
            if self._is_new(name, record["step"], value)
        ]
        for part in _batches(points, _METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=part)

    def _is_new(self, name: str, step: int, value: float) -> bool:
        """False for what an earlier process of this run has logged already."""
        if self._logged is None:
            return True
        renews = self._identity.renews
        if name not in self._logged:
            history = self._client.get_metric_history(self.run_id, name)
            self._logged[name] = {(point.step, point.value) if renews else point.step for point in history}
        return ((step, value) if renews else step) not in self._logged[name]

    def _params(self, record: Record) -> None:
        from mlflow.entities import Param

        logged = self._client.get_run(self.run_id).data.params  # a parameter cannot be changed
        params = [Param(name, value) for name, value in record["params"].items() if name not in logged]
        for part in _batches(params, _PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=part)

    def _set_tags(self, record: Record) -> None:
        for name, value in record["tags"].items():
            self._client.set_tag(self.run_id, name, value[:_TAG_CHARACTERS])

    def _artifact(self, record: Record) -> None:
        path = Path(record["artifact"])
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), path.name)
        elif path.exists():
            self._client.log_artifact(self.run_id, str(path))
        else:
            _logger.warning("%s is gone; MLflow's run %s does without it", path, self._identity.name)

    def _register(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        name, tags = record["model"], record["tags"]
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._version(name, tags)
        if version is None:
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{record['artifact']}"
            version = self._client.create_model_version(name, source, self.run_id, tags=tags).version
        if record["alias"]:
            self._client.set_registered_model_alias(name, record["alias"], version)

    def _version(self, name: str, tags: Mapping[str, str]) -> str | None:
        """The version that this run has registered with these tags already."""
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.run_id == self.run_id and tags.items() <= version.tags.items():
                return str(version.version)
        return None

    def _status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["status"], record["time"])


def _kind(record: Record) -> str:
    return next(iter(record))


def _batches(items: Sequence[_Item], size: int) -> Iterable[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _quotable(value: str) -> str:
    """MLflow's filters know no escape for quotes."""
    return value.replace("'", "")
