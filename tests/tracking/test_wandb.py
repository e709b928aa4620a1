"""A copy of a run on Weights & Biases, in its offline mode: what its own program wrote is read back."""

from __future__ import annotations

import json
import logging
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from ipvla.experiment import ExperimentConfig
from ipvla.tracking import TrackingConfig, WandbConfig, WandbSink
from ray_jobs.train import run_sinks, train_policy
from tests.tracking.server import until

Make = Callable[..., ExperimentConfig]
MESSAGES: Any = wandb_internal_pb2
OFFLINE = WandbConfig("of-ours", mode="offline")
_BLOCK, _HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Of a `.wandb` file: LevelDB's log format, blocks of 32 KiB of (checksum, length, kind) and bytes."""
    data, at, held = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        held += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = MESSAGES.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def written(directory: Path) -> list[Any]:
    """Of all runs in a directory, once W&B's own process has written the last of each."""
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        until(lambda path=path: any(one.WhichOneof("record_type") == "exit" for one in records(path)))  # type: ignore[misc]
        found += list(records(path))
    return found


def history(directory: Path) -> list[dict[str, float]]:
    lines = [one.history.item for one in written(directory) if one.WhichOneof("record_type") == "history"]
    told = [{(item.nested_key or [item.key])[0]: item.value_json for item in line} for line in lines]
    return [{name: json.loads(value) for name, value in line.items() if name[0] != "_"} for line in told]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_metrics_and_settings_are_in_the_file_that_wandb_sync_sends(tmp_path: Path) -> None:
    sink = OFFLINE.build(tmp_path, "recall", "gru")
    assert sink is not None
    sink.log_params({"model.chunk": 8})
    sink.log({"train/loss": 0.5}, 10)
    sink.log({"train/loss": 0.25}, 20)
    sink.log({"train/loss": 0.3}, 15)  # of a training that goes on from a checkpoint
    sink.close()
    wanted = [(10, 0.5), (20, 0.25), (15, 0.3)]
    assert [(line["step"], line["train/loss"]) for line in history(tmp_path)] == wanted
    told = written(tmp_path)
    (run, *_) = [one.run for one in told if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group) == ("of-ours", "gru", "recall")
    settings = [item for one in told for item in (*one.config.update, *one.run.config.update)]
    assert ("model.chunk", "8") in [(item.key or item.nested_key[0], item.value_json) for item in settings]


def test_a_run_that_goes_on_and_its_evaluation_are_the_same_run(tmp_path: Path) -> None:
    for number in range(2):
        time.sleep(1.1 * number)  # W&B names directories by the second
        sink = OFFLINE.build(tmp_path, "recall", "gru")
        assert sink is not None
        sink.log({"train/loss": 0.5}, number)
        sink.close("KILLED")
    time.sleep(1.1)
    evaluation = WandbSink.found(tmp_path, "recall", "gru")
    assert evaluation is not None
    evaluation.log({"success/recall": 0.9}, 2)
    evaluation.close()
    assert len({one.run.run_id for one in written(tmp_path) if one.WhichOneof("record_type") == "run"}) == 1
    assert [line["step"] for line in history(tmp_path)] == [0, 1, 2]


def test_what_a_policy_without_a_copy_says(tmp_path: Path) -> None:
    assert WandbConfig().build(tmp_path, "recall", "gru") is None
    assert WandbSink.found(tmp_path, "recall", "gru") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", '{"id": "x"}', '{"id": "x", "project": "p", "entity": null, "mode": 3}']
)
def test_a_damaged_record_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str) -> None:
    (tmp_path / "wandb.json").write_text(damaged)
    with caplog.at_level(logging.WARNING, "ipvla.tracking"):
        assert OFFLINE.build(tmp_path, "recall", "gru") is None
    assert "wandb.json is damaged" in caplog.text
    (tmp_path / "wandb.json").unlink()  # as the message says
    sink = OFFLINE.build(tmp_path, "recall", "gru")
    assert sink is not None
    sink.close()


def test_one_that_cannot_be_reached_is_written_offline_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ipvla.tracking.wandb_sink._REACHED_WITHIN_S", 2.0)
    with caplog.at_level(logging.WARNING, "ipvla.tracking"):
        sink = replace(OFFLINE, mode="online").build(tmp_path, "recall", "gru")
    assert sink is not None
    sink.log({"train/loss": 0.5}, 1)
    sink.close()
    wandb.teardown()  # it remembers the login
    (advice,) = re.findall(r"wandb sync --id \w+ \S+", caplog.text)
    program = Path(sys.executable).with_name("wandb")
    command = f"{program} {advice.removeprefix('wandb ')} --dry-run"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "offline-run-" in shown.stdout + shown.stderr
    assert [line["train/loss"] for line in history(tmp_path)] == [0.5]


def test_what_fails_on_the_way_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = OFFLINE.build(tmp_path, "recall", "gru")
    assert sink is not None

    def fail(*_: object, **__: object) -> None:
        raise wandb.Error("the service has gone")

    monkeypatch.setattr(wandb.Run, "log", fail)
    with caplog.at_level(logging.WARNING, "ipvla.tracking"):
        for step in range(3):
            sink.log({"train/loss": 0.5}, step)
    sink.close()
    assert caplog.text.count("the service has gone") == 1


def test_a_training_logs_to_both(make_experiment: Make) -> None:
    config = make_experiment(tracking=TrackingConfig(wandb=OFFLINE))
    config.prepare()
    sinks = run_sinks(config, 0)
    sinks.log({"train/loss": 1.5}, 1)
    sinks.close()
    assert history(config.run_directory) == [{"train/loss": 1.5, "step": 1}]
    assert (config.run_directory / "metrics.jsonl").read_text().count("train/loss") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"project": "a/b"}, r"W&B takes names without"),
        ({"project": ""}, r"W&B takes names without"),
        ({"entity": "us"}, r"entity is 'us', and project null; name a project"),
        ({"project": "p", "mode": "dryrun"}, r"mode is 'dryrun'; choose one of online, offline"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WandbConfig(**settings)


def test_nobody_is_logged_in(make_experiment: Make) -> None:
    online = TrackingConfig(wandb=WandbConfig("of-ours"))
    with pytest.raises(ValueError, match=r"nobody is logged in: run wandb login, .*mode offline"):
        train_policy(make_experiment(tracking=online))
