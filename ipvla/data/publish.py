"""A dataset's directory: one writer at a time, and it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ipvla import files
from ipvla.data.source import DatasetError


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """One writer of a dataset at a time, by a lock file beside it.

    Raises:
        DatasetError: another process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(files.locked(target.with_name(f".{target.name}.lock"), wait=False))
        except BlockingIOError:
            raise DatasetError(f"another process is writing {target}; wait or choose another name") from None
        yield


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `target` if the block ends well, and else is removed.

    The caller holds `exclusive(target)`: what earlier writers left behind is removed.

    Raises:
        DatasetError: the target exists already.
    """
    require_absent(target)
    files.remove_remainders(target)
    with files.appearing(target) as building:
        yield building


def require_absent(target: Path) -> None:
    """Raises DatasetError if there is such a dataset."""
    if target.exists():
        raise DatasetError(f"dataset {target} exists already; choose another name or delete that directory")
