"""Local paths and addresses in object storage, both through fsspec."""

from __future__ import annotations

from typing import Any

import fsspec

from ipvla.data.source import DatasetError


def file_system(location: str) -> tuple[Any, str]:
    """The file system of a path or address, and the path in it.

    Raises:
        DatasetError: there is no such protocol, or its package is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:  # fsspec says which package is missing
        raise DatasetError(f"{location} cannot be reached: {error}") from None
    return files, str(path)
