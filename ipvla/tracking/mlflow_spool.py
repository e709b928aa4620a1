"""What MLflow has not got yet: a file per sink, written before anything is sent."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from ipvla.files import lock, one_line, record_of

#: One thing to be sent; `ipvla.tracking.mlflow_run.MLflowRun.send` says which there are.
Record = Mapping[str, Any]


class SpoolError(ValueError):
    """A spool file cannot be read."""


@dataclass(frozen=True)
class RunIdentity:
    """Which MLflow run it is, whether or not it exists there yet.

    Attributes:
        tracking_uri: where it belongs.
        experiment: by name.
        name: what the UI shows.
        key: the run's permanent name, e.g. the run directory; stored as the tag `ipvla.run_key`.
        parent_key: the key of the run that it is nested under, which may come into being later than this one.
        parent_run_id: the MLflow id of such a run, where another program made it.
        tags: of a new run.
        renews: of two values of one metric at one step, by two processes, the later counts (an evaluation that has
            played more); otherwise the earlier (a training that goes on from a checkpoint).
        started_ms: since the epoch.
    """

    tracking_uri: str
    experiment: str
    name: str
    key: str
    parent_key: str | None = None
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    renews: bool = False
    started_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    @property
    def run(self) -> tuple[str, str, str]:
        """The same for every process that has a part in the run."""
        return self.tracking_uri, self.experiment, self.key


class Spool:
    """The records of one sink, in order; only the process that has it open sends them.

    A record is on disk (the kernel has it) when `append` returns, and the file stays until all of it is delivered.
    """

    def __init__(self, path: Path, file: IO[bytes], identity: RunIdentity) -> None:
        self.path, self.identity = path, identity
        self._file, self._guard = file, threading.Lock()
        self._begin = self._delivered = len(_line(asdict(identity)))

    @classmethod
    def create(cls, directory: Path, identity: RunIdentity) -> Self:
        """A new file in `directory`, whose name holds its start time."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}.jsonl"
        unfinished = path.with_suffix(".unfinished")
        # A tracking URI may hold a password.
        file = os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "rb+", buffering=0)
        lock(file, wait=False)
        file.write(_line(asdict(identity)))
        unfinished.rename(path)
        return cls(path, file, identity)

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """The file that a process left behind; None while that process, or another one, uses it.

        Raises:
            SpoolError: the file is damaged.
        """
        try:
            file = path.open("rb+", buffering=0)
        except FileNotFoundError:  # delivered in this moment
            return None
        except OSError as error:
            raise SpoolError(f"{path} cannot be read ({one_line(error)}); move it away") from None
        if not lock(file, wait=False) or not path.exists():
            file.close()
            return None
        try:
            return cls(path, file, _identity(path, file.readline()))
        except SpoolError:
            file.close()
            raise

    def append(self, record: Record) -> None:
        with self._guard:
            self._file.seek(0, os.SEEK_END)
            self._file.write(_line(record))

    def undelivered(self) -> list[tuple[Record, int]]:
        """Each complete record, and the offset where it ends.

        Raises:
            SpoolError: the file is damaged.
        """
        with self._guard:
            self._file.seek(self._delivered)
            text = self._file.read()
        found: list[tuple[Record, int]] = []
        end = self._delivered
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            end += len(line)
            try:
                found.append((record_of(line), end))
            except ValueError as error:
                raise SpoolError(
                    f"{self.path} is damaged before byte {end} ({one_line(error)}); move it away"
                ) from None
        return found

    def deliver(self, end: int) -> None:
        """Everything up to `end` has arrived; once that is all, the file holds the run's identity alone."""
        with self._guard:
            self._delivered = end
            if end == self._file.seek(0, os.SEEK_END):
                self._file.truncate(self._begin)
                self._delivered = self._begin

    def close(self, *, delete: bool) -> None:
        if delete:
            self.path.unlink(missing_ok=True)
        self._file.close()


def spooled(directory: Path) -> list[Path]:
    """The files there, the oldest first."""
    return sorted(directory.glob("*.jsonl"))


def identity_of(path: Path) -> RunIdentity | None:
    """Whose file it is; None if it is gone. SpoolError if it is damaged."""
    try:
        with path.open("rb") as file:
            return _identity(path, file.readline())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpoolError(f"{path} cannot be read ({one_line(error)}); move it away") from None


def _identity(path: Path, line: bytes) -> RunIdentity:
    try:
        return RunIdentity(**record_of(line))
    except (ValueError, TypeError) as error:
        raise SpoolError(f"{path} is not a spool of MLflow records ({one_line(error)}); move it away") from None


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
