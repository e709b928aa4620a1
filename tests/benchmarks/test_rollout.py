"""The rollout benchmark's ratios, and its parts on a policy that takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rollout import RolloutStudy, targets
from benchmarks.rollout_policy import CAMERAS, EXECUTE, save_untrained_policy
from benchmarks.rollout_service import Throughput, act_overhead_ms
from ipvla.policy import Policy
from ipvla.types import Observation


def figures(**changes: Any) -> dict[str, Any]:
    ms = {"serial": [300.0, 330.0, 310.0], "exact": [30.0, 30.0, 62.0], "fast": [20.0, 22.0, 31.0]}
    return {
        "ms_per_step": ms,
        "efficiency": {"exact": [0.9, 0.86, 0.8], "fast": [0.7, 0.7, 0.7]},
        "act_overhead_ms": {"1": 1.5, "8": 1.2},
        **changes,
    }


def test_ratios_are_of_what_was_played_in_the_same_round() -> None:
    told = {target.name: target for target in targets(figures())}
    assert (told["speedup_exact"].value, told["speedup_exact"].interval) == (10.0, (5.0, 11.0))
    assert (told["speedup_fast"].value, told["speedup_fast"].interval) == (15.0, (10.0, 15.0))
    assert told["efficiency"].value == 0.86, "with exact frames"
    assert [name for name, target in told.items() if not target.met] == ["act_overhead_ms_8"]


def test_efficiency_is_the_share_of_the_cores_that_episodes_needed() -> None:
    played = Throughput(episodes=4, steps=880, wall_s=50.0, sim_cpu_s=80.0, forward_cpu_s=10.0, mean_batch=1.5)
    assert played.efficiency(cores=2) == pytest.approx(0.9)


def test_the_policy_is_a_real_one_and_always_the_same(tmp_path: Path) -> None:
    one, other = (Policy.load(save_untrained_policy(tmp_path / name)) for name in ("one", "other"))
    images = {camera: np.full((224, 224, 3), 90, np.uint8) for camera in CAMERAS}
    seen = [Observation(images, np.zeros(8, np.float32), "put the bowl on the plate", 0)]
    chunks = [policy.act(seen, policy.initial_memory(1))[0] for policy in (one, other)]
    assert chunks[0].shape == (1, EXECUTE, 7)
    np.testing.assert_array_equal(*chunks)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_an_answer_takes_beyond_the_forward_pass_is_measured(tmp_path: Path) -> None:
    for callers in (1, 2):
        assert 0 < act_overhead_ms(callers, 30, tmp_path) < 100


def test_a_study_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        RolloutStudy(rounds=0)
