"""Where things are written: six directories under one storage root, never inside the source tree."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

SOURCE_TREE = Path(__file__).resolve().parents[1]
#: Directories that most jobs only read.
_READ = ("data_root_dir", "probe_root_dir", "artifact_dir")


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
        given = self.storage_root or os.environ.get("IPVLA_STORAGE_ROOT") or Path.home() / "ipvla_storage"
        return Path(given).expanduser().resolve()

    def _under(self, given: Path | None, name: str) -> Path:
        return Path(given).expanduser().resolve() if given else self.root / name

    @property
    def cache(self) -> Path:
        return self._under(self.cache_dir, "cache")

    @property
    def datasets(self) -> Path:
        return self._under(self.data_root_dir, "datasets")

    @property
    def probes(self) -> Path:
        return self._under(self.probe_root_dir, "probe")

    @property
    def artifacts(self) -> Path:
        return self._under(self.artifact_dir, "artifacts")

    @property
    def runs(self) -> Path:
        return self._under(self.run_root_dir, "runs")

    @property
    def tmp(self) -> Path:
        return self._under(self.tmp_dir, "tmp")

    @property
    def directories(self) -> dict[str, Path]:
        """Flag name -> absolute path, in the order of the flags."""
        return {
            "cache_dir": self.cache,
            "data_root_dir": self.datasets,
            "probe_root_dir": self.probes,
            "artifact_dir": self.artifacts,
            "run_root_dir": self.runs,
            "tmp_dir": self.tmp,
        }

    @property
    def mlflow_uri(self) -> str:
        """`$MLFLOW_TRACKING_URI`, else an absolute SQLite URI under the run root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.runs / 'mlflow.db'}"

    @property
    def mlflow_spool(self) -> Path:
        """What MLflow has not got yet: `ipvla.tracking.mlflow_spool`."""
        return self.runs / "mlflow_spool"

    def prepare(self, writes: Collection[str] = ()) -> None:
        """Creates the directories and points Hugging Face's and torch's caches at `cache_dir`.

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
