"""The cluster that a job runs on: the one it is told of, or its own, of which nothing stays behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE, StorageRoots
from ray_jobs.running import cluster
from ray_jobs.running.cluster import ClusterError, Demand, connect, port_is_busy, require_free_port, supplied

#: Connects and reports. Run in a process of its own, because a process can have one cluster.
_REPORT = """
import json, os, sys
from pathlib import Path
import ray
from ipvla.storage import StorageRoots
from ray_jobs.running.cluster import connect

roots = StorageRoots(storage_root=Path(sys.argv[1]))
with connect(roots, num_cpus=3):
    session = ray._private.worker._global_node.get_session_dir_path()
    with connect(roots):
        pass  # a job inside a job
    inner = ray.is_initialized()
    task = ray.remote(num_cpus=3)(lambda: os.environ["OMP_NUM_THREADS"])
    threads, cpus = ray.get(task.remote()), ray.cluster_resources()["CPU"]
after = ray.is_initialized()
print(json.dumps({"cpus": cpus, "session": session, "inner": inner, "threads": threads, "after": after}))
"""


@pytest.fixture
def busy_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def report(storage_root):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", _REPORT, str(storage_root)]
    done = subprocess.run(
        command, cwd=SOURCE_TREE, env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stderr == "", "a local cluster starts without a word"
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_local_cluster_serves_nested_jobs_and_leaves_nothing(tmp_path):
    told = report(tmp_path / ("deep" * 20))  # too long for Ray's sockets
    assert told["cpus"] == 3
    assert told["inner"], "the inner job does not end the outer job's cluster"
    assert told["threads"] == "3", "a worker may use as many threads as it asked for CPUs"
    assert not told["after"]
    assert not os.path.exists(told["session"])


@pytest.mark.slow
def test_a_process_that_is_connected_already_stays_so(ray_cluster, tmp_path):
    with connect(StorageRoots(storage_root=tmp_path)):
        assert ray_cluster.is_initialized()
    assert ray_cluster.is_initialized()


def test_a_busy_port_is_told_with_its_remedy(busy_port, tmp_path):
    assert port_is_busy(busy_port)
    with pytest.raises(
        ClusterError, match=f"dashboard_port: port {busy_port} of 127.0.0.1 is in use; choose another"
    ):
        require_free_port(busy_port, "dashboard_port")
    with pytest.raises(ClusterError, match="is not a port"):
        require_free_port(70000, "dashboard_port")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:port"])
def test_an_address_where_nothing_answers_is_told_at_once(monkeypatch, tmp_path, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have a cluster
    with (
        pytest.raises(ClusterError, match=f"RAY_ADDRESS: nothing answers at '{address}'"),
        connect(StorageRoots(storage_root=tmp_path)),
    ):
        pass


def test_a_dashboards_address_is_no_cluster_to_join(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="is a dashboard"), connect(StorageRoots(storage_root=tmp_path)):
        pass


@pytest.fixture
def two_cpus(monkeypatch):
    """A node with two CPUs, as Ray would say it; and whether the cluster is our own."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: nodes[0]["Resources"])
    monkeypatch.setattr(cluster, "_own_session", Path("/somewhere"))
    return nodes


def workers(count, **each):
    return Demand(f"{count} workers", each, count, "lower num_workers")


def test_what_our_own_cluster_has_too_little_of_is_refused_at_once(two_cpus):
    for fitting in (workers(2, CPU=1.0), workers(1, CPU=2.0, GPU=0.0), workers(3)):
        with supplied(fitting):
            pass
    with pytest.raises(ClusterError, match=r"use_gpu: this machine has no GPU \(torch 2.*; set use_gpu to false"):
        supplied(workers(1, CPU=1.0, GPU=1.0)).__enter__()
    with pytest.raises(ClusterError, match="cannot hold 8 workers with 1 CPU each: it has 2 CPU; lower num_"):
        supplied(workers(8, CPU=1.0)).__enter__()
    with pytest.raises(ClusterError, match="cannot hold 1 workers with 3 CPU each"):
        supplied(workers(1, CPU=3.0)).__enter__()


def test_on_another_cluster_it_is_said_again_and_again_what_is_waited_for(two_cpus, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "_own_session", None)
    monkeypatch.setattr(cluster, "_WAITING_EVERY_S", 0.05)
    with supplied(workers(1, CPU=1.0, GPU=1.0)):
        time.sleep(0.5)
        several = len(caplog.records)
        two_cpus.append({"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}})  # it has grown
        time.sleep(0.2)
        then = len(caplog.records)
        time.sleep(0.2)
    assert several > 3
    assert len(caplog.records) == then
    told = "waiting for nodes that can hold 1 workers with 1 CPU, 1 GPU each: it has 2 CPU, 0 GPU"
    assert caplog.records[0].getMessage() == told


@pytest.mark.parametrize("name", ["deep" * 20, "мой диск"])
def test_what_ray_cannot_use_gets_a_place_that_it_can(tmp_path, monkeypatch, name):
    short = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    place = short / f"ipvla-{os.getuid()}"
    place.mkdir(mode=0o755)  # as earlier versions left it
    assert cluster._usable_directory(tmp_path / name) == place
    assert place.stat().st_mode & 0o077 == 0
    assert cluster._usable_directory(short / "ray") == short / "ray"
    shutil.rmtree(short)


@pytest.mark.parametrize("foreign", ["open to all", "open to a group", "a link"])
def test_a_shared_directory_is_ours_alone_or_is_not_used(foreign, tmp_path, monkeypatch):
    shared = Path(tempfile.mkdtemp())  # shorter than tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    place = shared / f"ipvla-{os.getuid()}"
    if foreign == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    else:
        place.mkdir()
        place.chmod(0o777 if foreign == "open to all" else 0o770)
    found = cluster._usable_directory(tmp_path / ("long" * 30))
    assert found != place
    assert found.parent == shared
    assert found.stat().st_mode & 0o077 == 0
    shutil.rmtree(shared)
