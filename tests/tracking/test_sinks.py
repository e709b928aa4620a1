import json
import logging
import time

from ipvla.tracking import ConsoleSink, JsonlSink, Sinks, read_jsonl


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
