"""MLflow: one run per key, nothing lost while the server is away, nothing twice."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ipvla.storage import SOURCE_TREE
from ipvla.tracking import MLflowSink, RunIdentity, mlflow_sink, sync
from ipvla.tracking.mlflow_spool import spooled
from ray_jobs import mlflow_sync
from tests.tracking.server import answers, mlflow_server, until

pytestmark = pytest.mark.slow

AWAY = "http://127.0.0.1:9"

Open = Callable[..., MLflowSink]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real SQLite store; creating it takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """An experiment of the test's own."""
    return str(request.node.name)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mlflow_spool"


@pytest.fixture
def opened(uri: str, study: str, spool: Path) -> Open:
    def open_(name: str, to: str = uri, **settings: Any) -> MLflowSink:
        return MLflowSink(RunIdentity(to, study, name, f"runs/{name}", **settings), spool)

    return open_


def killed(spool: Path, identity: RunIdentity, steps: int) -> None:
    """Another process logs so many steps, and is killed."""

    def log() -> None:
        sink = MLflowSink(identity, spool)
        sink.log_params({"lr": 0.1})
        for step in range(1, steps + 1):
            sink.log({"loss": step / 2}, step)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=log)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def runs(client: MlflowClient, study: str) -> dict[str, Any]:
    found = client.search_runs([client.get_experiment_by_name(study).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "no run is there twice"
    return {run.info.run_name: run for run in found}


def history(client: MlflowClient, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def test_a_run_has_parameters_metrics_by_step_tags_artifacts_and_a_note(
    uri: str, client: MlflowClient, opened: Open, study: str, spool: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "policy.json").write_text("{}")
    (tmp_path / "report.html").write_text("hello")
    sink = opened("gru", tags={"tier": "smoke"})
    sink.log_params({"memory": "gru", "lr": 0.1, "long": "x" * 9000})
    for step in range(1200):
        sink.log({"loss": step / 2, "other": 0}, step)
    for path in ("report.html", "policy"):
        sink.log_artifact(tmp_path / path)
    sink.note("| a | b |")
    sink.close("FAILED")

    run = runs(client, study)["gru"]
    assert (run.info.run_id, run.info.experiment_id) == (sink.run_id, sink.experiment_id)
    assert run.info.status == "FAILED"
    assert (run.data.params["memory"], run.data.params["lr"]) == ("gru", "0.1")
    assert (run.data.tags["tier"], run.data.tags["mlflow.note.content"]) == ("smoke", "| a | b |")
    assert history(client, run, "loss") == [(step, step / 2) for step in range(1200)]
    assert [f.path for f in client.list_artifacts(sink.run_id)] == ["policy", "report.html"]
    stored = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / study
    assert [path.read_text() for path in stored.rglob("report.html")] == ["hello"], "beside the database"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "policy", "report.html"}, "not in the directory"
    assert spooled(spool) == []


def test_started_again_it_continues_the_same_run_without_doubling(
    client: MlflowClient, opened: Open, study: str, spool: Path, uri: str
) -> None:
    killed(spool, RunIdentity(uri, study, "it's mine", "runs/it's mine"), 20)
    second = opened("it's mine")
    second.log_params({"lr": 0.1, "new": 1})
    for step in (20, 30):
        second.log({"loss": 2.0, "other": 0.0}, step)
    second.close()
    run = runs(client, study)["it's mine"]
    assert history(client, run, "loss") == [(s, s / 2) for s in range(1, 21)] + [(30, 2.0)]
    assert history(client, run, "other") == [(20, 0.0), (30, 0.0)]
    assert (run.data.params, run.info.status) == ({"lr": "0.1", "new": "1"}, "FINISHED")


def test_of_two_evaluations_the_later_counts(client: MlflowClient, opened: Open, study: str) -> None:
    for rate in (0.5, 0.5, 0.75):
        sink = opened("gru", renews=True)
        sink.log({"success": rate}, 0)
        sink.close()
        time.sleep(0.002)
    run = runs(client, study)["gru"]
    assert (history(client, run, "success"), run.data.metrics["success"]) == ([(0, 0.5), (0, 0.75)], 0.75)


@pytest.mark.parametrize("first", ["parent", "child"])
def test_parent_and_child_find_each_other_whoever_comes_first(
    first: str, client: MlflowClient, opened: Open, study: str
) -> None:
    for name in sorted(("parent", "child"), key=lambda one: one != first):
        opened(name, parent_key="runs/parent" if name == "child" else None).close()
    found = runs(client, study)
    assert found["child"].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
    assert found["child"].info.experiment_id == found["parent"].info.experiment_id
    assert "mlflow.parentRunId" not in found["parent"].data.tags


def test_an_absent_server_is_reported_once_and_holds_up_nobody(
    opened: Open, spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ipvla.tracking"):
        sink = opened("gru", AWAY)
        started = time.monotonic()
        for step in range(2000):
            sink.log({"loss": 0.0}, step)
        assert time.monotonic() - started < 2
        sink.close()
        sink.close()
    assert [("the run goes on" in r.message, "mlflow_sync" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
    assert sink.run_id is None
    assert len(spooled(spool)) == 1


def test_a_sweep_without_a_server_is_whole_once_it_is_synced(
    client: MlflowClient, opened: Open, study: str, spool: Path, uri: str, tmp_path: Path
) -> None:
    parent = opened("sweep", AWAY)
    before = time.time()
    killed(spool, RunIdentity(AWAY, study, "killed", "runs/killed", parent_key="runs/sweep"), 5)
    child = opened("trial", AWAY, parent_key="runs/sweep")
    child.log({"loss": 1.5}, 3)
    (tmp_path / "plot.png").write_bytes(b"png")
    for path in ("plot.png", "gone.png"):
        child.log_artifact(tmp_path / path)
    after = time.time()
    child.close("FAILED")
    parent.note("all of it")
    parent.close()
    time.sleep(0.01)

    told = list(sync(spool, uri))
    assert [(one.left, one.error) for one in told] == [(0, "")] * 3
    found = runs(client, study)
    assert set(found) == {"sweep", "killed", "trial"}
    for name in ("killed", "trial"):
        assert found[name].data.tags["mlflow.parentRunId"] == found["sweep"].info.run_id
    assert found["sweep"].data.tags["mlflow.note.content"] == "all of it"
    assert history(client, found["killed"], "loss") == [(step, step / 2) for step in range(1, 6)]
    assert [f.path for f in client.list_artifacts(found["trial"].info.run_id)] == ["plot.png"]
    assert {name: run.info.status for name, run in found.items()} == {
        "sweep": "FINISHED",
        "killed": "RUNNING",
        "trial": "FAILED",
    }
    (point,) = client.get_metric_history(found["trial"].info.run_id, "loss")
    for at in (point.timestamp, found["trial"].info.start_time, found["trial"].info.end_time):
        assert before <= at / 1000 <= after + 20, "as it was, not as it was sent"
    assert found["trial"].info.end_time >= point.timestamp >= found["trial"].info.start_time
    assert list(sync(spool, uri)) == []


def test_sent_again_or_in_parts_nothing_is_there_twice(
    client: MlflowClient, opened: Open, study: str, spool: Path, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "policy.json").write_text("{}")
    sink = opened("gru", AWAY)
    for step in range(30):
        sink.log({"loss": float(step), "nan": float("nan")}, step)
        if step == 10:
            sink.log_params({"lr": 1})
            sink.log_artifact(tmp_path / "policy")
            sink.register(study, "policy", {"policy_sha256": "ab"}, "best")
    sink.close()
    (path,) = spooled(spool)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (4, 12, 17, len(lines), len(lines)):  # killed here, then sent from the beginning
        path.write_bytes(b"".join(lines[:kept]))
        assert [one.error for one in sync(spool, uri)] == [""]
    run = runs(client, study)["gru"]
    assert history(client, run, "loss") == [(step, float(step)) for step in range(30)]
    assert len(client.get_metric_history(run.info.run_id, "nan")) == 30
    (version,) = client.search_model_versions(f"name = '{study}'")
    assert (version.run_id, version.tags) == (run.info.run_id, {"policy_sha256": "ab"})
    assert client.get_model_version_by_alias(study, "best").version == version.version
    assert version.source == f"{run.info.artifact_uri}/policy"


def test_who_still_runs_and_what_is_cut_or_damaged(
    client: MlflowClient, opened: Open, study: str, spool: Path, uri: str
) -> None:
    running = opened("running", AWAY)
    assert list(sync(spool, uri)) == [], "it sends its own"
    running.close()
    (path,) = spooled(spool)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"metrics": {"lo')
    (spool / "0-damaged.jsonl").write_text("what\n")
    damaged, told = sync(spool, uri)
    assert "is not a spool of MLflow records" in damaged.error
    assert (told.sent, told.left) == (2, 0)
    assert set(runs(client, study)) == {"running"}
    opened("running").close()
    assert (spool / "0-damaged.jsonl").exists()


def test_what_the_server_refuses_does_not_stand_in_the_way(
    client: MlflowClient, opened: Open, study: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened("gru")
    sink.log({"no?name": 1.0}, 1)
    sink.log_params({"lr": 1})
    sink.log({"loss": 1.0}, 1)
    sink.close()
    assert "refuses metrics of gru" in caplog.text
    assert history(client, runs(client, study)["gru"], "loss") == [(1, 1.0)]


def test_the_job_says_what_it_sent_and_what_stays(
    opened: Open, study: str, spool: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mlflow_sync.SyncConfig(storage_root=spool.parents[1])
    assert mlflow_sync.main(config) == 0
    assert "nothing waits" in capsys.readouterr().out
    opened("gru", AWAY).close()
    assert mlflow_sync.main(config) == 1
    assert f"{study}/gru: 2 records stay in {spool}" in capsys.readouterr().out.replace("\n", "")
    assert mlflow_sync.main(replace(config, tracking_uri=uri)) == 0
    assert f"{study}/gru: 2 records sent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("sqlite:///mlflow.db", "is relative"),
        ("htp://127.0.0.1:5000", "no kind that MLflow takes"),
        ("127.0.0.1:5000", "no kind that MLflow takes"),
        ("http://", "names no host"),
    ],
)
def test_a_uri_that_cannot_be_is_refused(wrong: str, reason: str, spool: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        MLflowSink(RunIdentity(wrong, "study", "gru", "runs/gru"), spool)
    with pytest.raises(ValueError, match=reason):
        mlflow_sync.SyncConfig(tracking_uri=wrong)
    assert not spool.exists()


def test_a_server_that_comes_late_dies_and_comes_back(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_sink, "_RETRY_S", 0.0)
    monkeypatch.setattr(mlflow_sink, "_FLUSH_S", 0.5)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    (tmp_path / "report.html").write_text("hello")
    sweep = MLflowSink(RunIdentity(address, "study", "sweep", "runs/sweep"), spool)
    trial = MLflowSink(RunIdentity(address, "study", "trial", "runs/trial", parent_key="runs/sweep"), spool)
    trial.log({"loss": 1.0}, 1)
    with mlflow_server(tmp_path, port):
        until(lambda: trial.run_id is not None and sweep.run_id is not None)
        trial.log({"loss": 2.0}, 2)
    trial.log({"loss": 3.0}, 3)
    trial.log_artifact(tmp_path / "report.html")
    trial.close()
    sweep.close()
    assert len(spooled(spool)) == 2
    with mlflow_server(tmp_path, port):
        until(lambda: answers(address))
        job = [sys.executable, "-m", "ray_jobs.mlflow_sync", "--storage_root", str(spool.parents[1])]
        told = subprocess.run(job, cwd=SOURCE_TREE, capture_output=True, text=True, check=True).stdout
        assert "study/trial: " in told
        client = MlflowClient(address)
        found = runs(client, "study")
        assert found["trial"].data.tags["mlflow.parentRunId"] == found["sweep"].info.run_id
        assert history(client, found["trial"], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert [f.path for f in client.list_artifacts(found["trial"].info.run_id)] == ["report.html"]
        assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert spooled(spool) == []
