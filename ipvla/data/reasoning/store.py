"""Reasoning by episode: where the file comes from, and looking into its compiled form."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.data.reasoning.compiled import compile_reasoning, unpack
from ipvla.data.reasoning.steps import Parts

logger = logging.getLogger(__name__)

#: The published reasoning files, by name, and the Hugging Face dataset that each is in.
PUBLISHED = {
    "embodied_features_bridge.json": "Embodied-CoT/embodied_features_bridge",
    "libero_reasonings.json": "Embodied-CoT/embodied_features_and_demos_libero",
}
#: What RLDS datasets call an episode's number within its file: Bridge, and ECoT's LIBERO.
_EPISODE_KEYS = ("episode_id", "demo_id")
_NOTHING: Parts = {}


class ReasoningStore:
    """Reasoning of a dataset's episodes; may be copied into other processes and used from several threads.

    Args:
        database: as `compile_reasoning` makes it.
    """

    def __init__(self, database: Path) -> None:
        self.database = database
        self._connections = threading.local()

    def episode(self, file_path: str, episode_id: str) -> dict[int, dict[str, str]]:
        """What is said at each step of an episode, by the dataset's own step; empty where nothing was written."""
        query = "SELECT said FROM episodes WHERE file_path = ? AND episode_id = ?"
        row = self._connection().execute(query, (file_path, episode_id)).fetchone()
        return {} if row is None else unpack(row[0])

    def of(self, metadata: Mapping[str, Any]) -> dict[int, dict[str, str]]:
        """`episode` of a trajectory's metadata; empty if it has no `file_path` and `episode_id` (`demo_id`)."""
        number = next((metadata[key] for key in _EPISODE_KEYS if key in metadata), None)
        if number is None or "file_path" not in metadata:
            return {}
        return self.episode(str(metadata["file_path"]), _episode_id(number))

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


def open_store(reasoning_json: str | None, cache: Path) -> ReasoningStore | None:
    """The reasoning of a file, fetched and compiled where that is still to be done.

    A published file that is not where it was said to be is fetched from Hugging Face. If there is none to be
    had, a message says what to do and None is returned: training goes on with the actions alone.

    Args:
        reasoning_json: its path; None for no reasoning.
        cache: directory for the compiled form.

    Raises:
        DatasetError: the file is there and is no reasoning file: training without it would hide that.
    """
    if not reasoning_json:
        return None
    path = Path(reasoning_json).expanduser()
    if not path.is_file():
        fetched = _fetch(path)
        if fetched is None:
            return None
        path = fetched
    return ReasoningStore(compile_reasoning(path, cache))


def along(said: Mapping[int, Parts], raw_step: npt.NDArray[np.int64]) -> Sequence[Parts]:
    """What is said at each kept step of an episode.

    A dataset's standard may leave steps out (Bridge's first, no-operations): reasoning is numbered by the
    dataset's own step, and indexing it by the kept one would shift all of it.
    """
    return [said.get(int(step), _NOTHING) for step in raw_step]


def _episode_id(number: Any) -> str:
    return str(number if isinstance(number, str) else int(np.asarray(number).reshape(-1)[0]))


def _fetch(path: Path) -> Path | None:
    remedy = (
        "training goes on with the actions alone and reasoning ''. To have reasoning, put the file there, correct "
        "datasets.vla_data.ecot.reasoning_json, or set it to null to be rid of this message"
    )
    repository = PUBLISHED.get(path.name)
    if repository is None:
        logger.warning(
            "reasoning file %s does not exist, and only %s can be fetched; %s",
            path.name,
            sorted(PUBLISHED),
            remedy,
        )
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger.info("reasoning file %s is not there: fetching %s from Hugging Face", path.name, repository)
    try:
        return Path(hf_hub_download(repository, path.name, repo_type="dataset"))
    except (OSError, EntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning(
            "reasoning file %s does not exist and cannot be fetched from %s (%s); %s",
            path.name,
            repository,
            reason,
            remedy,
        )
        return None
