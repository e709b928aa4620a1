"""The operator's hour: a cluster of two nodes, MLflow with a login, a bucket; docs/clusters.md in its order.

Where the page has machines, PostgreSQL and Amazon's S3, here are two nodes on this machine, SQLite and moto's server.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import fsspec
import mlflow
import pytest
from moto.server import ThreadedMotoServer

from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands, section
from tests.ray_jobs.head import free_port, ray_cluster

DOCS = SOURCE_TREE / "docs"
SMALL = {
    "collect": ["--demonstrations", "{ground_red: 2}"],
    "train": ["--training.steps", "4", "--training.log_every", "1", "--lanes.lanes", "2"],
    "evaluate": ["--success.episodes", "{ground_red: 2}", "--success.num_simulators", "2"],
}
PASSWORD = "twelve letters"  # MLflow takes no shorter one
#: `aws s3 sync FROM TO`, as far as it goes here.
AWS = f"""exec {sys.executable} -c '
import fsspec, sys
fsspec.filesystem("s3").put(sys.argv[3] + "/", sys.argv[4], recursive=True)' "$@"
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty one, which all processes from here on can reach."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("DEFAULT_REGION", "us-east-1"),
                        ("ACCESS_KEY_ID", "anybody"), ("SECRET_ACCESS_KEY", "anything")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3").mkdir("of-ours")
    yield "of-ours"
    server.stop()


def here(lines: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """A page's lines, with places of this machine for the page's."""
    for page, ours in places.items():
        lines = [line.replace(page, ours) for line in lines]
    return list(lines)


def up_to(lines: list[str], begins: str) -> list[str]:
    """Takes the lines away up to the one that begins so, that one included."""
    place = next(n for n, line in enumerate(lines) if line.startswith(begins)) + 1
    taken, lines[:] = lines[:place], lines[place:]
    return taken


def last_line(shown: str) -> str:
    return shown.strip().splitlines()[-1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_nothing_to_results(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, port = tmp_path / "shared" / "ipvla", free_port()
    tracking = f"http://127.0.0.1:{port}"
    programs = {
        "ray": f'[ "$1" = up ] || exec {sys.executable} -m ray.scripts.scripts "$@"\n',
        "mlflow": f'exec {sys.executable} -m mlflow "$@"\n',
        "aws": AWS,
    }
    shell = Shell(tmp_path / "home", SMALL, programs=programs)
    places = {"/shared/ipvla": str(root), "BUCKET": bucket, "HOST:5000": f"127.0.0.1:{port}"}
    page = here(commands(section(DOCS / "clusters.md", "From nothing to results")), places)
    server = here(
        commands(section(DOCS / "mlflow.md", "A server")),
        {
            "postgresql://USER:PASSWORD@DB/mlflow": f"sqlite:///{tmp_path}/mlflow.db",
            "=PASSWORD": f'="{PASSWORD}"',
            "--host 0.0.0.0 --port 5000": f"--host 127.0.0.1 --port {port} --workers 1",
            **places,
        },
    )
    exports = [line for line in page if line.startswith("export")]

    shell.run(up_to(page, "ray up"), 60)
    token = (shell.home / ".ray" / "auth_token").read_text()
    monkeypatch.setenv("IPVLA_STORAGE_ROOT", str(root))  # the nodes' image does
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with ExitStack() as ends:
        cluster = ends.enter_context(ray_cluster(2, token=token))
        address = cluster.dashboard.removeprefix("http://")
        page, exports = (here(lines, {"HOST:8265": address}) for lines in (page, exports))

        def step(begins: str, timeout_s: float = 200) -> str:
            """The page's lines up to that one."""
            return shell.run([*exports, *up_to(page, begins)], timeout_s)

        refused = "train --study x --name x --storage_root s3://of-ours/x"
        shown = shell.run([*exports, f"! ipvla submit --address {address} -- {refused}"], 60)
        assert "is an address; give a directory of a file system that all nodes share" in last_line(shown)
        assert "raysubmit" not in shown, "nothing is shipped"

        with shell.running(server):
            while not answers(f"{tracking}/health"):
                time.sleep(0.5)
            step("ipvla submit -- collect")
            step("aws s3 sync")
            shown = step("ipvla submit -- train")
            assert f"MLflow: {tracking}" in shown
            assert "4 steps at" in last_line(shown)
            client = mlflow.MlflowClient(tracking)
            study = client.get_experiment_by_name("tiny")
            assert study is not None
            (run,) = client.search_runs([study.experiment_id])
            assert run.data.tags["mlflow.runName"] == "gru"
            assert run.data.params["data.dataset"] == f"s3://{bucket}/tiny_tf/1.0.0"
            assert "train/loss" in run.data.metrics
            assert client.get_model_version_by_alias("tiny.gru", "newest").run_id == run.info.run_id

        shown = step("ipvla submit -- evaluate")
        assert re.search(
            rf"MLflow: \d+ records wait for {tracking}; once it answers: ipvla mlflow_sync", last_line(shown)
        )
        assert (root / "runs" / "tiny" / "report.html").exists()
        with shell.running(server):
            while not answers(f"{tracking}/health"):
                time.sleep(0.5)
            assert "tiny/gru: " in step("ipvla submit -- mlflow_sync")
            (run,) = client.search_runs([study.experiment_id])
            assert "success/recall" in run.data.metrics
        stored = fsspec.filesystem("s3").find(f"{bucket}/mlflow")
        assert any(path.endswith("policy.json") for path in stored)
        assert any(path.endswith(".png") for path in stored), "what the evaluation drew"
        (line,) = page
        shown = shell.run([*exports, f"{line} --format json --limit 1000 > {tmp_path}/actors.json"], 60)
        actors = json.loads((tmp_path / "actors.json").read_text())
        assert len({actor["node_id"] for actor in actors}) == 2
