import json
import logging
import time
from pathlib import Path

import pytest

from ipvla.tracking import ConsoleSink, JsonlSink, MLflowSink, Sinks, read_jsonl


class TestJsonl:
    def test_what_was_logged_is_on_disk_at_once(self, tmp_path):
        path = tmp_path / "run" / "metrics.jsonl"
        sink = JsonlSink(path)
        sink.log({"loss": 0.5, "lr": 1e-3}, step=3)
        (line,) = read_jsonl(path)
        assert (line["step"], line["loss"], line["lr"]) == (3, 0.5, 1e-3)
        assert abs(line["time"] - time.time()) < 60

    def test_a_resumed_run_replaces_what_came_after_its_checkpoint(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        first = JsonlSink(path)
        for step in (10, 20, 30):
            first.log({"loss": step}, step)
        resumed = JsonlSink(path, resume_step=20)
        resumed.log({"loss": -30}, 30)
        assert [(line["step"], line["loss"]) for line in read_jsonl(path)] == [(10, 10), (20, 20), (30, -30)]

    def test_a_line_cut_by_a_kill_is_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        JsonlSink(path).log({"loss": 1.0}, 1)
        with path.open("a") as file:
            file.write(json.dumps({"step": 2, "loss": 2.0})[:9])
        assert [line["step"] for line in read_jsonl(path)] == [1]
        JsonlSink(path).log({"loss": 3.0}, 3)
        assert [line["step"] for line in read_jsonl(path)] == [1, 3]


def test_the_console_gets_one_line_per_call(caplog):
    with caplog.at_level(logging.INFO, "ipvla.tracking"):
        Sinks((ConsoleSink(), ConsoleSink())).log({"loss": 0.123456}, 7)
    assert [record.message for record in caplog.records] == ["step 7  loss 0.1235"] * 2


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A real SQLite store; creating it takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.mark.slow
class TestMLflow:
    def test_artifacts_of_a_sqlite_store_lie_beside_it(self, uri, client, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "report.html").write_text("a report")
        sink = MLflowSink(uri, "beside", "a run", "runs/beside")
        sink.log_artifact(tmp_path / "report.html")
        sink.close()
        database = Path(uri.removeprefix("sqlite:///"))
        (stored,) = (database.parent / "mlartifacts").rglob("report.html")
        assert stored.read_text() == "a report"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"], (
            "nothing in the working directory"
        )

    def history(self, client, sink, name):
        return [(m.step, m.value) for m in client.get_metric_history(sink.run_id, name)]

    def test_a_run_has_parameters_metrics_by_step_tags_and_artifacts(self, uri, client, tmp_path):
        artifacts = tmp_path / "artifacts"
        client.create_experiment("study", artifact_location=artifacts.as_uri())
        parent = MLflowSink(uri, "study", "quickstart", "runs/quickstart")
        sink = MLflowSink(uri, "study", "gru", "runs/gru", parent_run_id=parent.run_id, tags={"tier": "smoke"})
        sink.log_params({"memory": "gru", "lr": 0.1, "long": "x" * 9000})
        for step in range(1200):
            sink.log({"loss": step / 2}, step)
        (tmp_path / "report.html").write_text("hello")
        sink.log_artifact(tmp_path / "report.html")
        sink.close()
        parent.close("FAILED")

        run = client.get_run(sink.run_id)
        assert run.info.experiment_id == sink.experiment_id == client.get_experiment_by_name("study").experiment_id
        assert (run.info.status, run.info.run_name) == ("FINISHED", "gru")
        assert (run.data.params["memory"], run.data.params["lr"]) == ("gru", "0.1")
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
        assert run.data.tags["tier"] == "smoke"
        assert sorted(self.history(client, sink, "loss")) == [(step, step / 2) for step in range(1200)]
        assert [f.path for f in client.list_artifacts(sink.run_id)] == ["report.html"]
        assert client.get_run(parent.run_id).info.status == "FAILED"

    def test_started_again_it_continues_the_same_run_without_doubling(self, uri, client):
        first = MLflowSink(uri, "resumed", "gru", "runs/it's mine")
        first.log_params({"lr": 0.1})
        first.log({"loss": 1.0}, 10)
        first.log({"loss": 2.0}, 20)
        first.flush()  # and then it is killed

        second = MLflowSink(uri, "resumed", "gru", "runs/it's mine")
        assert second.run_id == first.run_id
        second.log_params({"lr": 0.1, "new": 1})
        for step in (20, 30):
            second.log({"loss": 2.0, "other": 0.0}, step)
        second.close()
        assert sorted(self.history(client, second, "loss")) == [(10, 1.0), (20, 2.0), (30, 2.0)]
        assert sorted(self.history(client, second, "other")) == [(20, 0.0), (30, 0.0)]
        assert client.get_run(second.run_id).data.params == {"lr": "0.1", "new": "1"}
        other = MLflowSink(uri, "resumed", "none", "runs/none")
        assert other.run_id != first.run_id

    def test_an_unreachable_server_is_reported_once_and_never_stops_the_run(self, caplog):
        with caplog.at_level(logging.WARNING, "ipvla.tracking"):
            sink = MLflowSink("http://127.0.0.1:9", "study", "gru", "runs/gru")
            started = time.monotonic()
            for step in range(2000):
                sink.log({"loss": 0.0}, step)
            sink.log_params({"lr": 1})
            assert time.monotonic() - started < 2, "a dead server is not asked at every step"
            sink.close()
        assert len(caplog.records) == 1
        assert "the run goes on" in caplog.text
        assert sink.run_id is None

    def test_what_waited_is_sent_when_the_server_answers(self, uri, client, monkeypatch):
        sink = MLflowSink(uri, "late", "gru", "runs/late")
        sink._client, answering = None, sink._client
        sink.log({"loss": 1.0}, 1)
        sink.flush()
        assert self.history(client, sink, "loss") == []
        sink._client = answering
        sink.close()
        assert self.history(client, sink, "loss") == [(1, 1.0)]


def test_a_relative_database_is_refused():
    with pytest.raises(ValueError, match="relative"):
        MLflowSink("sqlite:///mlflow.db", "study", "gru", "runs/gru")
