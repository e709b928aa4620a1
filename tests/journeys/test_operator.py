"""The operator's hour: a cluster of two nodes, MLflow with a login, a bucket; docs/clusters.md in its order.

Where the page has machines, PostgreSQL and Amazon's S3, here are two nodes on this machine, SQLite and moto's
server, to which a few lines of fsspec copy what `aws s3 sync` would.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import mlflow
import pytest
from moto.server import ThreadedMotoServer

from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands, section
from tests.ray_jobs.head import free_port, ray_cluster
from tests.tracking.server import answers, until

DOCS = SOURCE_TREE / "docs"
SMALL = {
    "submit -- collect *": ["--demonstrations", "{ground_red: 2}"],
    "submit -- train *": ["--training.steps", "4", "--training.log_every", "1", "--lanes.lanes", "2"],
    "submit -- evaluate *": ["--success.episodes", "{ground_red: 2}", "--success.num_simulators", "2"],
}
PROGRAMS = {
    "ray": f'[ "$1" = up ] || exec {sys.executable} -m ray.scripts.scripts "$@"',
    "mlflow": f'exec {sys.executable} -m mlflow "$@"',
    "aws": f"{sys.executable} -c 'import fsspec, sys\n"
    """fsspec.filesystem("s3").put(sys.argv[3] + "/", sys.argv[4], recursive=True)' "$@" """,
}
BUCKET = "of-ours"
PASSWORD = "twelve letters"  # MLflow takes no shorter one


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty one, which all processes from here on can reach."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "us-east-1")
    fsspec.filesystem("s3").mkdir(BUCKET)
    yield
    server.stop()


class Operator:
    """A shell with the page's variables, and MLflow's server.

    Attributes:
        root: what the nodes share.
        tracking: the server's address.
        places: what the page names -> what it is here.
    """

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self.root, self.tracking = directory / "shared" / "ipvla", f"http://127.0.0.1:{port}"
        self.places: dict[str, Path | str] = {
            "--host 0.0.0.0 --port 5000": f"--host 127.0.0.1 --port {port} --workers 1",
            "postgresql://USER:PASSWORD@DB/mlflow": f"sqlite:///{directory}/mlflow.db",
            "=PASSWORD": f'="{PASSWORD}"',
            "HOST:5000": f"127.0.0.1:{port}",
            "BUCKET": BUCKET,
            "/shared/ipvla": self.root,
            "$ROOT": self.root,
        }
        self.shell = Shell(
            directory / "home", SMALL, absent=("ray up", "aws"), programs=PROGRAMS, places=self.places
        )
        self.page = commands(section(DOCS / "clusters.md", "From nothing to results"))
        self._exports: list[str] = []

    def go_on(self, begins: str) -> str:
        """Runs the page's lines from where it is up to the one that begins so; what is printed."""
        place = next(n for n, line in enumerate(self.page) if line.startswith(begins)) + 1
        lines, self.page = self.page[:place], self.page[place:]
        shown = self.run(*lines)
        self._exports += [line for line in lines if line.startswith("export")]
        return shown

    def run(self, *lines: str) -> str:
        return self.shell.run([*self._exports, *lines], 200)

    @contextmanager
    def mlflow_server(self) -> Iterator[None]:
        """As docs/mlflow.md starts it; killed at the end."""
        with self.shell.killed(["cd", *commands(section(DOCS / "mlflow.md", "A server"))]):
            until(lambda: answers(self.tracking))
            yield


def last_line(shown: str) -> str:
    return shown.strip().splitlines()[-1]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("bucket")
def test_from_nothing_to_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(tmp_path)
    operator.go_on("ray up")
    token = (operator.shell.home / ".ray" / "auth_token").read_text()
    monkeypatch.setenv("IPVLA_STORAGE_ROOT", str(operator.root))  # the nodes' image does
    login = {
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",  # where the server shares two cores with the cluster
    }
    for name, value in login.items():
        monkeypatch.setenv(name, value)
    with ray_cluster(2, token=token) as cluster:
        operator.places |= {
            "HOST:8265": cluster.dashboard.removeprefix("http://"),
            "HOST:6379": cluster.address,
        }
        with operator.mlflow_server():
            assert "2 demonstrations in" in last_line(operator.go_on("ipvla submit -- collect"))
            operator.go_on("aws s3 sync")
            shown = operator.go_on("ipvla submit -- train")
            assert f"MLflow: {operator.tracking}" in shown
            assert "4 steps at" in last_line(shown)
            client = mlflow.MlflowClient(operator.tracking)
            study = client.get_experiment_by_name("tiny")
            assert study is not None
            (run,) = client.search_runs([study.experiment_id])
            assert run.data.tags["mlflow.runName"] == "gru"
            assert run.data.params["data.dataset"] == f"s3://{BUCKET}/tiny_tf/1.0.0"
            assert "train/loss" in run.data.metrics
            assert client.get_model_version_by_alias("tiny.gru", "newest").run_id == run.info.run_id

        shown = last_line(operator.go_on("ipvla submit -- evaluate"))
        assert re.search(rf"MLflow: \d+ records wait for {operator.tracking}; once it answers: ipvla ml", shown)
        assert (operator.root / "runs" / "tiny" / "report.html").exists()
        with operator.mlflow_server():
            on_the_node = [f"export {name}='{value}'" for name, value in login.items()]
            sync = commands(section(DOCS / "mlflow.md", "When the server is away"))
            assert "tiny/gru: " in operator.run(*on_the_node, *sync)
            (run,) = client.search_runs([study.experiment_id])
            assert "success/recall" in run.data.metrics
        stored = fsspec.filesystem("s3").find(f"{BUCKET}/mlflow")
        assert {"policy.json", "success_recall.png"} <= {path.rpartition("/")[2] for path in stored}

        (line,) = operator.page
        assert "PolicyActor" in operator.run(line)
        operator.run(f"{line} --format json --limit 1000 > {tmp_path}/actors.json")
        actors = json.loads((tmp_path / "actors.json").read_text())
        # an actor that was never placed has no node
        assert len({actor["node_id"] for actor in actors} - {None}) == 2, "parts ran on both nodes"


def test_an_address_is_no_directory_for_runs(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    wanted = "train --study x --name x --storage_root s3://BUCKET/x"
    shown = last_line(operator.run(f"! ipvla submit --address HOST:8265 -- {wanted}"))
    assert "is an address; give a directory of a file system that all nodes share" in shown
