"""Reasoning by episode: where the file comes from, and looking into its compiled form."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.data.reasoning.compiled import compile_reasoning, unpack
from ipvla.data.reasoning.steps import Parts
from ipvla.data.source import DatasetError

logger = logging.getLogger(__name__)

#: The published reasoning files, by name, and the Hugging Face dataset that each is in.
PUBLISHED = {
    "embodied_features_bridge.json": "Embodied-CoT/embodied_features_bridge",
    "libero_reasonings.json": "Embodied-CoT/embodied_features_and_demos_libero",
}
#: What RLDS datasets call an episode's number within its file: Bridge, and ECoT's LIBERO.
_EPISODE_KEYS = ("episode_id", "demo_id")
_NOTHING: Parts = {}


@dataclass(frozen=True)
class Unmatched:
    """Why an episode has no reasoning.

    Attributes:
        reason: in words.
        example: what was compared; may contain paths.
    """

    reason: str
    example: str


class MissingReasoningError(DatasetError):
    """The reasoning file does not exist and cannot be fetched; the message names no path."""


class ReasoningStore:
    """Reasoning of a dataset's episodes; may be copied into other processes and used from several threads.

    Args:
        database: as `compile_reasoning` makes it.
    """

    def __init__(self, database: Path) -> None:
        self.database = database
        self._connections = threading.local()

    def episode(self, file_path: str, episode_id: str) -> dict[int, dict[str, str]]:
        """The reasoning at each step of an episode, by the dataset's own step; empty without any."""
        query = "SELECT said FROM episodes WHERE file_path = ? AND episode_id = ?"
        row = self._connection().execute(query, (file_path, episode_id)).fetchone()
        return {} if row is None else unpack(row[0])

    def of(self, metadata: Mapping[str, Any]) -> dict[int, dict[str, str]]:
        """`episode` of a trajectory's metadata; empty if it has no `file_path` and `episode_id` (`demo_id`)."""
        number = next((metadata[key] for key in _EPISODE_KEYS if key in metadata), None)
        if number is None or "file_path" not in metadata:
            return {}
        return self.episode(str(metadata["file_path"]), _episode_id(number))

    def unmatched(self, metadata: Mapping[str, Any]) -> Unmatched:
        """Why an episode of this metadata has no reasoning."""
        path = str(metadata.get("file_path", ""))
        number = next((metadata[key] for key in _EPISODE_KEYS if key in metadata), None)
        has = f"it has {', '.join(map(str, metadata)) or 'none'}"
        if "file_path" not in metadata:
            return Unmatched("the metadata has no file_path", has)
        if number is None:
            return Unmatched(f"the metadata has no {' or '.join(_EPISODE_KEYS)}", has)
        query = self._connection().execute
        of_file = query("SELECT episode_id FROM episodes WHERE file_path = ? LIMIT 3", (path,)).fetchall()
        if of_file:
            known = ", ".join(row[0] for row in of_file)
            return Unmatched(
                "no such episode of that file_path",
                f"{_episode_id(number)} of {path!r} in the dataset, {known} in the reasoning file",
            )
        ((example,),) = query("SELECT file_path FROM episodes LIMIT 1").fetchall() or [("",)]
        return Unmatched("no such file_path", f"{path!r} in the dataset, {example!r} in the reasoning file")

    def __len__(self) -> int:
        """Episodes with reasoning."""
        return int(self._connection().execute("SELECT count(*) FROM episodes").fetchone()[0])

    def __getstate__(self) -> Path:
        return self.database

    def __setstate__(self, database: Path) -> None:
        self.__init__(database)  # type: ignore[misc]  # a connection does not travel

    def _connection(self) -> sqlite3.Connection:
        """This thread's own; a forked process opens its own too, for SQLite's must not cross a fork."""
        owner = getattr(self._connections, "owner", None)
        if owner != os.getpid():
            address = f"{self.database.resolve().as_uri()}?mode=ro&immutable=1"
            self._connections.opened = sqlite3.connect(address, uri=True)
            self._connections.owner = os.getpid()
        opened: sqlite3.Connection = self._connections.opened
        return opened


def open_store(path: Path, cache: Path) -> ReasoningStore:
    """The reasoning of a file, fetched and compiled where that is still to be done.

    Args:
        path: ECoT's reasoning file, which is compiled, or what was compiled from one (.sqlite). A published file
            that is not there is fetched from Hugging Face.
        cache: directory for the compiled form.

    Raises:
        MissingReasoningError: there is no such file, and none can be fetched.
        DatasetError: the file is there and is no reasoning file.
    """
    if not path.is_file():
        path = _fetched(path.name)
    if path.suffix != ".sqlite":
        return ReasoningStore(compile_reasoning(path, cache))
    store = ReasoningStore(path)
    try:
        len(store)
    except sqlite3.DatabaseError as error:
        raise DatasetError(
            f"{path} is no compiled reasoning ({error}); give ECoT's JSON file, which is compiled by itself"
        ) from None
    return store


def along(by_step: Mapping[int, Parts], raw_step: npt.NDArray[np.int64]) -> Sequence[Parts]:
    """The reasoning at each step of an episode that its standard keeps.

    A dataset's standard may leave steps out (Bridge's first, no-operations): reasoning is numbered by the
    dataset's own step, and indexing it by the standard's would shift all of it.
    """
    return [by_step.get(int(step), _NOTHING) for step in raw_step]


def _episode_id(number: Any) -> str:
    return str(number if isinstance(number, str) else int(np.asarray(number).reshape(-1)[0]))


def _fetched(name: str) -> Path:
    repository = PUBLISHED.get(name)
    if repository is None:
        raise MissingReasoningError(
            f"reasoning file {name} does not exist, and only {sorted(PUBLISHED)} can be fetched; correct its path"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger.info("reasoning file %s is not there: fetching %s from Hugging Face", name, repository)
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (OSError, EntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingReasoningError(
            f"reasoning file {name} does not exist and cannot be fetched from {repository} ({reason}); put it "
            "there, or correct its path"
        ) from error
