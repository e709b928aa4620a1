"""The Ray cluster that a job runs on: the one it was submitted to, else one of its own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray

from ipvla.storage import StorageRoots, home_is_writable, private_temporary_directory

_logger = logging.getLogger(__name__)

#: More than two pictures of 224 px; Ray's default is 100 KiB.
_INLINE_BYTES = 2**20
#: A UNIX socket's path has at most 107 bytes; what is left of them for Ray's temp dir.
_LONGEST = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


_WAITING_EVERY_S = 30.0
#: The cluster that this process started, which has this machine and no other.
_own_session: Path | None = None


class ClusterError(ValueError):
    """The cluster cannot be reached or started as it was asked for."""


@contextmanager
def connect(
    roots: StorageRoots,
    num_cpus: int | None = None,
    *,
    dashboard_port: int | None = None,
    log_to_driver: bool = False,
) -> Iterator[None]:
    """Joins the cluster at `$RAY_ADDRESS` (set inside a submitted job), else starts and finally ends one here.

    Does nothing if this process is connected already, so that jobs can be run inside one another.

    Args:
        roots: a local cluster keeps its session files under `tmp_dir`, and removes them when it ends well.
        num_cpus: of a local cluster; by default as many as the machine has.
        dashboard_port: serves a local cluster's dashboard there; by default there is none.
        log_to_driver: shows what workers print.

    Raises:
        ClusterError: no cluster answers at `$RAY_ADDRESS`, or the port is taken.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An observation goes to the policy in the call itself; the object store would take three times as long.
    os.environ.setdefault("RAY_max_direct_call_object_size", str(_INLINE_BYTES))
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if address == "local":
        global _own_session  # noqa: PLW0603 (a process has one cluster)
        _own_session = session = _start(roots, num_cpus, dashboard_port, options)
        try:
            yield
        except BaseException:
            ray.shutdown()  # the session's logs stay: they may say why
            raise
        finally:
            _own_session = None
        ray.shutdown()
        shutil.rmtree(session, ignore_errors=True)
    else:
        _join(address, options)
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class Demand:
    """What a job asks the cluster for, all of it at the same time.

    Attributes:
        what: "1 training worker", say.
        each: resource -> how much of it one of them takes, on one node.
        count: how many.
        remedy: which settings to change where the cluster has less.
    """

    what: str
    each: Mapping[str, float]
    count: int
    remedy: str

    def places(self) -> int:
        """How many of them the cluster's nodes have room for, whether it is in use or not."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(
            min((int(node.get(name, 0) // amount) for name, amount in self._each.items()), default=self.count)
            for node in nodes
        )

    @property
    def _each(self) -> dict[str, float]:
        return {name: amount for name, amount in self.each.items() if amount}

    def lacking(self) -> str:
        """What the cluster has less of, whether it is in use or not; empty if it has enough."""
        if self.places() >= self.count:
            return ""
        each = self._each
        there = ray.cluster_resources()
        needed = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
        have = ", ".join(f"{there.get(name, 0):g} {name}" for name in each)
        return f"{self.what} with {needed} each: it has {have}"


def no_gpu() -> ClusterError:
    """For a job that asks for a GPU where torch or Ray see none."""
    return ClusterError(
        f"use_gpu: this machine has no GPU (torch {metadata.version('torch')}); set use_gpu to false, or install "
        "torch's CUDA build"
    )


@contextmanager
def supplied(demand: Demand) -> Iterator[None]:
    """Within: a cluster that can hold this, or will one day.

    A cluster of our own cannot grow, so that waiting would be for ever. On another, a log line says twice a minute
    what is waited for, as long as its nodes have too little.

    Raises:
        ClusterError: our own cluster has less.
    """
    lacking = demand.lacking()
    if lacking and _own_session is not None:
        if demand.each.get("GPU") and not ray.cluster_resources().get("GPU"):
            raise no_gpu()
        raise ClusterError(f"this machine cannot hold {lacking}; {demand.remedy}")
    if not lacking:
        yield
        return
    ended = threading.Event()

    def tell() -> None:
        missing = lacking
        while missing:
            _logger.warning("waiting for nodes that can hold %s", missing)
            if ended.wait(_WAITING_EVERY_S):
                return
            missing = demand.lacking()

    thread = threading.Thread(target=tell, name="waiting for nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def require_free_port(port: int, setting: str) -> None:
    """Raises ClusterError if something listens on this port of 127.0.0.1 already."""
    if not 0 < port < 2**16:
        raise ClusterError(f"{setting}: {port} is not a port; choose one in 1024..65535")
    if port_is_busy(port):
        raise ClusterError(
            f"{setting}: port {port} of 127.0.0.1 is in use; choose another, or end the process that has it"
        )


def port_is_busy(port: int) -> bool:
    """Can nothing new listen on this port of 127.0.0.1?"""
    with closing(socket.socket()) as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _start(roots: StorageRoots, num_cpus: int | None, dashboard_port: int | None, options: dict[str, Any]) -> Path:
    """Starts a cluster; returns its session directory.

    Ray makes a token that keeps other users out, and gives each worker as many OpenMP threads as it asks for CPUs.
    """
    if dashboard_port is not None:
        require_free_port(dashboard_port, "dashboard_port")
        options |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    else:  # nobody will look at single tasks; the record of them costs the cluster 15 MB per 1,000 episodes
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    if not home_is_writable() and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would keep one of its own in the home directory
    # Simulators ask for no GPU and hide it themselves; without this Ray warns at each of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    context = ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=dashboard_port is not None,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(_usable_directory(roots.tmp / "ray")),
        **options,
    )
    return Path(context.address_info["session_dir"])


def _usable_directory(preferred: Path) -> Path:
    """`preferred`, or a place whose socket paths are short enough for the kernel, and ASCII, as Ray wants them."""
    if _fits(preferred):
        preferred.mkdir(mode=0o700, parents=True, exist_ok=True)
        return preferred
    if _fits(place := private_temporary_directory()):
        _logger.debug("Ray cannot use %s; its session files go to %s", preferred, place)
        return place
    raise ClusterError(
        f"tmp_dir: Ray cannot use {preferred}; give one of at most {_LONGEST} characters, all of them ASCII"
    )


def _fits(directory: Path) -> bool:
    return len(os.fsencode(directory)) <= _LONGEST and str(directory).isascii()


def _join(address: str, options: dict[str, Any]) -> None:
    remedy = "correct it, or unset it to run on this machine"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS: {address!r} is a dashboard, which takes jobs by `ipvla submit -- JOB`; to join its "
            "cluster from one of its nodes, give HOST:6379"
        )
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ClusterError(f"RAY_ADDRESS: nothing answers at {address!r} ({error}); {remedy}") from error
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS: {address!r} is no Ray cluster ({error}); {remedy}") from error
