"""Failures of a training that a retry cannot mend, unlike a lost worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_jobs.command_line.cli import user_error

if TYPE_CHECKING:
    from ray.train import UserCallback


class TrainingError(ValueError):
    """The same settings and data would fail again."""


@contextmanager
def lasting_failures() -> Iterator[None]:
    """Within a worker: what a retry cannot mend becomes TrainingError.

    That is a loss or gradient that is not a number, a full disk, and what this project says of settings and
    data; a lost process or a defect stays what it is.
    """
    try:
        yield
    except Exception as error:
        lasting = error if isinstance(error, FloatingPointError) else user_error(error)
        if lasting is None:
            raise
        raise TrainingError(str(lasting)) from error


def end_at_once() -> UserCallback:
    """Ends a run at its first TrainingError: Ray Train takes an error of a callback for final."""
    from ray.train import UserCallback  # takes seconds, and settings are checked before

    class EndAtOnce(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, TrainingError):
                    raise error

    return EndAtOnce()
