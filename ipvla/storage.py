"""Where things are written: six directories under one storage root, never inside the source tree."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

Config = TypeVar("Config")
SOURCE_TREE = Path(__file__).resolve().parents[1]
#: Flag -> the directory's name under the root.
_DIRECTORIES: Final = {
    "cache_dir": "cache",
    "data_root_dir": "datasets",
    "probe_root_dir": "probe",
    "artifact_dir": "artifacts",
    "run_root_dir": "runs",
    "tmp_dir": "tmp",
}
#: Directories that most jobs only read.
_READ = ("data_root_dir", "probe_root_dir", "artifact_dir")


#: `s3://bucket/x`, of which a `Path` keeps one slash.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class StorageError(ValueError):
    """A storage directory cannot be used as it was given."""


@dataclass(frozen=True)
class StorageRoots:
    """The flags that every job takes; each directory defaults to a place under `storage_root`.

    Attributes:
        storage_root: default `$IPVLA_STORAGE_ROOT`, else `~/ipvla_storage`.
        cache_dir: Hugging Face and torch downloads, LIBERO's generated files.
        data_root_dir: RLDS datasets.
        probe_root_dir: probe sets.
        artifact_dir: subspaces and other offline products.
        run_root_dir: training and evaluation runs, MLflow's database.
        tmp_dir: scratch, Ray's session files.
    """

    storage_root: Path | None = None
    cache_dir: Path | None = None
    data_root_dir: Path | None = None
    probe_root_dir: Path | None = None
    artifact_dir: Path | None = None
    run_root_dir: Path | None = None
    tmp_dir: Path | None = None

    @property
    def root(self) -> Path:
        """StorageError if it is an address, or there is no home directory to put it in."""
        given = self.storage_root or os.environ.get("IPVLA_STORAGE_ROOT")
        return _resolved("storage_root", given or "~/ipvla_storage")

    def _directory(self, flag: str) -> Path:
        given = getattr(self, flag)
        path = _resolved(flag, given) if given else self.root / _DIRECTORIES[flag]
        if flag == "run_root_dir" and "?" in str(path):  # an SQLite address ends there
            raise StorageError(
                f"--run_root_dir {path}: a path with ? cannot hold MLflow's database; "
                "give another --storage_root or --run_root_dir"
            )
        return path

    def absolute(self) -> Self:
        """The same with every path absolute, the default storage root included: see `absolute_paths`."""
        flags = [field.name for field in fields(StorageRoots)]
        given = {flag: _resolved(flag, path) for flag in flags if (path := getattr(self, flag)) is not None}
        given.setdefault("storage_root", self.root)
        return paths_of_fields_absolute(replace(self, **given))

    @property
    def cache(self) -> Path:
        return self._directory("cache_dir")

    @property
    def datasets(self) -> Path:
        return self._directory("data_root_dir")

    @property
    def probes(self) -> Path:
        return self._directory("probe_root_dir")

    @property
    def artifacts(self) -> Path:
        return self._directory("artifact_dir")

    @property
    def runs(self) -> Path:
        """StorageError if it has a `?`."""
        return self._directory("run_root_dir")

    @property
    def tmp(self) -> Path:
        return self._directory("tmp_dir")

    @property
    def directories(self) -> dict[str, Path]:
        """Flag name -> absolute path, in the order of the flags."""
        return {flag: self._directory(flag) for flag in _DIRECTORIES}

    @property
    def mlflow_uri(self) -> str:
        """`$MLFLOW_TRACKING_URI`, else an absolute SQLite URI under the run root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.runs / 'mlflow.db'}"

    @property
    def mlflow_spool(self) -> Path:
        """What MLflow has not got yet: `ipvla.tracking.mlflow_spool`."""
        return self.runs / "mlflow_spool"

    def prepare(self, writes: Collection[str] = ()) -> None:
        """Creates the directories, and points caches of libraries at `cache_dir`: Numba's only if it has no other.

        Datasets, probes and artifacts may lie where nobody can write, unless the job makes some.

        Args:
            writes: flags of those among the three that the job writes.

        Raises:
            StorageError: a directory lies in the source tree, or cannot be written.
        """
        for flag, path in self.directories.items():
            if path.is_relative_to(SOURCE_TREE):
                raise StorageError(
                    f"--{flag} {path} lies inside the source tree {SOURCE_TREE}; "
                    "pass --storage_root (or set IPVLA_STORAGE_ROOT) outside it"
                )
            try:
                path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path):
                    pass
            except OSError as error:
                if flag in _READ and flag not in writes and path.is_dir():
                    continue
                raise StorageError(
                    f"--{flag} {path} cannot be written ({error.strerror}); "
                    "pass a writable --storage_root or set IPVLA_STORAGE_ROOT"
                ) from None
        for variable in ("HF_HOME", "HF_DATASETS_CACHE"):
            os.environ.setdefault(variable, str(self.cache / "huggingface"))
        os.environ.setdefault("TORCH_HOME", str(self.cache / "torch"))
        if not home_is_writable():
            os.environ.setdefault("NUMBA_CACHE_DIR", str(self.cache / "numba"))


