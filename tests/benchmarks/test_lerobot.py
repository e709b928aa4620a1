"""The benchmark against LeRobot: its ratios, its clock, and the policy and rules of our side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lerobot import (
    CpuClock,
    LerobotError,
    LerobotStudy,
    differences,
    recorded_actions,
    require_lerobot,
    speedups,
    targets,
)
from benchmarks.lerobot_ours import RecordedPolicy, RecordedSource, ShortSuccessConfig
from benchmarks.tables import record_table
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.protocols import load_protocol
from ipvla.types import Observation

_SPIN = """
import subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "inner"], check=True)
while time.process_time() < 1:
    pass
time.sleep(0.6)
"""


def spent(wall_s: float, cpu_s: float) -> dict[str, float]:
    play = {"play_wall_s": wall_s / 2, "play_cpu_s": cpu_s / 2}
    return {"wall_s": wall_s, "cpu_s": cpu_s, **play, "others": 0.5}


def figures(**changes: Any) -> dict[str, Any]:
    return {
        "sides": {
            "lerobot": [spent(100, 180), spent(300, 190), spent(120, 200)],
            "exact": [spent(20, 30), spent(30, 38), spent(60, 50)],
            "fast": [spent(10, 18), spent(10, 19), spent(12, 20)],
        },
        "study": {
            **{"tasks": 2, "trials": 6, "steps": 120, "execute": 10, "picture_px": 256},
            **{"suite": "libero_object", "lerobot_simulators": 2},
        },
        "lerobot": {"lerobot": "0.6.1"},
        "same": {"observations": 12, "hand_mm": 0.0, "pictures": {"exact": 0.0, "fast": 6.9}},
        "cores": 2,
        **changes,
    }


def test_ratios_are_of_the_runs_of_the_same_round() -> None:
    assert speedups(figures(), "exact", "wall_s") == [5, 10, 2]
    assert speedups(figures(), "fast", "cpu_s") == [10, 10, 10]


def test_the_target_is_the_median_of_whole_runs_with_profile_exact() -> None:
    (target,) = targets(figures())
    assert (target.value, target.interval, target.met) == (5, (2, 10), True)
    slow = [spent(50, 30), spent(150, 38), spent(60, 50)]
    (target,) = targets(figures(sides={**figures()["sides"], "exact": slow}))
    assert (target.value, target.met) == (2, False)


def test_the_table_has_episodes_per_hour_and_cpu_per_episode() -> None:
    _, _, theirs, exact, *_ = record_table({"figures": figures()}, "sides").split("\n")
    assert theirs == "| LeRobot 0.6.1 | 360 | 15.8 | 7.9 |  |  |  |  |"
    assert exact == "| ours, `exact` | 1440 | 3.2 | 1.6 | 5.0 x | 5.0 x | 5.0 x | 5.0 x |"


def test_the_clock_counts_processes_and_theirs(tmp_path: Path) -> None:
    script = tmp_path / "spin.py"
    script.write_text(_SPIN)
    clock, began = CpuClock(), time.time()
    clock.start()
    subprocess.run([sys.executable, script], check=True)
    clock.stop()
    assert 1.9 < clock.total < 3
    assert clock.between(began, time.time()) == pytest.approx(clock.total, abs=0.05)
    assert clock.between(began, began) == 0


def observation(t: int, episode: str = "libero_object/soup/3/7") -> Observation:
    pictures = {camera: np.full((2, 2, 3), t, np.uint8) for camera in ("agentview", "robot0_eye_in_hand")}
    return Observation(pictures, np.arange(8, dtype=np.float32), "lift the soup", t, episode)


def recorded(directory: Path, seen: str = "") -> RecordedPolicy:
    np.save(directory / "actions.npy", recorded_actions(20))
    (directory / "policy.txt").write_text(f"10\n{seen}")
    return RecordedPolicy(directory)


def test_an_answer_is_the_chunk_that_was_recorded_for_its_control_step(tmp_path: Path) -> None:
    policy = recorded(tmp_path)
    actions, memory = policy.act([observation(10), observation(0)], policy.initial_memory(2))
    np.testing.assert_array_equal(actions, recorded_actions(20).reshape(2, 10, 7)[::-1])
    assert (policy.execute, memory) == (10, {})


def test_recorded_actions_are_actions_with_the_gripper_open() -> None:
    actions = recorded_actions(120)
    assert (actions.dtype, actions.shape) == (np.float32, (120, 7))
    assert np.abs(actions).max() <= 1
    assert set(actions[:, 6]) == {-1}


def test_what_both_sides_see_is_compared(tmp_path: Path) -> None:
    seen = {side: tmp_path / side for side in ("lerobot", "exact", "fast")}
    for directory in seen.values():
        directory.mkdir()
        recorded(tmp_path, str(directory)).act([observation(0), observation(10)], {})
    assert {file.name for file in seen["exact"].iterdir()} == {"lift the soup_3_0.npz", "lift the soup_3_10.npz"}
    assert differences(seen) == {"observations": 2, "hand_mm": 0, "pictures": {"exact": 0, "fast": 0}}

    pictures = {name: np.full((2, 2, 3), 14, np.uint8) for name in ("image", "image2")}
    state = np.arange(8, dtype=np.float32)
    state[1] += 0.25
    np.savez(seen["fast"] / "lift the soup_3_10.npz", state=state, **pictures)
    assert differences(seen) == {"observations": 2, "hand_mm": 250, "pictures": {"exact": 0, "fast": 4}}

    (seen["fast"] / "lift the soup_3_0.npz").unlink()
    with pytest.raises(LerobotError, match="saw different control steps"):
        differences(seen)


def test_only_the_length_of_episodes_is_not_the_protocols() -> None:
    success = ShortSuccessConfig(suite="libero_object", protocol="lerobot", steps=30)
    protocol = load_protocol("lerobot")
    assert success.played_by.horizon("libero_object", 500) == 30
    assert replace(success.played_by, horizons=protocol.horizons) == protocol


def test_a_recorded_policy_is_another_with_other_actions(tmp_path: Path) -> None:
    recorded(tmp_path)
    source = RecordedSource(PolicySource(RecordedPolicy, tmp_path))
    before = source.sha256()
    np.save(tmp_path / "actions.npy", recorded_actions(30))
    assert source.sha256() != before


def interpreter(tmp_path: Path, package: Path) -> Path:
    """One that says that LIBERO lies in `package`."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho {package}\n")
    path.chmod(0o755)
    return path


