"""A dataset that no name tells of, by its configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ipvla.data.source import DatasetError, Trajectory
from ipvla.data.standards import StandardConfig
from tests.data.standards import trajectories

CAMERAS = {"front": "observation.images.front"}


def _bimanual(length: int = 6) -> Trajectory:
    """As LeRobot names features: two arms with joint positions, the task as metadata."""
    rng = np.random.default_rng(0)
    return trajectories.trajectory(
        {
            "observation.images.front": trajectories.pictures(length),
            "observation.state": rng.normal(size=(length, 14)).astype(np.float32),
            "observation.effort": rng.normal(size=(length, 14)),
            "action": rng.normal(size=(length, 14)).astype(np.float32),
            "gripper": rng.uniform(size=length),
            "note": ("",) * length,
        },
        task="fold the shirt",
    )


def _config(**changes: Any) -> StandardConfig:
    values: dict[str, Any] = {"cameras": CAMERAS, "state": ("observation.state",), "language": "task"}
    return StandardConfig(**(values | changes))


def test_features_are_put_side_by_side_in_the_order_that_is_told() -> None:
    made = _bimanual()
    config = _config(action=("gripper", "action"), state=("observation.effort", "observation.state"))
    episode = config.build("mine", trajectories.features(made)).episode(made)
    assert (episode.action.shape, episode.action.dtype) == ((6, 15), np.float32)
    np.testing.assert_array_equal(episode.action[:, 0], made.numbers("gripper").astype(np.float32))
    np.testing.assert_array_equal(episode.action[:, 1:], made.numbers("action"))
    np.testing.assert_array_equal(episode.state[:, 14:], made.numbers("observation.state"))
    assert (episode.task, episode.instruction) == ("fold the shirt", "fold the shirt")
    assert set(episode.pictures) == {"front"}


@pytest.mark.parametrize(
    ("gripper", "absolute", "normalised", "is_absolute"),
    [
        ("environment", False, [True] * 13 + [False], [False] * 13 + [True]),
        ("open_is_one", False, [True] * 13 + [False], [False] * 13 + [True]),
        ("open_is_one", True, [True] * 13 + [False], [True] * 14),
        ("none", True, [True] * 14, [True] * 14),
        ("none", False, [True] * 14, [False] * 14),
    ],
)
def test_a_gripper_is_not_normalised_and_is_absolute(
    gripper: str, absolute: bool, normalised: list[bool], is_absolute: list[bool]
) -> None:
    standard = _config(gripper=gripper, absolute=absolute).build("mine", trajectories.features(_bimanual()))
    assert standard.gripper == gripper
    assert list(standard.normalised) == normalised
    assert list(standard.absolute) == is_absolute


def test_steps_are_trimmed_and_no_ops_skipped_as_told() -> None:
    made = _bimanual(8)
    made.numbers("action")[3, :13] = 0
    made.numbers("action")[3, 13] = made.numbers("action")[2, 13]
    features = trajectories.features(made)
    assert _config(trimmed=(2, 1)).build("mine", features).episode(made).raw_step.tolist() == [2, 3, 4, 5, 6]
    filtered = _config(trimmed=(2, 1), skip_noops=True, gripper="environment").build("mine", features)
    assert filtered.episode(made).raw_step.tolist() == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": ("actions",)}, "mine has no step feature 'actions'; it has action"),
        ({"cameras": {"top": "observation.images.top"}}, r"no step feature 'observation\.images\.top'"),
        ({"cameras": {"top": "action"}}, "'action' is of kind number, not image"),
        ({"state": ("note",)}, "'note' is of kind text, not number"),
    ],
)
def test_features_that_are_not_there_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        _config(**change).build("mine", trajectories.features(_bimanual()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {}}, "cameras is empty"),
        ({"action": ()}, "action is empty"),
        ({"state": ()}, "state is empty"),
        ({"gripper": "none", "skip_noops": True}, "skip_noops wants motions and a gripper"),
        ({"absolute": True, "skip_noops": True}, "skip_noops wants motions and a gripper"),
        ({"gripper": "closed"}, "gripper is 'closed'; choose one of"),
        ({"trimmed": (-1, 0)}, "trimmed is"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(_config(), **change)