def private_temporary_directory() -> Path:
    """`ipvla-UID` in the system's temporary directory if no other user can write there, else a new one."""
    directory = Path(tempfile.gettempdir()) / f"ipvla-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()  # another user may have made it first
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="ipvla-"))
    directory.chmod(0o700)  # earlier versions let others read it
    return directory


def home_is_writable() -> bool:
    """Has this user a home directory that files can be written to?"""
    try:
        return os.access(Path.home(), os.W_OK)
    except RuntimeError:  # a container's user, whom the system does not know
        return False


def existing(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def require_room(path: Path, needed: int, what: str, remedy: str) -> None:
    """StorageError if the file system on which `path` is, or will be, has fewer than `needed` bytes free.

    Args:
        what: takes them, in words.
        remedy: besides freeing some.
    """
    free = shutil.disk_usage(existing(path)).free
    if free < needed:
        raise StorageError(
            f"{path}: {free / 2**30:.1f} GiB are free, and {what} take {needed / 2**30:.1f}; free some, {remedy}"
        )


def absolute_paths(config: Config) -> Config:
    """These settings with every path absolute: other processes of a job have other working directories.

    A config class whose texts may be paths too has a method `absolute()` that does it.

    Raises:
        StorageError: a directory is an address, or lies in the home directory of a user without one.
    """
    own: Callable[[], Config] | None = getattr(config, "absolute", None)
    return own() if callable(own) else paths_of_fields_absolute(config)  # it may be a field of that name


def paths_of_fields_absolute(config: Config) -> Config:
    """What most `absolute()` do: every field that is a path, and every group of settings."""
    if not is_dataclass(config):
        return config
    changed: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        new = absolute(value) if isinstance(value, Path) else absolute_paths(value)
        if field.init and new is not value:
            changed[field.name] = new
    return replace(config, **changed) if changed else config  # type: ignore[type-var]


def absolute(path: Path | str) -> Path:
    """`~` expanded, and absolute; symbolic links stay.

    Raises:
        StorageError: it begins with the `~` of a user without a home directory.
    """
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError:
        raise StorageError(f"{path}: this user has no home directory; give an absolute path") from None


def _resolved(flag: str, given: Path | str) -> Path:
    if _ADDRESS.match(str(given)):
        raise StorageError(
            f"--{flag} {given} is an address; give a directory of a file system that all nodes share (object "
            "storage can hold datasets and MLflow's artifacts)"
        )
    try:
        return Path(given).expanduser().resolve()
    except RuntimeError:
        raise StorageError(
            f"--{flag} {given}: this user has no home directory; pass --storage_root or set IPVLA_STORAGE_ROOT"
        ) from None
