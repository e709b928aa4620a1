"""Sends MLflow what processes of the past could not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ipvla.tracking.mlflow_run import MLflowRun
from ipvla.tracking.mlflow_spool import RunIdentity, Spool, SpoolError, identity_of, spooled

_logger = logging.getLogger("ipvla.tracking")


@dataclass(frozen=True)
class Synced:
    """What became of a spool file.

    Attributes:
        sent: records that have arrived now.
        left: records that have not.
        error: why not; empty if all have.
        identity: None if the file is damaged.
    """

    path: Path
    sent: int = 0
    left: int = 0
    error: str = ""
    identity: RunIdentity | None = None


def sync(directory: Path, tracking_uri: str | None = None) -> Iterator[Synced]:
    """Delivers every file in `directory` whose process is gone, the oldest first, and deletes it.

    Interrupted or repeated, it adds nothing twice. A server that fails once gets no more requests.

    Args:
        tracking_uri: to another server than the files say.
    """
    away: dict[str, str] = {}
    for path in spooled(directory):
        try:
            spool = Spool.take(path)
            if spool is not None:
                yield _sync(spool, directory, tracking_uri or spool.identity.tracking_uri, away)
        except SpoolError as error:
            yield Synced(path, error=str(error))


def _sync(spool: Spool, directory: Path, tracking_uri: str, away: dict[str, str]) -> Synced:
    waiting = len(spool.undelivered())
    if tracking_uri not in away:
        try:
            deliver(spool, MLflowRun(spool.identity, directory, tracking_uri))
        except Exception as error:
            away[tracking_uri] = str(error)
    left = len(spool.undelivered())
    spool.close(delete=not left)
    return Synced(spool.path, waiting - left, left, away[tracking_uri] if left else "", spool.identity)


def waiting(directory: Path) -> int:
    """Records in `directory` that MLflow has not got, of processes that are gone."""
    records = 0
    for path in spooled(directory):
        with contextlib.suppress(SpoolError):
            spool = Spool.take(path)
            if spool is not None:
                records += len(spool.undelivered())
                spool.close(delete=False)
    return records


def take_over(identity: RunIdentity, directory: Path) -> None:
    """Delivers what earlier processes of this run left behind.

    Raises:
        Exception: the server is away.
    """
    for path in spooled(directory):
        try:
            other = identity_of(path)
            same = other is not None and other.run == identity.run
            spool = Spool.take(path) if same else None
            if spool is None:
                continue
            deliver(spool, MLflowRun(spool.identity, directory))
        except SpoolError as error:
            _logger.warning("%s", error)
        else:
            spool.close(delete=True)


def deliver(spool: Spool, run: MLflowRun) -> None:
    """Sends what the file has.

    Raises:
        SpoolError: the file is damaged.
        Exception: the server is away.
    """
    run.send(spool.undelivered(), spool.deliver)
