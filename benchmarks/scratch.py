"""Where a benchmark in small puts its files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ipvla.storage import StorageRoots

Study = TypeVar("Study", bound=StorageRoots)


@contextmanager
def placed(study: Study, quick: bool) -> Iterator[Study]:
    """The study with its directories made; one in small that names no storage root gets a temporary one."""
    with tempfile.TemporaryDirectory() as scratch:
        if quick and study.storage_root is None:
            study = replace(study, storage_root=Path(scratch))
        study.prepare()
        yield study