def test_lerobot_gets_our_assets_and_settings_that_ask_nothing(tmp_path: Path) -> None:
    assets, package = tmp_path / "assets", tmp_path / "site-packages" / "libero"
    assets.mkdir()
    (package / "libero").mkdir(parents=True)
    study = LerobotStudy(storage_root=tmp_path / "root", lerobot_python=interpreter(tmp_path, package))
    settings = require_lerobot(study, assets)
    assert f"assets: {package}/libero/assets\n" in settings.read_text()
    assert (package / "libero" / "assets").resolve() == assets
    with pytest.raises(LerobotError, match="other assets than ours"):
        require_lerobot(study, tmp_path / "others")


@pytest.mark.parametrize(
    ("python", "message"), [("nowhere", "there is no .*nowhere; run make lerobot"), ("false", "has no LeRobot")]
)
def test_an_interpreter_without_lerobot_is_one_line(tmp_path: Path, python: str, message: str) -> None:
    (tmp_path / "false").write_text("#!/bin/sh\nexit 1\n")
    os.chmod(tmp_path / "false", 0o755)
    study = LerobotStudy(storage_root=tmp_path, lerobot_python=tmp_path / python)
    with pytest.raises(LerobotError, match=message):
        require_lerobot(study, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 5, "lerobot_simulators": 2}, "give a multiple of lerobot_simulators, 2"),
        ({"steps": 125}, "give a multiple of execute, 10"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
    ],
)
def test_settings_that_the_sides_would_play_differently_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LerobotStudy(**changes)
