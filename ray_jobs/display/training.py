"""How trainings go, from their `metrics.jsonl`: bars on a terminal, elsewhere a log line twice a minute."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ipvla.experiment import ExperimentConfig
from ray_jobs.display.progress import time_left

_LOG_EVERY_S = 20.0
_POLL_S = 1.0
#: At a time, for trainings of which none has moved.
_MOST_LINES = 8
#: Of the end of `metrics.jsonl`: dozens of lines.
_TAIL_BYTES = 2**16
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingStatus:
    """Where a training stands.

    Attributes:
        step: the last that was logged, 0 for none.
        steps: up to which it goes for now.
        loss, frames_per_s: at that step, None for none.
        left_s: seconds to the end, None until a step of this start was logged.
        logged: when the last step was, in seconds since the epoch; 0 for none.
    """

    step: int
    steps: int
    loss: float | None = None
    frames_per_s: float | None = None
    left_s: float | None = None
    logged: float = 0.0

    @classmethod
    def read(cls, config: ExperimentConfig, since: float) -> TrainingStatus:
        """From what the run logged; the speed is that of its last lines after `since`, seconds since the epoch."""
        lines = _last_lines(config.run_directory / "metrics.jsonl")
        if not lines:
            return cls(0, config.training.end)
        last = lines[-1]
        new = [line for line in lines if line["time"] >= since]
        left_s = None
        if new:
            steps, seconds = last["step"] - new[0]["step"], last["time"] - new[0]["time"]
            if not steps:
                steps, seconds = min(config.training.log_every, last["step"]), last["train/seconds"]
            left_s = seconds / steps * (config.training.end - last["step"]) - (time.time() - last["time"])
            left_s = max(left_s, 0.0)
        return cls(
            *(last["step"], config.training.end, last["train/loss"], last["train/frames_per_s"]),
            left_s=left_s,
            logged=last["time"],
        )

    @property
    def note(self) -> str:
        """Loss, speed and time left."""
        if self.loss is None:
            return "no step yet"
        known = "time left unknown yet" if self.left_s is None else time_left(self.left_s)
        return f"loss {self.loss:.4f}, {self.frames_per_s:.0f} frames/s, {known}"


class TrainingDisplay:
    """A context manager that follows trainings in a thread of its own.

    Args:
        runs: the trainings that run now, by the name to show; asked again and again.
        console: where bars go, if it is a terminal.
        idle: what a log line says where none runs.
    """

    def __init__(
        self,
        runs: Callable[[], Mapping[str, ExperimentConfig]],
        console: Console | None = None,
        idle: str = "no training runs",
    ) -> None:
        self._runs, self._idle = runs, idle
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._since: dict[str, float] = {}
        self._shown: dict[str, int] = {}
        self._logged_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="training display", daemon=True)

    def _follow(self) -> None:
        while not self._ended.wait(_POLL_S):
            self.update()

    def update(self) -> None:
        """Shows what there is now; a log line only if the last one is old enough."""
        runs, now = self._runs(), time.time()
        for name in runs:
            self._since.setdefault(name, now)
        statuses = {name: TrainingStatus.read(config, self._since[name]) for name, config in runs.items()}
        for name, status in statuses.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=status.steps, note="")
            self._progress.update(
                self._bars[name], completed=status.step, total=status.steps, note=self._note(name, status)
            )
        if self._progress.disable and time.monotonic() - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = time.monotonic()
            self._log(statuses)

    def _note(self, name: str, status: TrainingStatus) -> str:
        if status.logged >= self._since[name]:
            return status.note
        waited = f"starting since {time.time() - self._since[name]:.0f} s"
        return f"{status.note}, {waited}" if status.step else waited

    def _log(self, statuses: Mapping[str, TrainingStatus]) -> None:
        moved = {name: status for name, status in statuses.items() if self._shown.get(name) != status.step}
        for name, status in list((moved or statuses).items())[:_MOST_LINES]:
            ago = time.time() - status.logged
            since = f", {ago:.0f} s ago" if not moved and status.logged >= self._since[name] else ""
            _logger.info(
                "%s: step %d of %d, %s%s", name, status.step, status.steps, self._note(name, status), since
            )
            if status.logged >= self._since[name]:
                self._shown[name] = status.step
        if not statuses:
            _logger.info("%s", self._idle)

    def __enter__(self) -> Self:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.update()
        self._progress.stop()


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines that training logged; those of a Thermostat's readings are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind(b"\n") + 1].splitlines()[1 if size > _TAIL_BYTES else 0 :]
    return [line for line in map(json.loads, whole) if "train/loss" in line]
