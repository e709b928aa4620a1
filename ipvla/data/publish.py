"""Directories that appear whole, by one rename, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipvla.data.source import DatasetError


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """One writer of a dataset at a time; the kernel drops the lock, a file beside it, when its holder dies.

    Raises:
        DatasetError: another process holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"another process is writing {target}; wait or choose another name") from None
        yield


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `target` if the block ends well, and else is removed.

    One process at a time: the caller holds `exclusive(target)`.

    Raises:
        DatasetError: the target exists already.
    """
    require_absent(target)
    # A killed writer leaves this behind; under the caller's lock it can only be such a remainder.
    building = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        os.rename(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def require_absent(target: Path) -> None:
    """Raises DatasetError if there is such a dataset."""
    if target.exists():
        raise DatasetError(f"dataset {target} exists already; choose another name or delete that directory")


def link(source: Path, target: Path) -> None:
    """Gives a file a second name in the same file system, or a copy where that has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
