"""What jobs show while they run: bars or a table on a terminal, elsewhere a log line now and then."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from evaluators.rollout_status import RolloutStatus

if TYPE_CHECKING:  # takes seconds, and most jobs train nothing
    from ipvla.experiment import ExperimentConfig

_LOG_EVERY_S = 10.0
_LOG_TRAINING_EVERY_S = 20.0
_POLL_S = 1.0
#: At a time, for trainings of which none has moved.
_MOST_LINES = 8
#: Of the end of `metrics.jsonl`: dozens of lines.
_TAIL_BYTES = 2**16
_logger = logging.getLogger(__name__)


class _LogClock:
    """Says when the next log line is due."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._logged_s = every_s, time.monotonic()

    def is_due(self) -> bool:
        """Asked once per line: True begins the next wait."""
        now = time.monotonic()
        if now - self._logged_s < self._every_s:
            return False
        self._logged_s = now
        return True


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def time_left(seconds: float | None) -> str:
    """Rounded, in words; None is unknown."""
    return "time left unknown yet" if seconds is None else f"about {_seconds(seconds)} left"


class EpisodeProgress(Progress):
    """Bars over episodes that are played or read, or another `unit`; without a terminal, a line now and then."""

    def __init__(self, console: Console | None = None, unit: str = "episodes") -> None:
        self._clock, self._unit = _LogClock(_LOG_EVERY_S), unit
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self.disable = not self.console.is_terminal

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As `Progress.update`."""
        super().update(task_id, **changes)
        self._log(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As `Progress.advance`."""
        super().advance(task_id, advance)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        if not self.disable or not self._clock.is_due():
            return
        task = next(task for task in self.tasks if task.id == task_id)
        of = "" if task.total is None else f" of {task.total:.0f}"
        left = "" if task.time_remaining is None else f", {time_left(task.time_remaining)}"
        _logger.info("%s: %.0f%s %s%s", task.description, task.completed, of, self._unit, left)


@dataclass(frozen=True)
class TaskProgress:
    """One task of a collection: demonstrations so far, their target, attempts made."""

    task: str
    demonstrations: int
    target: int
    attempts: int


class CollectionDisplay:
    """A context manager; `update` is an `on_progress` of `ray_jobs.collect.collect`."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = _notes_beside_bars(console, MofNCompleteColumn())
        self._bars: dict[str, TaskID] = {}
        self._started, self._before = time.monotonic(), 0
        self._clock = _LogClock(_LOG_EVERY_S)

    def update(self, tasks: Sequence[TaskProgress]) -> None:
        total = TaskProgress(
            "collecting",
            sum(task.demonstrations for task in tasks),
            sum(task.target for task in tasks),
            sum(task.attempts for task in tasks),
        )
        if not self._bars:
            self._before = total.demonstrations
            for task in (total, *tasks):
                self._bars[task.task] = self._progress.add_task(task.task, total=task.target, note="")
        done, to_do = total.demonstrations - self._before, total.target - total.demonstrations
        left = time_left((time.monotonic() - self._started) / done * to_do if done else None)
        for task in (total, *tasks):
            note = f"{task.attempts} attempts" + (f", {left}" if task is total else "")
            self._progress.update(self._bars[task.task], completed=task.demonstrations, note=note)
        if self._progress.disable and self._clock.is_due():
            _logger.info(
                "%d of %d demonstrations, %d attempts, %s",
                *(total.demonstrations, total.target, total.attempts, left),
            )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class EvaluationDisplay:
    """A context manager; `update` and `tell` say how a policy's evaluation goes."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._rows: dict[str, tuple[RolloutStatus, str]] = {}
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=2, transient=True)
        self._clock = _LogClock(_LOG_EVERY_S)

    def update(self, policy: str, status: RolloutStatus) -> None:
        """What is known while it plays."""
        self._rows[policy] = (status, "playing")
        if not self._console.is_terminal and self._clock.is_due():
            success, speed, simulators, busy, retries, left = _cells(status)
            _logger.info(
                f"{policy}: {status.played} of {status.total} episodes, success {success}, {speed} episodes/s, "
                f"simulators {simulators}, policy {busy}, {retries} retries, {left} left"
            )

    def tell(self, policy: str, doing: str) -> None:
        """What is done with it now, in a word, after it has played."""
        self._rows[policy] = (self._rows[policy][0], doing)

    def table(self) -> Table:
        """A row per policy."""
        headings = ("episodes", "success (95 %)", "episodes/s", "simulators", "policy", "retries", "left")
        table = Table("policy", *(Column(heading, justify="right") for heading in headings))
        for policy, (status, doing) in self._rows.items():
            table.add_row(f"{policy}, {doing}", f"{status.played} of {status.total}", *_cells(status))
        return table

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def _cells(status: RolloutStatus) -> tuple[str, ...]:
    """Success, episodes per second, load of simulators and of the policy, retries, time left."""
    low, high = status.success95
    return (
        f"{status.successes / status.played:.2f} ({low:.2f}-{high:.2f})" if status.played else "-",
        f"{status.episodes_per_s:.2f}",
        f"{1 - status.waiting:.0%} busy",
        "-" if status.policy_busy is None else f"{status.policy_busy:.0%} busy",
        str(status.retries),
        "-" if status.left_s is None else _seconds(status.left_s),
    )


@dataclass(frozen=True)
class TrainingStatus:
    """Where a training stands, from its `metrics.jsonl`.

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
        return f"loss {self.loss:.4f}, {self.frames_per_s:.0f} frames/s, {time_left(self.left_s)}"


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
        steps = TextColumn("{task.completed:.0f}/{task.total:.0f} steps")
        self._progress = _notes_beside_bars(console, steps)
        self._bars: dict[str, TaskID] = {}
        self._since: dict[str, float] = {}
        self._shown: dict[str, int] = {}
        self._clock = _LogClock(_LOG_TRAINING_EVERY_S)
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
        if self._progress.disable and self._clock.is_due():
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


def _notes_beside_bars(console: Console | None, count: ProgressColumn) -> Progress:
    """A bar per task with a note; shown on a terminal only."""
    console = console or Console(stderr=True)
    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (name, BarColumn(), count, note, TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


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
