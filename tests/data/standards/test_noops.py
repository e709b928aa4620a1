"""The no-op filter agrees with one that goes step by step and remembers what it kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.data.source import BrokenEpisodeError
from ipvla.data.standards import standard_for
from ipvla.data.standards.standard import THRESHOLD, moving_steps
from tests.data.standards import trajectories

_STEPS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.9e-4, 1.1e-4, 0.5]), st.sampled_from([-1.0, 1.0])), max_size=20
)


def _action(steps: list[tuple[float, float]]) -> np.ndarray:
    action = np.zeros((len(steps), 7), np.float32)
    for t, (motion, gripper) in enumerate(steps):
        action[t, t % 6], action[t, 6] = motion, gripper
    return action


def _step_by_step(action: np.ndarray) -> list[bool]:
    kept: list[np.ndarray] = []
    said = []
    for row in action:
        idle = bool(np.linalg.norm(row[:-1]) < THRESHOLD)
        idle = idle and (not kept or row[-1] == kept[-1][-1])
        said.append(not idle)
        if not idle:
            kept.append(row)
    return said


@settings(deadline=None)
@given(_STEPS)
def test_a_step_is_kept_if_the_hand_moves_or_the_gripper_differs_from_the_step_kept_before(
    steps: list[tuple[float, float]],
) -> None:
    action = _action(steps)
    assert moving_steps(action).tolist() == _step_by_step(action)


@settings(deadline=None)
@given(_STEPS)
def test_filtering_again_changes_nothing(steps: list[tuple[float, float]]) -> None:
    action = _action(steps)
    kept = action[moving_steps(action)]
    assert moving_steps(kept).all()


def test_steps_keep_the_number_that_they_had_in_the_dataset() -> None:
    made = trajectories.recorded(8)
    action = made.numbers("action")
    action[[0, 3, 4, 7], :6] = 0
    action[:, 6] = [1, 1, 1, 1, -1, -1, -1, -1]
    standard = replace(standard_for("recall", trajectories.features(made)), skip_noops=True)
    episode = standard.episode(made)
    assert episode.raw_step.tolist() == [1, 2, 4, 5, 6]
    np.testing.assert_array_equal(episode.action, action[episode.raw_step])
    np.testing.assert_array_equal(episode.state, made.numbers("observation/state")[episode.raw_step])
    assert episode.reasoning == tuple(f"PLAN: {t}" for t in episode.raw_step)
    assert not standard.known_length


def test_the_filter_sees_what_trimming_leaves() -> None:
    made = trajectories.bridge(8)
    state = made.numbers("observation/state")
    state[2:4] = state[1]
    standard = replace(standard_for("bridge_orig", trajectories.features(made)), skip_noops=True)
    assert standard.episode(made).raw_step.tolist() == [3, 4, 5, 6]


def test_an_episode_of_nothing_but_no_ops_is_broken() -> None:
    made = trajectories.recorded(4)
    made.numbers("action")[:, :6] = 0
    standard = replace(standard_for("recall", trajectories.features(made)), skip_noops=True)
    with pytest.raises(BrokenEpisodeError, match="keeps none"):
        standard.episode(made)
