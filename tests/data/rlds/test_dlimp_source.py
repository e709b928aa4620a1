"""Where TensorFlow and dlimp are installed (requirements-oxe.txt), they give the same trajectories as we do."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ipvla.data.rlds.dlimp_source import DlimpSource
from ipvla.data.source import DatasetError

_INSTALLED = find_spec("tensorflow") is not None and find_spec("dlimp") is not None
_WRITTEN = Path(__file__).parents[1] / "tensorflow" / "libero_spatial_no_noops" / "1.0.0"
_COMPARED = """
import sys
import numpy as np
from ipvla.data.rlds import RldsSource
from ipvla.data.rlds.dlimp_source import DlimpSource

ours, theirs = RldsSource(sys.argv[1]), DlimpSource(sys.argv[1])
assert theirs.name == ours.name and theirs.features == ours.features
assert theirs.lengths.tolist() == ours.lengths.tolist()
assert theirs.tasks == ours.tasks and theirs.families == ours.families
for index in range(len(ours)):
    one, other = ours.trajectory(index), theirs.trajectory(index)
    assert set(one.steps) == set(other.steps) and one.metadata == other.metadata
    for path, feature in ours.features.items():
        if feature.kind == "number":
            np.testing.assert_array_equal(one.numbers(path), other.numbers(path))
        elif feature.kind == "text":
            assert one.texts(path) == other.texts(path)
        else:
            assert tuple(one.pictures(path).encoded) == tuple(other.pictures(path).encoded)
"""


@pytest.mark.skipif(not _INSTALLED, reason="TensorFlow and dlimp are not installed (requirements-oxe.txt)")
def test_dlimp_gives_the_same_trajectories() -> None:
    command = [sys.executable, "-c", _COMPARED, str(_WRITTEN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(_INSTALLED, reason="TensorFlow and dlimp are installed")
def test_without_tensorflow_it_says_what_to_install() -> None:
    with pytest.raises(DatasetError, match=r"install what requirements-oxe\.txt says"):
        DlimpSource(_WRITTEN)
