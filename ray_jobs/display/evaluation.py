"""How evaluations go: a live table on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from evaluators.rollout_status import RolloutStatus

_LOG_EVERY_S = 10.0
_logger = logging.getLogger(__name__)


class EvaluationDisplay:
    """A context manager; `update` and `tell` say how a policy's evaluation goes."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._rows: dict[str, tuple[RolloutStatus, str]] = {}
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=2, transient=True)
        self._logged_s = time.monotonic()

    def update(self, policy: str, status: RolloutStatus) -> None:
        """What is known while it plays."""
        self._rows[policy] = (status, "playing")
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now
            _logger.info("%s", sentence(policy, status))

    def tell(self, policy: str, doing: str) -> None:
        """What is done with it now, in a word, after it has played."""
        self._rows[policy] = (self._rows[policy][0], doing)

    def table(self) -> Table:
        """A row per policy."""
        table = Table()
        for heading in ("policy", "episodes", "success (95 %)"):
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        for heading in ("episodes/s", "simulators", "policy", "retries", "left"):
            table.add_column(heading, justify="right")
        for policy, (status, doing) in self._rows.items():
            table.add_row(
                f"{policy}, {doing}",
                f"{status.played} of {status.total}",
                _success(status),
                f"{status.episodes_per_s:.2f}",
                f"{1 - status.waiting:.0%} busy",
                _busy(status),
                str(status.retries),
                _left(status),
            )
        return table

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def sentence(policy: str, status: RolloutStatus) -> str:
    """The same as a row of the table, for a log."""
    return (
        f"{policy}: {status.played} of {status.total} episodes, success {_success(status)}, "
        f"{status.episodes_per_s:.2f} episodes/s, simulators {1 - status.waiting:.0%} busy, policy "
        f"{_busy(status)}, {status.retries} retries, {_left(status)} left"
    )


def _success(status: RolloutStatus) -> str:
    if not status.played:
        return "-"
    low, high = status.success95
    return f"{status.successes / status.played:.2f} ({low:.2f}-{high:.2f})"


def _busy(status: RolloutStatus) -> str:
    return "-" if status.policy_busy is None else f"{status.policy_busy:.0%} busy"


def _left(status: RolloutStatus) -> str:
    if status.left_s is None:
        return "-"
    return f"{status.left_s:.0f} s" if status.left_s < 100 else f"{status.left_s / 60:.0f} min"
