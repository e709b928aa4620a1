"""Compiles a file of reasoning once into an SQLite database that can be asked for one episode at a time.

The Bridge file is one JSON object of 1.4 GB, several times that as Python objects. It is read as a stream, file
path by file path, and each episode is stored as one compressed row; texts that several of its steps share are
stored once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ijson

from ipvla.data.reasoning.steps import step_parts
from ipvla.data.source import DatasetError
from ipvla.files import locked, remove_remainders, replacing
from ipvla.reasoning import TAGS

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
            for file_path, episodes in ijson.kvitems(file, "", use_float=True):
                for episode_id, entry in episodes.items():
                    if steps := _steps(entry):
                        yield file_path, str(episode_id), steps
                done = f", after {file_path!r}"
        except (ijson.JSONError, AttributeError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{reasoning_json} is no reasoning file of the form {{file_path: {{episode_id: {{...}}}}}} "
                f"({str(error).splitlines()[0]}{done}); was it copied in whole? Fetch it again"
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
