"""A Ray cluster with a dashboard, as `ray start --head` starts one: what jobs are submitted to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def ray_head(num_cpus: int = 2, token: str | None = None) -> Iterator[str]:
    """Yields the dashboard's address. Everything that the cluster has started ends with it.

    With `token` it is in Ray's token mode.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        ports = [_free_port() for _ in range(6)]
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
                 "dashboard-agent-grpc-port", "metrics-export-port")  # fmt: skip
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", "--include-dashboard=true", f"--num-cpus={num_cpus}"),
            *(f"--temp-dir={directory}", "--object-store-memory=209715200", "--disable-usage-stats"),
            *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs say `python`
        environment = {**os.environ, "PATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        environment.pop("RAY_ADDRESS", None)
        if token is not None:
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        head = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            _wait_for(f"{address}/api/version", head, token)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def posted(address: str, token: str | None) -> int:
    """Status of the answer to a job that does nothing."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{address}/api/jobs/", body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _wait_for(url: str, head: subprocess.Popen[bytes], token: str | None) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        assert head.poll() is None, "the cluster ended while it began"
        assert time.monotonic() < end, f"nothing answers at {url}"
        time.sleep(0.3)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
