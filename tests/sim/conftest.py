"""Simulators are built once per task and shared: that any test may use them in any order is what they promise."""

import numpy as np
import pytest
from hypothesis import settings

from ipvla.sim.suites import load_suite

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def suite(cache_dir):
    return load_suite("recall", cache_dir)


@pytest.fixture(scope="session")
def simulator_of(suite):
    """Task name -> its simulator at 64 px."""
    built = {}

    def get(task_name):
        if task_name not in built:
            built[task_name] = suite.simulator(task_name)
        return built[task_name]

    yield get
    for simulator in built.values():
        simulator.close()


@pytest.fixture(scope="session")
def actions():
    """float64 [60, 7]: a wild but reproducible motion that goes down to the table."""
    rng = np.random.default_rng(0)
    motion = np.clip(rng.normal([0.3, 0.2, -0.5, 0, 0, 0, 0], 0.5, size=(60, 7)), -1, 1)
    motion[30:, 3:6] = 0  # the controller then holds the orientation that it was last told
    motion[:, 6] = np.where(np.arange(60) % 20 < 10, -1.0, 1.0)
    return motion
