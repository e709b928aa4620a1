"""What jobs show while they run: bars on a terminal, for a collection a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
    """One task of a collection: demonstrations that count so far, how many are wanted, attempts made."""

    task: str
    demonstrations: int
    wanted: int
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
            sum(task.wanted for task in tasks),
            sum(task.attempts for task in tasks),
        )
        if not self._bars:
            self._before = total.demonstrations
            for task in (total, *tasks):
                self._bars[task.task] = self._progress.add_task(task.task, total=task.wanted, note="")
        for task in (total, *tasks):
            note = f"{task.attempts} attempts" + (f", {self._remaining(total)}" if task is total else "")
            self._progress.update(self._bars[task.task], completed=task.demonstrations, note=note)
        now = time.monotonic()
        if self._progress.disable and (now - self._logged >= _LOG_EVERY_S):
            self._logged = now
            _logger.info(
                "%d of %d demonstrations, %d attempts, %s",
                total.demonstrations,
                total.wanted,
                total.attempts,
                self._remaining(total),
            )

    def _remaining(self, total: TaskProgress) -> str:
        done = total.demonstrations - self._before
        if not done:
            return "time left unknown yet"
        left_s = (time.monotonic() - self._started) / done * (total.wanted - total.demonstrations)
        return f"about {left_s:.0f} s left" if left_s < 100 else f"about {left_s / 60:.0f} min left"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def episode_progress(console: Console) -> Progress:
    """Bars over episodes that are being played."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
