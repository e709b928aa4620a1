"""Files that appear whole, by one rename, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` if the block ends well, and else is removed.

    Directories above it are made. Of processes that write the same file at once, the last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8; returns `path`, which is left alone if it holds just that."""
    encoded = text.encode()
    if not path.exists() or path.read_bytes() != encoded:
        with replacing(path) as part:
            part.write_bytes(encoded)
    return path
