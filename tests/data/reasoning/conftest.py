"""The small Bridge with its reasoning, and a storage root."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.reasoning import bridge


@pytest.fixture(scope="session")
def bridge_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with the dataset, splits train and val, and `reasoning.json`; no test may change it."""
    root = tmp_path_factory.mktemp("oxe")
    bridge.write(root, splits=("train", "val"))
    bridge.write_reasoning(root / "reasoning.json")
    return root


@pytest.fixture(autouse=True)
def storage(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root of this test's own."""
    root = tmp_path_factory.mktemp("storage")
    monkeypatch.setenv("IPVLA_STORAGE_ROOT", str(root))
    return root
