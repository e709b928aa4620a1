"""The quickstart as a user runs it: interrupted, started again, complete; every part of it the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE
from ray_jobs.quickstart import Stopwatch


def start(root: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.quickstart", "--tier", "smoke", "--storage_root", str(root)],
        cwd=SOURCE_TREE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a test session in a shell's background ignores Ctrl-C, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupted_quickstart_continues_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart-smoke"
    first = start(tmp_path)
    end = time.monotonic() + 200
    while not (run / "gru" / "metrics.jsonl").exists():
        assert time.monotonic() < end
        assert first.poll() is None, first.stdout and first.stdout.read()
        time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    told, _ = first.communicate(timeout=200)
    assert first.returncode == 130, told
    assert "run the same command again" in told
    dataset = tmp_path / "datasets" / "recall_smoke" / "1.0.0"
    collected = dataset.stat().st_mtime_ns

    second = start(tmp_path)
    told, _ = second.communicate(timeout=500)
    assert second.returncode == 0, told
    assert "SMOKE RUN" in told
    assert dataset.stat().st_mtime_ns == collected, "demonstrations are not collected twice"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["collect"]["demos"] == 8
    for memory in ("none", "gru"):
        assert summary["train"][memory]["frames_per_s"] > 0
        assert {f: row["n"] for f, row in summary["success"][memory].items()} == {
            "ground": 1, "recall": 1, "count": 1, "place": 1,
        }  # fmt: skip
        assert summary["policies"][memory]["protocol"].startswith("recall-1+")
        assert summary["policies"][memory]["families"] == summary["success"][memory]
        for row in summary["success"][memory].values():
            assert row["wilson95"][0] <= row["rate"] <= row["wilson95"][1]
        assert Policy.load(run / memory / "policy").describe()["memory"] == memory
    assert (run / "report.html").stat().st_size > 10_000
    videos = {path.name for path in run.rglob("*.mp4")}
    assert len(videos) >= 4, "one of a success or a failure for every task, at the least"

    mlflow = summary["mlflow"]
    client = MlflowClient(mlflow["tracking_uri"])
    parent = client.get_run(mlflow["run_ids"]["quickstart"])
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"report.html", "summary.json"}
    assert "| recall | " in parent.data.tags["mlflow.note.content"]
    for memory in ("none", "gru"):
        child = client.get_run(mlflow["run_ids"][memory])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.params["model.memory.type"] == memory
        assert child.data.metrics["success/recall/family/recall"] == summary["success"][memory]["recall"]["rate"]
        losses = client.get_metric_history(child.info.run_id, "train/loss")
        assert [m.step for m in losses] == [5, 10, 15, 20], "logged once per step, over both starts"


#: Ends as a killed study does.
_KILLED = """
import os, sys, time
from pathlib import Path
from ray_jobs import quickstart
quickstart._WRITE_EVERY_S = 0.1
with quickstart.Stopwatch(Path(sys.argv[1])):
    time.sleep(1.5)
    os._exit(1)
"""


def test_a_stopwatch_counts_starts_that_were_killed(tmp_path: Path) -> None:
    path = tmp_path / "seconds.txt"
    subprocess.run([sys.executable, "-c", _KILLED, str(path)], cwd=SOURCE_TREE, check=False)
    first = float(path.read_text())
    assert 1 < first < 5
    with Stopwatch(path, started=time.time() - 100) as stopwatch:
        assert first + 100 <= stopwatch.read() < first + 110
    assert float(path.read_text()) >= first + 100
