"""What takes a run's metrics; the console and a JSONL file. A run logs to several through `Sinks`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ipvla.files import write_text

if TYPE_CHECKING:
    from ipvla.tracking.mlflow_sink import MLflowSink

_logger = logging.getLogger("ipvla.tracking")


class MetricSink:
    """Takes a run's metrics, parameters and files; this one leaves all but the metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def log_params(self, params: Mapping[str, object]) -> None:
        """The run's settings by name."""

    def log_artifact(self, path: Path) -> None:
        """A file, or a directory with all that is in it; under its own name."""

    def close(self, status: str = "FINISHED") -> None:
        """`status` is "FINISHED", "FAILED" or "KILLED"."""


@dataclass(frozen=True)
class Sinks(MetricSink):
    """Forwards to each of `sinks`."""

    sinks: Sequence[MetricSink] = ()

    @property
    def mlflow(self) -> MLflowSink | None:
        """The one among them that is a run in MLflow, if any."""
        from ipvla.tracking.mlflow_sink import MLflowSink

        return next((sink for sink in self.sinks if isinstance(sink, MLflowSink)), None)

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


class ConsoleSink(MetricSink):
    """One log line per call, through the standard `logging` of `ipvla.tracking`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        _logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def log_params(self, params: Mapping[str, object]) -> None:
        _logger.info("parameters  %s", "  ".join(f"{name}={value}" for name, value in params.items()))

    def log_artifact(self, path: Path) -> None:
        _logger.info("wrote %s", path)

    def close(self, status: str = "FINISHED") -> None:
        _logger.info("%s", status.lower())


class JsonlSink(MetricSink):
    """One JSON object per call, `{"step", "time", <metric>: <value>}`, on disk before `log` returns.

    Settings and files of a run lie beside it.

    Args:
        path: appended to.
        resume_step: the run continues after this step. Lines of later steps, written by the run that was
            interrupted, are dropped: they will be written again. None keeps every complete line.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in read_jsonl(path) if resume_step is None or line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file: IO[str] = path.open("a")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def close(self, status: str = "FINISHED") -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `JsonlSink`'s file: a kill may have cut the last one, a crash of the machine any."""
    text = path.read_text(errors="replace")
    lines = []
    for line in text[: text.rfind("\n") + 1].split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]
