"""The journal of an evaluation: one SQLite file, exactly one record per episode."""

from __future__ import annotations

import io
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar
from zipfile import BadZipFile, ZipFile

import numpy as np

from ipvla.files import foreign_file, one_line
from ipvla.types import EpisodeResult, EpisodeSpec, EpisodeTrace

Record = TypeVar("Record", EpisodeSpec, EpisodeResult)
_BUSY_TIMEOUT_S = 30.0
#: Bytes of an episode's arrays; hours of control steps have fewer.
_LARGEST_TRACE = 2**28
#: What reading a damaged record raises.
_DAMAGE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    MemoryError,
    OSError,
    BadZipFile,
    zlib.error,
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id INTEGER PRIMARY KEY CHECK (id = 1), fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    key TEXT PRIMARY KEY, task TEXT NOT NULL, trial INTEGER NOT NULL, outcome TEXT NOT NULL, result TEXT NOT NULL,
    recorded_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE IF NOT EXISTS traces (key TEXT PRIMARY KEY, trace BLOB NOT NULL);
"""


class JournalError(ValueError):
    """The journal cannot be used for this study."""


def labelled(file: str, label: str) -> str:
    """`episodes.sqlite` -> `episodes-LABEL.sqlite`, where results with a label lie beside others; "" for none."""
    path = Path(file)
    return f"{path.stem}-{label}{path.suffix}" if label else file


class Journal:
    """Results of one study. Every record is its own transaction: SIGKILL loses at most the one being written.

    Args:
        path: created with its directory if missing.
        fingerprint: everything that the results depend on besides the episodes' keys (protocol, suite version,
            policy hash, library versions). A new journal stores it; an existing one must have the same.

    Raises:
        JournalError: the journal belongs to another study, is not a journal, or cannot be written now: the disk is
            full, or another process keeps it locked for half a minute.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.fingerprint = path, dict(fingerprint)
        with ExitStack() as stack:
            try:
                self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
                stack.callback(self.close)
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.executescript(_SCHEMA)
                self._claim(self.fingerprint)
            except sqlite3.DatabaseError as error:
                raise _unusable(path, error) from error
            except UnicodeDecodeError as error:  # SQLite's message quotes bytes that are no text
                raise _damaged(path, error) from error
            stack.pop_all()

    def _claim(self, fingerprint: dict[str, str]) -> None:
        given = json.dumps(fingerprint, sort_keys=True)
        self._connection.execute("INSERT OR IGNORE INTO study VALUES (1, ?)", (given,))
        (stored,) = self._connection.execute("SELECT fingerprint FROM study").fetchone()
        if stored != given:
            recorded_for = self._fingerprint()
            changed = "; ".join(
                f"{name}: journal has {recorded_for.get(name)!r}, this study {fingerprint.get(name)!r}"
                for name in sorted({*recorded_for, *fingerprint})
                if recorded_for.get(name) != fingerprint.get(name)
            )
            raise JournalError(
                f"{self.path} holds the results of another study ({changed}); give these a journal of "
                "their own, as `ipvla evaluate --label NAME` does"
            )

    def record(self, result: EpisodeResult) -> bool:
        """Writes the result, and its trace, unless its episode has one; says whether it was written.

        Raises:
            JournalError: the disk is full, or another process keeps the journal locked for half a minute.
        """
        spec, record = result.spec, asdict(replace(result, trace=None))
        del record["trace"]
        try:
            with self._transaction(), closing(self._connection.cursor()) as cursor:
                cursor.execute(
                    "INSERT OR IGNORE INTO episodes (key, task, trial, outcome, result) VALUES (?, ?, ?, ?, ?)",
                    (spec.key, spec.task, spec.trial, result.outcome, json.dumps(record)),
                )
                new = cursor.rowcount == 1
                if new and result.trace is not None:
                    cursor.execute("INSERT INTO traces VALUES (?, ?)", (spec.key, _packed(result.trace)))
            return new
        except sqlite3.OperationalError as error:
            raise _unusable(self.path, error) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything that the block writes, or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has rolled it back already
                self._connection.execute("ROLLBACK")
            raise

    def missing(self, specs: Iterable[EpisodeSpec]) -> list[EpisodeSpec]:
        """Those of `specs` that have no record, in their order. JournalError if it is damaged."""
        with self._reading():
            recorded = {key for (key,) in self._connection.execute("SELECT key FROM episodes")}
        return [spec for spec in specs if spec.key not in recorded]

    def results(self, specs: Iterable[EpisodeSpec] | None = None) -> list[EpisodeResult]:
        """Every record, or those of `specs` alone, by task and trial. JournalError if it is damaged."""
        condition, keys = "", tuple[str, ...]()
        if specs is not None:
            condition = "WHERE key IN (SELECT value FROM json_each(?))"
            keys = (json.dumps([spec.key for spec in specs]),)
        query = f"SELECT result FROM episodes {condition} ORDER BY task, trial, key"
        with self._reading():
            return [_result(json.loads(text)) for (text,) in self._connection.execute(query, keys)]

    def trace(self, spec: EpisodeSpec) -> EpisodeTrace | None:
        """The trace of a recorded episode; None where there is none. JournalError if it is damaged."""
        with self._reading():
            row = self._connection.execute("SELECT trace FROM traces WHERE key = ?", (spec.key,)).fetchone()
            return row and _unpacked(row[0])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Within: what damage looks like to SQLite, JSON and NumPy becomes JournalError."""
        try:
            yield
        except JournalError:
            raise
        except sqlite3.DatabaseError as error:
            raise _unusable(self.path, error) from error
        except _DAMAGE as error:
            raise _damaged(self.path, error) from error

    @classmethod
    def existing(cls, path: Path) -> Self:
        """The journal at `path`, of any study, to read alone: nothing is written beside it.

        Raises:
            JournalError: there is none, or it is damaged.
        """
        if not path.exists():
            raise JournalError(f"there is no journal {path}; give what `ray_jobs.evaluate` wrote, episodes.sqlite")
        journal = cls.__new__(cls)
        journal.path = path
        with ExitStack() as stack:
            try:
                journal._connection = _to_read(path)
                stack.callback(journal.close)
                journal.fingerprint = journal._fingerprint()
            except sqlite3.DatabaseError as error:
                raise _unusable(path, error) from error
            except UnicodeDecodeError as error:  # SQLite's message quotes bytes that are no text
                raise _damaged(path, error) from error
            stack.pop_all()
        return journal

    def _fingerprint(self) -> dict[str, str]:
        with self._reading():
            row = self._connection.execute("SELECT fingerprint FROM study").fetchone()
            if row is None:
                raise JournalError(f"{self.path} is of no study yet: nothing was recorded in it")
            fingerprint: dict[str, str] = json.loads(row[0])
            if not isinstance(fingerprint, dict):
                raise TypeError(f"a fingerprint that is a {type(fingerprint).__name__}")
            return fingerprint

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
            opened = [stack.enter_context(cls.existing(source)) for source in sources]
            merged = cls(path, opened[0].fingerprint)
            try:
                for source in opened:  # all of them, before anything is written
                    merged._claim(source.fingerprint)
                for source in opened:
                    for result in source.results():
                        merged.record(replace(result, trace=source.trace(result.spec)))
            except JournalError:
                merged.close()
                raise
        return merged

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _to_read(path: Path) -> sqlite3.Connection:
    """Where this user may write neither the file nor its directory, it is read as one that nobody changes."""
    address = path.resolve().as_uri()
    connection = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        unwritable = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if not unwritable or (log.exists() and log.stat().st_size):
            raise
        return sqlite3.connect(f"{address}?immutable=1", uri=True)


def _damaged(path: Path, error: BaseException) -> JournalError:
    return JournalError(
        f"{path} has a record that cannot be read ({one_line(error)}); move it away to start afresh"
    )


def _unusable(path: Path, error: sqlite3.DatabaseError) -> JournalError:
    """What to do about it: good records must not be thrown away for a lock or a full disk."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without its extension
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
        reason = foreign_file(path) or one_line(error)
        return JournalError(f"{path} is not a readable journal ({reason}); move it away to start afresh")
    return JournalError(
        f"{path} cannot be written ({error}); free the disk, let it be written, or end what holds the journal, "
        "and start again: what was recorded stays, the rest is played then"
    )


