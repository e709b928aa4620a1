"""Reasoning by episode: a file of it is compiled once into an SQLite database, which is asked for one at a time.

The Bridge file is one JSON object of 1.4 GB, several times that as Python objects. It is read as a stream, file
path by file path, and each episode is stored as one compressed row; texts that several of its steps share are
stored once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import numpy.typing as npt

from ipvla.data.reasoning.steps import Parts, step_parts
from ipvla.data.source import DatasetError
from ipvla.files import foreign_file, locked, one_line, remove_remainders, replacing
from ipvla.reasoning import TAGS

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
            f"{path} is no compiled reasoning ({foreign_file(path) or one_line(error)}); give ECoT's JSON file, "
            "which is compiled by itself"
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


logger = logging.getLogger(__name__)

#: Part of the database's name: raise it when what is stored changes.
_FORMAT = 1
_SCHEMA = "CREATE TABLE episodes (file_path TEXT, episode_id TEXT, said BLOB, PRIMARY KEY (file_path, episode_id))"


def database_path(reasoning_json: Path, cache: Path) -> Path:
    """Where the compiled form of a file stands: another size or time of change gives another name."""
    stat = reasoning_json.stat()
    key = f"{_FORMAT}\0{reasoning_json.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return cache / f"{reasoning_json.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.sqlite"


def compile_reasoning(reasoning_json: Path, cache: Path) -> Path:
    """The compiled form of `reasoning_json` in the directory `cache`, made now if it is not there yet.

    Of several processes that ask at once, one compiles and the others wait. A killed one leaves nothing that
    another would read.

    Raises:
        DatasetError: the file is no JSON of the expected form; the message says how far it was read.
    """
    target = database_path(reasoning_json, cache)
    if target.exists():
        return target
    with locked(cache / f".{target.stem}.lock"):
        if not target.exists():
            logger.info("compiling reasoning file %s, once", reasoning_json.name)
            remove_remainders(target)
            with replacing(target) as part:
                _compile(reasoning_json, part)
    return target


def _compile(reasoning_json: Path, target: Path) -> None:
    episodes = steps = 0
    with contextlib.closing(sqlite3.connect(target)) as database:
        # a crash leaves a .part file that is thrown away, so there is no journal to keep
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(_SCHEMA)
        for file_path, episode_id, reasoning in _episodes(reasoning_json):
            row = (file_path, episode_id, pack(reasoning))
            database.execute("INSERT OR REPLACE INTO episodes VALUES (?, ?, ?)", row)
            episodes += 1
            steps += len(reasoning)
        database.commit()
    logger.info("%s: reasoning of %d steps in %d episodes", reasoning_json.name, steps, episodes)


def _episodes(reasoning_json: Path) -> Iterator[tuple[str, str, dict[int, dict[str, str]]]]:
    """File path, episode and the parts of its steps, of every episode with reasoning."""
    done = ""
    with reasoning_json.open("rb") as file:
        try:
            if not file.peek(1).startswith(b"{"):  # nesting alone would keep the parser busy
                raise ValueError("it is no object")
            for file_path, episodes in ijson.kvitems(file, "", use_float=True):
                for episode_id, entry in episodes.items():
                    if steps := _steps(entry):
                        yield file_path, str(episode_id), steps
                done = f", after {file_path!r}"
        except (ijson.JSONError, AttributeError, TypeError, ValueError) as error:
            reason = foreign_file(reasoning_json) or one_line(error)
            raise DatasetError(
                f"{reasoning_json} is no reasoning file of the form {{file_path: {{episode_id: {{...}}}}}} "
                f"({reason}{done}); was it copied in whole? Fetch it again"
            ) from None
        if not done:
            raise DatasetError(f"{reasoning_json} holds no episode; give a reasoning file of ECoT")


def _steps(entry: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    # Bridge has {"reasoning": {"0": ...}, "features": ...}, LIBERO the steps alone.
    by_step = entry["reasoning"] if "reasoning" in entry else {k: v for k, v in entry.items() if k.isdigit()}
    features = entry.get("features") or {}
    steps = {int(step): step_parts(at, features, int(step)) for step, at in (by_step or {}).items() if at}
    return {step: parts for step, parts in sorted(steps.items()) if parts}


def pack(steps: Mapping[int, Mapping[str, str]]) -> bytes:
    """An episode's row: each text once, and per step which of them stand under which tag (-1 for none)."""
    texts: dict[str, int] = {}
    rows = [
        [step, *(texts.setdefault(parts[tag], len(texts)) if tag in parts else -1 for tag in TAGS)]
        for step, parts in steps.items()
    ]
    return zlib.compress(json.dumps([list(texts), rows], ensure_ascii=False).encode("utf-8", "surrogatepass"))


def unpack(row: bytes) -> dict[int, dict[str, str]]:
    """The inverse of `pack`."""
    texts, rows = json.loads(zlib.decompress(row).decode("utf-8", "surrogatepass"))
    return {step: {tag: texts[i] for tag, i in zip(TAGS, which, strict=True) if i >= 0} for step, *which in rows}
