"""Metrics to MLflow from a thread of its own, by way of the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ipvla.tracking.mlflow_run import NOTE, MLflowRun, require_usable, without_password
from ipvla.tracking.mlflow_spool import Record, RunIdentity, Spool
from ipvla.tracking.mlflow_sync import deliver, take_over
from ipvla.tracking.sinks import MetricSink
from ipvla.tracking.wandb_sink import WandbConfig

_logger = logging.getLogger("ipvla.tracking")

_FLUSH_S = 10.0
_RETRY_S = 60.0
_PARAMETER_CHARACTERS = 6000  # MLflow's limit


@dataclass(frozen=True)
class TrackingConfig:
    """What of a training run MLflow gets beside metrics, settings and adapters, and whether W&B gets a copy.

    Attributes:
        policy_mib: the finished policy becomes an artifact too if it has at most so many MiB; 0 for never. The
            default leaves out what fills a server's disk, 7e9 weights in bfloat16 say (13 GiB).
        register: the policy, or its adapters where it is no artifact, becomes a version of a model in the
            registry.
        model: that model's name; None for STUDY.NAME.
        system_every_s: seconds between two looks at CPU, memory and GPU of every worker; 0 for none.
        wandb: where Weights & Biases gets a copy.
    """

    policy_mib: float = 1024.0
    register: bool = True
    model: str | None = None
    system_every_s: float = 10.0
    wandb: WandbConfig = field(default_factory=WandbConfig)

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


class MLflowSink(MetricSink):
    """One MLflow run, found again by its key when the job is started again.

    What is logged goes into a file, and a thread sends it on in batches. So no server, however slow, holds up who
    logs; one that does not answer is reported once and tried again every minute; and what it has not got when the
    run is closed or killed stays in the file, for the next start of the run or for `ray_jobs.mlflow_sync`.

    Args:
        spool: the directory of such files.

    Raises:
        ValueError: a tracking URI that MLflow does not know, or a relative SQLite URI (Ray changes the working
            directory).
    """

    def __init__(self, identity: RunIdentity, spool: Path) -> None:
        require_usable(identity.tracking_uri)
        self.key = identity.key
        self._identity, self._directory = identity, spool
        self._run = MLflowRun(identity, spool)
        self._spool = Spool.create(spool, identity)
        self._predecessors = True
        self._sending, self._closed = threading.Lock(), threading.Event()
        self._retry_at, self._warned = 0.0, False
        self._append({"status": "RUNNING", "time": _now()})
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """None while the server has not been reached."""
        return self._run.run_id

    @property
    def experiment_id(self) -> str | None:
        return self._run.experiment_id

    def log(self, metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """`time_ms` since the epoch, if these are not of now."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append({"metrics": values, "step": step, "time": time_ms or _now()})

    def log_params(self, params: Mapping[str, object]) -> None:
        self._append({"params": {name: str(value)[:_PARAMETER_CHARACTERS] for name, value in params.items()}})

    def log_artifact(self, path: Path) -> None:
        """It is read when it is sent, and must stay where it is until then."""
        self._append({"artifact": str(path)})

    def note(self, markdown: str) -> None:
        """What the UI shows as the run's description."""
        self._append({"tags": {NOTE: markdown}})

    def register(self, model: str, artifact: str, tags: Mapping[str, str], alias: str | None = None) -> None:
        """An artifact that was logged becomes a version of this model in the registry; once for a run and tags.

        Args:
            model: the registered model's name; created if missing.
            artifact: by its name.
            tags: of the version.
            alias: moved to this version. MLflow keeps "latest" for itself: the highest version.
        """
        self._append({"model": model, "artifact": artifact, "tags": dict(tags), "alias": alias})

    def flush(self) -> None:
        """Returns when all is sent, or the server has failed, within the last minute perhaps."""
        if time.monotonic() >= self._retry_at:
            self._send()

    def close(self, status: str = "FINISHED") -> None:
        """Sends what waits; if it cannot, says which command will."""
        if self._closed.is_set():
            return
        self._append({"status": status, "time": _now()})
        self._closed.set()
        self._thread.join()
        self._send()
        left = len(self._spool.undelivered())
        self._spool.close(delete=not left)
        if left:
            _logger.warning(
                "MLflow has not got %d records of %s; they are in %s. Once it answers, send them with "
                "python -m ray_jobs.mlflow_sync --run_root_dir %s",
                *(left, self._identity.name, self._spool.path, self._directory.parent),
            )

    def _append(self, record: Record) -> None:
        self._spool.append(record)

    def _work(self) -> None:
        self.flush()
        while not self._closed.wait(_FLUSH_S):
            self.flush()

    def _send(self) -> None:
        with self._sending:
            try:
                if self._predecessors:  # what comes later must not be sent before
                    take_over(self._identity, self._directory)
                    self._predecessors = False
                deliver(self._spool, self._run)
            except Exception as error:  # tracking must not end a training run
                self._retry_at = time.monotonic() + _RETRY_S
                if not self._warned:
                    failed = f"MLflow at {self._identity.tracking_uri} failed ({error})"
                    _logger.warning("%s; the run goes on without it", without_password(failed))
                self._warned = True


def _now() -> int:
    return int(time.time() * 1000)
