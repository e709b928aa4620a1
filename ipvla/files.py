"""Files and directories that appear whole, by one rename, or not at all; records of bounded size; locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

#: Bytes of the largest JSON record that is read: some thousand times what we write.
_LARGEST_RECORD = 16 * 2**20


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a regular file.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is no file, has more than `most` bytes, or is no UTF-8.
    """
    content = bounded(path, most)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(foreign(content) or one_line(error)) from None


def bounded(path: Path, most: int) -> bytes:
    """The content of a regular file; another kind, a pipe say, is not waited for.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is no file, or has more than `most` bytes.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size} bytes; at most {most} are read")
    return path.read_bytes()


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MiB.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no JSON object.
    """
    return record_of(bounded(path, _LARGEST_RECORD))


def record_of(content: bytes) -> dict[str, Any]:
    """The JSON object that a file's content is. ValueError if it is none."""
    record = json_of(content)
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, not an object with named values")
    return record


def json_of(content: bytes) -> Any:
    """The JSON value that a file's content is. ValueError, in one short line, if it is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(foreign(content) or one_line(error)) from None


#: How foreign files begin -> what they are, and what helps.
_FOREIGN = {
    b"version https://git-lfs": "it is a pointer of Git LFS: run `git lfs pull` where it was copied from",
    b"\x1f\x8b": "it is compressed: run `gunzip` on it",
    b"PK\x03\x04": "it is a ZIP archive, as `torch.save` writes them",
    b"\x80\x02": "it is a pickle, which is never read",
    b"<!doctype html": "it is a web page: the download led to a login or an error; download it again",
    b"<html": "it is a web page: the download led to a login or an error; download it again",
}
#: Bytes that tell.
HEAD = 32


def foreign(begins: bytes) -> str | None:
    """What a file is in the place of one of ours, and what helps, if the bytes that it begins with tell."""
    head = begins[:HEAD].lstrip().lower()
    return next((what for begin, what in _FOREIGN.items() if head.startswith(begin.lower())), None)


def foreign_file(path: Path) -> str | None:
    """The same of a file; None as well if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return foreign(file.read(HEAD))


def nearby(directory: Path, *names: str) -> str | None:
    """The directory one level below or above that holds these files, which this one does not; None if none does.

    Of several below it is none: nobody knows which was meant.
    """
    below = [path for path in directory.glob("*") if all((path / name).is_file() for name in names)]
    if len(below) == 1:
        return str(below[0])
    return str(directory.parent) if all((directory.parent / name).is_file() for name in names) else None


def one_line(error: BaseException, most: int = 300) -> str:
    """An error of whatever origin as part of a message: its text, or its class where it has none."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, LookupError | MemoryError) else str(error)
    if isinstance(error, UnicodeDecodeError):  # its text has no bound, since it holds the whole content
        text = f"byte {error.start} is no {error.encoding}"
    return " ".join(text.split())[:most] or type(error).__name__


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


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `directory` if the block ends well, and else is removed.

    Directories above it are made. A killed process leaves its unfinished one: see `remove_remainders`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.incomplete")
    building.mkdir()
    try:
        yield building
        if directory.exists():
            old = building.with_suffix(".old")
            directory.rename(old)
            building.rename(directory)
            shutil.rmtree(old)
        else:
            building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def remove_remainders(path: Path) -> None:
    """Removes what killed processes left while they made `path`; the caller knows that none is at work on it."""
    for building in path.parent.glob(f".{path.name}.*.incomplete"):
        shutil.rmtree(building, ignore_errors=True)
    for part in path.parent.glob(f".{path.name}.*.part"):
        part.unlink()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock file `path`, which stays behind; the kernel drops the lock when its holder dies.

    Args:
        wait: until another process has dropped it.

    Raises:
        BlockingIOError: another process holds it, without `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if not lock(file, wait=wait):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path))
        yield


def lock(file: IO[Any], *, wait: bool) -> bool:
    """Locks an open file until it is closed; False if another process has it.

    A file system that cannot lock, as some network file systems, lets everybody in.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def link(source: Path, target: Path) -> None:
    """Gives a file a second name in the same file system, or a copy where that has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
