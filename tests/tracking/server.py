"""A real MLflow server, for what logs to one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mlflow_server(store: Path, port: int) -> Iterator[str]:
    """Its address, where it does not answer yet; killed at the end. Started again, it has what it had."""
    listening = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    stores = (
        "--backend-store-uri",
        f"sqlite:///{store}/mlflow.db",
        "--artifacts-destination",
        f"{store}/artifacts",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *listening, *stores],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until it is; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def answers(address: str) -> bool:
    """Is the server up?"""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
