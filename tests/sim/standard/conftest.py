"""LIBERO's assets are not part of this project: tests that need them are skipped where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.sim.standard.assets import AssetsError, find_assets, provide_assets
from ipvla.storage import SOURCE_TREE

BESIDE_THE_CHECKOUT = SOURCE_TREE.parent / "shared" / "libero_assets"


@pytest.fixture(scope="session")
def standard_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which the standard suites find their assets."""
    cache = tmp_path_factory.mktemp("standard")
    if BESIDE_THE_CHECKOUT.is_dir():
        provide_assets(cache, str(BESIDE_THE_CHECKOUT))
    try:
        find_assets(cache)
    except AssetsError as error:
        pytest.skip(str(error))
    return cache
