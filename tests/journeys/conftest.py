"""A Ray cluster that pages' jobs join, so that each does not start one."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Any) -> str:
    """Of the session's cluster."""
    address: str = ray_cluster.get_runtime_context().gcs_address
    return address
