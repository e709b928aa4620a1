"""`python -m ray_jobs.mlflow_sync`: sends MLflow what it has not got because it was away; no matter how often.

Jobs that are still running are left alone: they send their own as soon as the server answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ipvla.storage import StorageRoots
from ipvla.tracking import Synced, require_usable, sync, without_password
from ray_jobs.command_line.cli import run


@dataclass(frozen=True)
class SyncConfig(StorageRoots):
    """What is sent, and where to.

    Attributes:
        tracking_uri: another server than each run was meant for.
    """

    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        if self.tracking_uri is not None:
            require_usable(self.tracking_uri)


def main(config: SyncConfig) -> int:
    """Says of each run what has arrived; 1 if something is left."""
    errors = []
    for synced in sync(config.mlflow_spool, config.tracking_uri):
        print(without_password(_arrival(synced)))
        errors.append(synced.error)
    if not errors:
        print(f"nothing waits in {config.mlflow_spool}")
    return int(any(errors))


def _arrival(synced: Synced) -> str:
    if synced.identity is None:
        return f"error: {synced.error}"
    name = f"{synced.identity.experiment}/{synced.identity.name}"
    if synced.error:
        return f"{name}: {synced.left} records stay in {synced.path}: {' '.join(synced.error.split())}"
    return f"{name}: {synced.sent} records sent"


if __name__ == "__main__":
    run(SyncConfig, main, __doc__)
