"""Local copies of remote files: fetched once, complete or not there."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from ipvla.data.lerobot.format import Tree
from ipvla.data.source import DatasetError
from ipvla.files import replacing


class Downloads:
    """Videos are decoded from local files only, so those of object storage are fetched at their first use.

    Args:
        tree: where they come from.
        directory: where they are stored, shared by all processes and datasets; None if nothing may be fetched.
    """

    def __init__(self, tree: Tree, directory: Path | None) -> None:
        self._tree = tree
        self._directory = directory
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        """The local path of a file of the tree.

        Raises:
            DatasetError: the file is remote, and there is no directory to fetch it to.
            OSError: it is not there, or cannot be fetched.
        """
        if self._tree.local:
            return self._tree.path(name)
        if self._directory is None:
            raise DatasetError(
                f"{self._tree.location}/{name} is remote, and videos are decoded from local files; give a "
                "directory to keep copies in (cache_directory)"
            )
        address = f"{self._tree.location}/{name}"
        copy = self._directory / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}{Path(name).suffix}"
        with self._lock:
            if not copy.exists():
                with replacing(copy) as part:
                    self._tree.files.get_file(self._tree.path(name), str(part))
        return str(copy)