def _result(record: dict[str, Any]) -> EpisodeResult:
    spec = _fitting(EpisodeSpec, record.pop("spec"))
    known = {field.name for field in fields(EpisodeResult)}  # older journals have names that are gone
    return _fitting(EpisodeResult, {"spec": spec, **{n: v for n, v in record.items() if n in known}})


#: Of the records' fields, by their annotation.
_TYPES: Mapping[Any, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}


def _fitting(kind: type[Record], values: dict[str, Any]) -> Record:
    """TypeError if a number or text is something else, or a field is missing."""
    for field in fields(kind):
        expected = _TYPES.get(field.type, object)
        if field.name in values and not isinstance(values[field.name], expected):
            raise TypeError(f"{field.name} is {values[field.name]!r:.60}")
    return kind(**values)


def _packed(trace: EpisodeTrace) -> bytes:
    file = io.BytesIO()
    arrays = {field.name: getattr(trace, field.name) for field in fields(trace)}
    np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


def _unpacked(packed: bytes) -> EpisodeTrace:
    if (size := sum(member.file_size for member in ZipFile(io.BytesIO(packed)).infolist())) > _LARGEST_TRACE:
        raise ValueError(f"a trace of {size} bytes")
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        trace = EpisodeTrace(**arrays)
    if trace.actions.ndim != 2 or any(
        array.dtype.kind not in "fi" for array in vars(trace).values() if array is not None
    ):
        raise ValueError("a trace whose arrays are not numbers")
    return trace
