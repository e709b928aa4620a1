"""The journal of an evaluation: one SQLite file, exactly one record per episode."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from ipvla.types import EpisodeResult, EpisodeSpec

_BUSY_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id INTEGER PRIMARY KEY CHECK (id = 1), fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    key TEXT PRIMARY KEY, task TEXT NOT NULL, trial INTEGER NOT NULL, outcome TEXT NOT NULL, result TEXT NOT NULL,
    recorded_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
"""


class JournalError(ValueError):
    """The journal cannot be used for this study."""


class Journal:
    """Results of one study. Every record is its own transaction: SIGKILL loses at most the one being written.

    Args:
        path: created with its directory if missing.
        fingerprint: everything that the results depend on but the episodes' keys (protocol, suite version,
            policy hash, library versions). It is written into a new journal and must match an old one.

    Raises:
        JournalError: the journal belongs to another study, or is not a journal.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(_SCHEMA)
            self._claim(dict(fingerprint))
        except sqlite3.DatabaseError as error:
            self.close()
            raise JournalError(
                f"{path} is not a readable journal ({error}); move it away to start afresh"
            ) from None
        except JournalError:
            self.close()
            raise

    def _claim(self, fingerprint: dict[str, str]) -> None:
        mine = json.dumps(fingerprint, sort_keys=True)
        self._connection.execute("INSERT OR IGNORE INTO study VALUES (1, ?)", (mine,))
        (stored,) = self._connection.execute("SELECT fingerprint FROM study").fetchone()
        if stored != mine:
            theirs = json.loads(stored)
            changed = "; ".join(
                f"{name}: journal has {theirs.get(name)!r}, this study {fingerprint.get(name)!r}"
                for name in sorted({*theirs, *fingerprint})
                if theirs.get(name) != fingerprint.get(name)
            )
            raise JournalError(
                f"{self.path} holds the results of another study ({changed}); pass another journal path"
            )

    def record(self, result: EpisodeResult) -> bool:
        """Writes the result unless its episode has one; says whether it was written.

        Raises:
            JournalError: the disk is full, or another process keeps the journal locked for half a minute.
        """
        row = (result.spec.key, result.spec.task, result.spec.trial, result.outcome, json.dumps(asdict(result)))
        try:
            with closing(self._connection.cursor()) as cursor:
                cursor.execute(
                    "INSERT OR IGNORE INTO episodes (key, task, trial, outcome, result) VALUES (?, ?, ?, ?, ?)",
                    row,
                )
                return cursor.rowcount == 1
        except sqlite3.OperationalError as error:
            raise JournalError(
                f"{self.path} cannot be written ({error}); free the disk, or end what holds the journal, and "
                "start again: what was recorded stays, the rest is played then"
            ) from error

    def missing(self, specs: Iterable[EpisodeSpec]) -> list[EpisodeSpec]:
        """Those of `specs` that have no record, in their order."""
        recorded = {key for (key,) in self._connection.execute("SELECT key FROM episodes")}
        return [spec for spec in specs if spec.key not in recorded]

    def results(self) -> list[EpisodeResult]:
        """Every record, by task and trial."""
        rows = self._connection.execute("SELECT result FROM episodes ORDER BY task, trial, key")
        return [_result(json.loads(text)) for (text,) in rows]

    @classmethod
    def merged(cls, sources: Sequence[Path], path: Path) -> Self:
        """The journal at `path` with the records of all sources, of machines that shared a study's episodes.

        An episode that several of them have keeps the first one's record.

        Raises:
            JournalError: a source is missing or damaged, or they (or what is at `path`) are of different studies.
        """
        if not sources:
            raise JournalError("no journals to merge; name at least one")
        with ExitStack() as stack:
            opened = [stack.enter_context(cls(source, _fingerprint_of(source))) for source in sources]
            merged = cls(path, _fingerprint_of(sources[0]))
            try:
                for source in opened:
                    merged._claim(_fingerprint_of(source.path))
                    for result in source.results():
                        merged.record(result)
            except JournalError:
                merged.close()
                raise
        return merged

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _fingerprint_of(path: Path) -> dict[str, str]:
    if not path.exists():
        raise JournalError(f"there is no journal {path}; give what `ray_jobs.evaluate` wrote, episodes.sqlite")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            (stored,) = connection.execute("SELECT fingerprint FROM study").fetchone()
    except (sqlite3.DatabaseError, TypeError) as error:
        raise JournalError(f"{path} is not a readable journal ({error})") from None
    fingerprint: dict[str, str] = json.loads(stored)
    return fingerprint


def _result(fields: dict[str, object]) -> EpisodeResult:
    spec = EpisodeSpec(**fields.pop("spec"))  # type: ignore[arg-type]
    return EpisodeResult(spec=spec, **fields)  # type: ignore[arg-type]
