"""A simulator holds its model and its pictures, and not what building them took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from pathlib import Path
import psutil
from ipvla.sim.suites import load_suite
suite = load_suite("libero_object", Path(sys.argv[1]))
simulator = suite.simulator(suite.tasks[0].name, 128)
simulator.observe()
print(psutil.Process().memory_info().rss / 2**30)
"""


def test_a_simulator_with_the_original_textures_takes_one_and_a_third_gibibytes(standard_cache: Path) -> None:
    """2.2 GiB before; the most that a suite's facts promise."""
    from ipvla.sim.standard.suite import SIMULATOR_BYTES

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(standard_cache)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.35
    assert float(done.stdout) < SIMULATOR_BYTES / 2**30
