"""What jobs show while they run: bars on a terminal, elsewhere a log line now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LOG_EVERY_S = 10.0
_logger = logging.getLogger(__name__)


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
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._started = time.monotonic()
        self._before = 0
        self._logged = self._started

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
        for task in (total, *tasks):
            note = f"{task.attempts} attempts" + (f", {self._remaining(total)}" if task is total else "")
            self._progress.update(self._bars[task.task], completed=task.demonstrations, note=note)
        now = time.monotonic()
        if self._progress.disable and (now - self._logged >= _LOG_EVERY_S):
            self._logged = now
            _logger.info(
                "%d of %d demonstrations, %d attempts, %s",
                total.demonstrations,
                total.target,
                total.attempts,
                self._remaining(total),
            )

    def _remaining(self, total: TaskProgress) -> str:
        done = total.demonstrations - self._before
        if not done:
            return "time left unknown yet"
        return time_left((time.monotonic() - self._started) / done * (total.target - total.demonstrations))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class EpisodeProgress(Progress):
    """Bars over episodes that are played or read; where there is no terminal, a log line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self._logged_s = time.monotonic()
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
        if not self.disable or time.monotonic() - self._logged_s < _LOG_EVERY_S:
            return
        self._logged_s = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        of = "" if task.total is None else f" of {task.total:.0f}"
        left = "" if task.time_remaining is None else f", {time_left(task.time_remaining)}"
        _logger.info("%s: %.0f%s episodes%s", task.description, task.completed, of, left)


def time_left(seconds: float) -> str:
    """Rounded, in words."""
    return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
