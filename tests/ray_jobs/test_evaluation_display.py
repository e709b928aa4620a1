"""What an evaluation shows while it runs."""

import io
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from evaluators.rollout_status import RolloutStatus
from ray_jobs.running.display import EvaluationDisplay
from tests.evaluators.test_success_table import results


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def status() -> RolloutStatus:
    clock = Clock()
    made = RolloutStatus(10, clock=clock)
    for result in results("ground_a", "ssf"):
        clock.now += 2
        made.add(replace(result, spec=replace(result.spec, attempt=result.spec.trial == 1), wall_s=4, policy_s=1))
    made.hear({"forward_s": 3.0}, replicas=1)
    return made


def test_a_table_on_a_terminal_is_kept_up_to_date():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with EvaluationDisplay(console) as display:
        display.update("none", RolloutStatus(10))
        display.update("gru", status())
        display.tell("gru", "recording")
        shown = Console(file=io.StringIO(), width=120)
        shown.print(display.table())
    rows = {line.split("│")[1].strip(): line for line in shown.file.getvalue().splitlines() if "│" in line}
    for told in ("3 of 10", "0.67 (0.21-0.94)", "0.50", "75% busy", "50% busy", " 1 ", "14 s"):
        assert told in rows["gru, recording"]
    assert rows["none, playing"].count(" - ") == 3, "success, policy and time left are not known yet"


def test_elsewhere_a_line_is_logged_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ray_jobs.running.display.time.monotonic", clock)
    with caplog.at_level(logging.INFO), EvaluationDisplay(Console(file=io.StringIO())) as display:
        for clock.now in (1.0, 5.0, 11.0, 12.0):
            display.update("gru", status())
    (message,) = caplog.messages
    assert message == (
        "gru: 3 of 10 episodes, success 0.67 (0.21-0.94), 0.50 episodes/s, simulators 75% busy, policy 50% busy, "
        "1 retries, 14 s left"
    )
