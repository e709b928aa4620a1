"""A whole node is lost, with the policy and one of two simulators: the other node plays the rest."""

import json
import subprocess
import sys

import pytest

from ipvla.storage import SOURCE_TREE

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_lost_node_loses_and_doubles_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.node_loss", str(tmp_path)],
        cwd=SOURCE_TREE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["nodes"] == 1
    expected = {
        f"point/{task}/{seed}/{seed}": "success" if seed % 3 != 1 else "timeout"
        for task in ("ground_go", "recall_go")
        for seed in range(20)
    }
    assert outcome["outcomes"] == expected
    assert outcome["yielded"] == len(expected)
    assert 1 <= outcome["attempts"] <= 6
