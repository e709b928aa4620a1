"""How every job starts and fails: settings from the command line, `--help`, one line for an expected error."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler

from ipvla.storage import StorageError, absolute_paths
from ray_jobs.command_line.heartbeat import heartbeat
from ray_jobs.command_line.help import help_text
from ray_jobs.command_line.settings import Config, parse

if TYPE_CHECKING:
    from ray.train import UserCallback


class Terminated(BaseException):
    """SIGTERM came, and what was under way has been saved."""


class TrainingError(ValueError):
    """A training failed, and the same settings and data would fail again, unlike a lost worker."""


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, by an exception; in the main thread."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_OURS = ("ipvla", "evaluators", "ray_jobs")
#: Why nothing can be written that could before, and what to do about it.
_NO_ROOM = {
    errno.ENOSPC: ("no space is left on the disk", "free some"),
    errno.EDQUOT: ("this user's share of the disk is used up", "free some"),
    errno.EROFS: ("the file system has become read-only", "have it repaired"),
}


def run(
    config_class: type[Config],
    main: Callable[[Config], int | None],
    description: str | None,
    at_end: Callable[[Config], None] | None = None,
) -> NoReturn:
    """Runs `main` with the configuration that the command line asks for, and exits.

    An error of the user's making is one line on stderr and exit code 2; any other exception keeps its traceback.

    Args:
        main: returns the exit code, None for 0.
        description: what the job does, for `--help`.
        at_end: called last, however `main` ends, behind what is said of that.
    """
    config: Config | None = None
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(help_text(config_class, _program(), description or "") + "\n")
        sys.exit(0)
    try:
        with heartbeat(_program()):
            _configure_logging()
            config = absolute_paths(parse(config_class, sys.argv[1:]))
            sys.exit(main(config))
    except Terminated:
        sys.stderr.write("terminated; run the same command again to continue\n")
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        sys.exit(130)
    except Exception as error:
        expected = user_error(error)
        if expected is None:
            raise
        sys.stderr.write(f"error: {' '.join(str(expected).split())}\n")
        sys.exit(2)
    finally:
        if at_end is not None and config is not None:
            sys.stdout.flush()  # a log file gets both, and this is to stand last
            at_end(config)


def user_error(error: BaseException) -> ValueError | None:
    """The error to tell a user in one line, or None if the exception is a defect.

    Users' errors are ValueErrors that this project raises, here or (behind Ray's `cause`) in a worker. A
    ValueError from inside a library is a defect and deserves its traceback. A full disk is the user's too.
    """
    if (full := disk_full(error)) is not None:
        return full
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        # The traceback stayed in the worker; only an error class of ours is surely meant for the user.
        return cause if isinstance(cause, ValueError) and _is_ours(type(cause).__module__) else None
    if not isinstance(error, ValueError):
        return None
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return error if _is_ours(type(error).__module__) or _is_ours(raised_in) else None


def first_line(error: BaseException) -> str:
    """Of its text, which may be long; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def disk_full(error: BaseException) -> StorageError | None:
    """What to tell the user, if that is why: libraries say it as OSError, or only in the text of another error."""
    reason, path = str(error), getattr(error, "filename", None)
    for number, (what, remedy) in _NO_ROOM.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in reason:
            where = f" for {path}" if path else ""
            return StorageError(
                f"{what}{where}; {remedy}, or give another --storage_root, and run the same command again"
            )
    return None


@contextmanager
def lasting_failures() -> Iterator[None]:
    """Within a worker: what a retry cannot mend becomes TrainingError.

    That is a loss or gradient that is not a number, a full or read-only disk, and what this project says of
    settings and data; a lost process or a defect stays what it is.
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


def _is_ours(module: str) -> bool:
    return module == "__main__" or module.partition(".")[0] in _OURS


def _program() -> str:
    spec: Any = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else sys.argv[0]


def _configure_logging() -> None:
    """Our own log lines on stderr from INFO on, other libraries' from WARNING on."""
    console = Console(stderr=True)
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
