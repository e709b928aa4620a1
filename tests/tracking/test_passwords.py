"""A password in an MLflow address stays out of everything that people read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from evaluators.tracked_runs import RunStore, TrackingError
from ipvla.storage import StorageRoots
from ipvla.tracking import MLflowSink, RunIdentity, require_usable, without_password
from ray_jobs.running.policy_run import warn_of_waiting

URI = "http://user:s3cr3t@127.0.0.1:9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URI, "http://***@127.0.0.1:9"),
        ("postgresql://a:b@c@host/db and http://token@h", "postgresql://***@host/db and http://***@h"),
        ("sqlite:////a/b@c/mlflow.db", "sqlite:////a/b@c/mlflow.db"),
        ("http://host:5000/path?mail=a@b", "http://host:5000/path?mail=a@b"),
    ],
)
def test_what_stands_before_the_host_is_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown


def test_a_server_that_is_away_is_named_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    roots = StorageRoots(storage_root=tmp_path)
    with caplog.at_level(logging.WARNING):
        sink = MLflowSink(RunIdentity(URI, "s", "r", str(tmp_path)), roots.mlflow_spool)
        sink.log({"a": 1.0}, 1)
        sink.close()
        warn_of_waiting(roots)
    assert "127.0.0.1:9" in caplog.text
    assert "s3cr3t" not in caplog.text
    with pytest.raises(TrackingError) as caught:
        RunStore(URI).studies()
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(ValueError, match="of no kind") as refused:
        require_usable("ftp://user:s3cr3t@host")
    assert "s3cr3t" not in str(refused.value)
