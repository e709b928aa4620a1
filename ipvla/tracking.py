"""Where metrics go: the console, a JSONL file, MLflow. A run logs to several through `Sinks`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

_logger = logging.getLogger(__name__)

_BATCH = 500  # points per `log_batch`; MLflow takes at most 1000
_FLUSH_S = 5.0
_RETRY_S = 60.0
_PARAMETER_CHARACTERS = 6000  # MLflow's limit


class MetricSink(Protocol):
    """Takes a run's metrics, parameters and files."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_params(self, params: Mapping[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def close(self, status: str = "FINISHED") -> None:
        """`status` is "FINISHED", "FAILED" or "KILLED"."""


@dataclass(frozen=True)
class Sinks:
    """Forwards to each of `sinks`."""

    sinks: Sequence[MetricSink] = ()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for sink in self.sinks:
            sink.log(metrics, step)

    def log_params(self, params: Mapping[str, object]) -> None:
        for sink in self.sinks:
            sink.log_params(params)

    def log_artifact(self, path: Path) -> None:
        for sink in self.sinks:
            sink.log_artifact(path)

    def close(self, status: str = "FINISHED") -> None:
        for sink in self.sinks:
            sink.close(status)


class ConsoleSink:
    """One log line per call, through the standard `logging` of `ipvla.tracking`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        _logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def log_params(self, params: Mapping[str, object]) -> None:
        _logger.info("parameters  %s", "  ".join(f"{name}={value}" for name, value in params.items()))

    def log_artifact(self, path: Path) -> None:
        _logger.info("wrote %s", path)

    def close(self, status: str = "FINISHED") -> None:
        _logger.info("%s", status.lower())


class JsonlSink:
    """One JSON object per call, `{"step", "time", <metric>: <value>}`, on disk before `log` returns.

    Args:
        path: appended to.
        resume_step: the run continues after this step. Lines of later steps, written by the run that was
            interrupted, are dropped: they will be written again. None keeps every complete line.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in read_jsonl(path) if resume_step is None or line["step"] <= resume_step]
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
            unfinished.replace(path)
        self._file: IO[str] = path.open("a")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def log_params(self, params: Mapping[str, object]) -> None:
        """Parameters have their own file (the run's configuration)."""

    def log_artifact(self, path: Path) -> None:
        """Artifacts lie beside the file already."""

    def close(self, status: str = "FINISHED") -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `JsonlSink`'s file; the last may have been cut by a kill."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class MLflowSink:
    """One MLflow run, found again by `run_key` when the job is started again.

    What is logged waits in memory and is sent in batches. A server that does not answer is reported once and
    tried again every minute; nothing here ever raises into the run.

    Args:
        tracking_uri: a server, or an absolute `sqlite:////...` (Ray changes the working directory).
        experiment: created if missing.
        run_name: what the UI shows.
        run_key: names this run for ever, e.g. the run directory; kept as the tag `ipvla.run_key`.
        parent_run_id: nests the run.

    Raises:
        ValueError: a relative SQLite URI.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        run_key: str,
        *,
        parent_run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if tracking_uri.startswith("sqlite:///") and not tracking_uri.startswith("sqlite:////"):
            raise ValueError(f"tracking URI {tracking_uri} is relative; use sqlite:////absolute/path/mlflow.db")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own retries would hold the training loop for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._uri, self._experiment, self._run_name = tracking_uri, experiment, run_name
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        self._tags = {**(tags or {}), **parent, "ipvla.run_key": run_key}
        self._client: Any = None
        self._experiment_id: str | None = None
        self._run_id: str | None = None
        self._logged_to: dict[str, int] | None = None  # metric -> last step of the run that is resumed
        self._points: list[tuple[str, float, int, int]] = []  # name, value, time (ms), step
        self._params: dict[str, str] = {}
        self._artifacts: list[Path] = []
        self._flushed, self._retry_at, self._warned = time.monotonic(), 0.0, False
        self._try(self._open)

    @property
    def run_id(self) -> str | None:
        """None while the server has not been reached."""
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        return self._experiment_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._points += [(name, float(value), now, step) for name, value in metrics.items()]
        if len(self._points) >= _BATCH or time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def log_params(self, params: Mapping[str, object]) -> None:
        self._params |= {name: str(value)[:_PARAMETER_CHARACTERS] for name, value in params.items()}
        self.flush()

    def log_artifact(self, path: Path) -> None:
        self._artifacts.append(path)
        self.flush()

    def note(self, markdown: str) -> None:
        """What the UI shows as the run's description."""
        self._try(lambda: self._client.set_tag(self._run_id, "mlflow.note.content", markdown))

    def flush(self) -> None:
        """Sends what waits, unless the server failed within the last minute."""
        if time.monotonic() >= self._retry_at:
            self._try(self._send)

    def close(self, status: str = "FINISHED") -> None:
        self._try(self._send)
        if self._run_id is not None:
            self._try(lambda: self._client.set_terminated(self._run_id, status))

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except Exception as error:  # tracking must not end a training run
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._warned:
                _logger.warning("MLflow at %s failed (%s); the run goes on without it", self._uri, error)
            self._warned = True

    def _open(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        self._experiment_id = self._find_or_create_experiment()
        key = self._tags["ipvla.run_key"].replace("'", "")
        self._tags["ipvla.run_key"] = key
        found = self._client.search_runs([self._experiment_id], f"tags.`ipvla.run_key` = '{key}'", max_results=1)
        if found:
            self._logged_to = {}
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            self._run_id = found[0].info.run_id
        else:
            run = self._client.create_run(self._experiment_id, tags=self._tags, run_name=self._run_name)
            self._run_id = run.info.run_id

    def _find_or_create_experiment(self) -> str:
        for create in (True, False):  # another process may create it between our two calls
            found = self._client.get_experiment_by_name(self._experiment)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(self._experiment, self._artifact_location()))
            except Exception:
                if not create:
                    raise
        raise AssertionError("unreachable")

    def _artifact_location(self) -> str | None:
        """Beside a SQLite file (MLflow's own default is the working directory); a server knows its own."""
        if not self._uri.startswith("sqlite:"):
            return None
        return (Path(self._uri.removeprefix("sqlite:///")).parent / "mlartifacts" / self._experiment).as_uri()

    def _send(self) -> None:
        from mlflow.entities import Metric, Param

        self._flushed = time.monotonic()
        if self._run_id is None:
            self._open()
        if self._params:
            logged = self._client.get_run(self._run_id).data.params  # a parameter cannot be changed
            params = [Param(name, value) for name, value in self._params.items() if name not in logged]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[start : start + 100])
            self._params.clear()
        while self._points:
            batch = self._points[:_BATCH]
            metrics = [Metric(*point) for point in batch if self._is_new(name=point[0], step=point[3])]
            self._client.log_batch(self._run_id, metrics=metrics)
            del self._points[: len(batch)]
        while self._artifacts:
            self._client.log_artifact(self._run_id, str(self._artifacts[0]))
            del self._artifacts[0]

    def _is_new(self, name: str, step: int) -> bool:
        """False for steps that the interrupted run had logged already."""
        if self._logged_to is None:
            return True
        if name not in self._logged_to:
            history = self._client.get_metric_history(self._run_id, name)
            self._logged_to[name] = max((metric.step for metric in history), default=-1)
        return step > self._logged_to[name]
