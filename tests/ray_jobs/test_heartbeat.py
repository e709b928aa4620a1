"""A job that is silent says that it is at work; one that speaks, or has a terminal, is left alone."""

from __future__ import annotations

import sys
import time

import pytest

from ray_jobs.command_line.heartbeat import heartbeat


def test_silence_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with heartbeat("ipvla convert", 0.05):
        time.sleep(0.3)
    assert (sys.stdout, sys.stderr) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all("ipvla convert: at work since" in line for line in lines)


def test_a_job_that_speaks_is_not_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    with heartbeat("ipvla convert", 0.4):
        for step in range(10):
            print(step)
            time.sleep(0.08)
    shown = capsys.readouterr()
    assert (shown.out.split(), shown.err) == ([str(step) for step in range(10)], "")


def test_a_terminal_is_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with heartbeat("ipvla convert", 0.02):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_goes_wrong_inside_comes_out() -> None:
    with pytest.raises(ValueError, match="wrong"), heartbeat("ipvla convert", 0.02):
        raise ValueError("wrong")
