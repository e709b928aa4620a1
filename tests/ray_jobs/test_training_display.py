"""What a training shows while it runs."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from ipvla.experiment import ExperimentConfig
from ipvla.training.loop import TrainingConfig
from ray_jobs.running import display
from ray_jobs.running.display import EpisodeProgress, TrainingDisplay, TrainingStatus

Make = Callable[..., ExperimentConfig]
STEPS = TrainingConfig(steps=100, log_every=10)


def log(config: ExperimentConfig, step: int, at: float) -> None:
    config.run_directory.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "time": at, "train/loss": 0.5, "train/frames_per_s": 200.0, "train/seconds": 20.0}
    with (config.run_directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps({"step": step, "time": at, "probe/d": 1.0}) + "\n")


def test_the_time_left_is_that_of_the_steps_since_the_start(make_experiment: Make) -> None:
    config, now = make_experiment(training=STEPS), time.time()
    assert TrainingStatus.read(config, now) == TrainingStatus(0, 100)
    log(config, 10, now - 1000)
    before = TrainingStatus.read(config, now)
    assert (before.step, before.left_s) == (10, None), "an earlier start's"
    log(config, 20, now)
    first = TrainingStatus.read(config, now - 1)
    assert first.left_s == pytest.approx(160, abs=2), "2 s a step, by its own seconds"
    log(config, 40, now + 10)
    assert TrainingStatus.read(config, now - 1).left_s == pytest.approx(30 + 10, abs=2), "0.5 s a step"
    assert TrainingStatus.read(config, now - 1).note == "loss 0.5000, 200 frames/s, about 40 s left"


def test_a_line_that_is_being_written_is_not_read(make_experiment: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, now = make_experiment(training=STEPS), time.time()
    log(config, 10, now)
    log(config, 20, now)
    path = config.run_directory / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 30, "ti')
    assert TrainingStatus.read(config, now).step == 20
    monkeypatch.setattr(display, "_TAIL_BYTES", 250)  # begins within a line
    assert TrainingStatus.read(config, now).step == 20


def test_without_a_terminal_there_is_a_line_at_least_every_half_minute(
    make_experiment: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert display._LOG_TRAINING_EVERY_S < 30
    config, runs = make_experiment(training=STEPS), dict[str, ExperimentConfig]()
    shown = TrainingDisplay(lambda: dict(runs), Console(file=io.StringIO()), idle="nothing trains")
    clock = time.monotonic()
    monkeypatch.setattr(display.time, "monotonic", lambda: clock)

    def lines() -> list[str]:
        nonlocal clock
        caplog.clear()
        clock += display._LOG_TRAINING_EVERY_S + 1
        with caplog.at_level(logging.INFO):
            shown.update()
            shown.update()  # at once: says nothing more
        return [record.getMessage() for record in caplog.records]

    assert lines() == ["nothing trains"]
    runs["gru"] = config
    assert lines() == ["gru: step 0 of 100, starting since 0 s"]
    log(config, 60, time.time())
    assert lines() == ["gru: step 60 of 100, loss 0.5000, 200 frames/s, about 80 s left"]
    (again,) = lines()
    assert again.startswith("gru: step 60 of 100, loss 0.5000")
    assert again.endswith(" s ago"), "nothing new"


def test_a_terminal_has_a_bar_per_training(make_experiment: Make) -> None:
    written = io.StringIO()
    config = make_experiment(training=STEPS)
    with TrainingDisplay(lambda: {"gru": config}, Console(file=written, force_terminal=True, width=120)) as shown:
        log(config, 50, time.time() + 1)
        shown.update()
    assert "gru" in written.getvalue()
    assert "50/100 steps" in written.getvalue()
    assert "loss 0.5000" in written.getvalue()


def test_episodes_are_counted_in_log_lines_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.running.display._LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), EpisodeProgress(Console(file=io.StringIO())) as progress:
        bar = progress.add_task("converting", total=10)
        progress.advance(bar, 4)
        progress.update(bar, completed=5, description="playing")
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("converting: 4 of 10 episodes")
    assert told[1].startswith("playing: 5 of 10 episodes")
