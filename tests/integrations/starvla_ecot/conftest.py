"""Configurations that read the small Bridge."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.data.reasoning import bridge
from tests.data.reasoning.conftest import bridge_root, storage
from tests.models.conftest import backbone, backbone_configs

__all__ = ["backbone", "backbone_configs", "bridge_root", "storage"]


@pytest.fixture
def make_cfg(bridge_root: Path) -> Callable[..., dict[str, Any]]:
    """The contract's configuration; changes by dotted path, `cfg(**{"datasets.vla_data.ecot.train": False})`."""
    base = {
        "datasets": {
            "vla_data": {
                "dataset_py": "ecot_rlds",
                "image_size": [32, 40],
                "per_device_batch_size": 4,
                "num_workers": 0,
                "ecot": {
                    "data_root_dir": str(bridge_root),
                    "data_mix": bridge.NAME,
                    "reasoning_json": str(bridge_root / "reasoning.json"),
                    "shuffle_buffer_size": 20,
                    "num_parallel_calls": 1,
                    "num_parallel_reads": 1,
                },
            }
        },
        "framework": {"action_model": {"action_dim": 7, "future_action_window_size": 15}},
    }

    def make(**changes: Any) -> dict[str, Any]:
        cfg = deepcopy(base)
        for path, value in changes.items():
            *sections, key = path.split(".")
            node: Any = cfg
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value
        return cfg

    return make
