"""A Ray cluster with a dashboard, as `ray start` starts its nodes: what jobs are submitted to."""

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cluster:
    """Where it answers.

    Attributes:
        dashboard: `http://HOST:PORT`, for jobs.
        address: `HOST:PORT`, for `RAY_ADDRESS` on one of its nodes.
    """

    dashboard: str
    address: str


@contextlib.contextmanager
def ray_cluster(nodes: int, num_cpus: int = 1, token: str | None = None) -> Iterator[Cluster]:
    """A head and `nodes - 1` others, at addresses of their own: 127.0.0.2, 127.0.0.3 and so on.

    Everything that the cluster has started ends with it. With `token` it is in Ray's token mode.
    """
    port, dashboard = free_port(), free_port()
    cluster = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.2:{port}")
    head = (
        *("--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}"),
        f"--ray-client-server-port={free_port()}",
    )
    with contextlib.ExitStack() as ends:
        first = ends.enter_context(_node("127.0.0.2", num_cpus, token, head))
        _wait_for(f"{cluster.dashboard}/api/version", first, token)
        for number in range(1, nodes):
            joins = (f"--address={cluster.address}",)
            ends.enter_context(_node(f"127.0.0.{2 + number}", num_cpus, token, joins))
        end = time.monotonic() + 120
        while nodes > 1 and _alive(cluster.dashboard, token) < nodes:
            assert time.monotonic() < end, f"{cluster.address} does not get its {nodes} nodes"
            time.sleep(0.5)
        yield cluster


@contextlib.contextmanager
def ray_head(num_cpus: int = 2, token: str | None = None) -> Iterator[str]:
    """Yields the dashboard's address of a cluster of one node."""
    with ray_cluster(1, num_cpus, token) as cluster:
        yield cluster.dashboard


@contextlib.contextmanager
def _node(ip: str, num_cpus: int, token: str | None, options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options),
            *(f"--node-ip-address={ip}", f"--num-cpus={num_cpus}", f"--temp-dir={directory}"),
            *("--object-store-memory=209715200", "--disable-usage-stats"),
            *(f"--{name}={free_port()}" for name in ports),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs say `python`
        environment = {**os.environ, "PATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        environment.pop("RAY_ADDRESS", None)
        if token is not None:
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        node = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield node
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


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


def _asked(url: str, token: str | None) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})


def _alive(dashboard: str, token: str | None) -> int:
    """How many nodes it has."""
    with urllib.request.urlopen(_asked(f"{dashboard}/nodes?view=summary", token), timeout=30) as answer:
        nodes = json.load(answer)["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def _wait_for(url: str, head: subprocess.Popen[bytes], token: str | None) -> None:
    request = _asked(url, token)
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        assert head.poll() is None, "the cluster ended while it began"
        assert time.monotonic() < end, f"nothing answers at {url}"
        time.sleep(0.3)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
