"""Each dataset's features become the episodes that OpenVLA's pipeline makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ipvla.data.source import BrokenEpisodeError, DatasetError, Trajectory
from ipvla.data.standards import STANDARDS, Standard, adjusted, standard_for
from ipvla.data.standards.libero import LIBERO_DATASETS, libero
from ipvla.data.standards.open_x import Bridge, bridge, droid, fractal
from tests.data.standards import trajectories
from tests.data.standards.trajectories import Make

NAMED: list[tuple[str, Make]] = [
    *((name, trajectories.libero) for name in LIBERO_DATASETS),
    ("bridge_orig", trajectories.bridge),
    ("bridge_dataset", trajectories.bridge),
    ("fractal20220817_data", trajectories.fractal),
    ("droid", trajectories.droid),
    ("droid_100", trajectories.droid),
]


def of(name: str, made: Trajectory) -> Standard:
    return standard_for(name, trajectories.features(made))


def changed(made: Trajectory, **steps: object) -> Trajectory:
    return replace(made, steps={**made.steps, **{path.replace("__", "/"): value for path, value in steps.items()}})


def test_every_registered_name_is_tested() -> None:
    assert [name for name, _ in NAMED] == list(STANDARDS)


@pytest.mark.parametrize(("name", "make"), [*NAMED, ("our_own", trajectories.recorded)])
def test_episodes_have_the_declared_shapes_types_and_cameras(name: str, make: Make) -> None:
    made = make(9, 1)
    standard = of(name, made)
    episode = standard.episode(made)
    kept = 9 - sum(standard.trimmed)
    assert standard.name == name
    assert standard.known_length
    assert (episode.action.shape, episode.action.dtype) == ((kept, 7), np.float32)
    assert (len(episode.state), episode.state.dtype) == (kept, np.float32)
    assert (episode.raw_step.shape, episode.raw_step.dtype) == ((kept,), np.int64)
    assert set(episode.pictures) == set(standard.cameras)
    assert len(standard.normalised) == len(standard.absolute) == 7
    assert episode.instruction
    json.dumps(standard.settings())


@pytest.mark.parametrize(("name", "make"), NAMED)
def test_a_dataset_of_a_known_name_without_its_features_is_refused(name: str, make: Make) -> None:
    full = trajectories.features(make(3, 0))
    camera = next(iter(STANDARDS[name](name).cameras.values()))
    rest = {path: feature for path, feature in full.items() if path != camera}
    with pytest.raises(DatasetError, match=f"{name} lacks {camera}, .* Rename the dataset, or configure"):
        standard_for(name, rest)


def test_an_unknown_dataset_says_how_to_configure_it() -> None:
    features = trajectories.features(trajectories.droid(3))
    configure = r"my_robot's features is unknown: .*Configure its standard.*bridge_orig"
    with pytest.raises(DatasetError, match=configure):
        standard_for("my_robot", features)


def test_our_own_datasets_stay_as_they_were_recorded() -> None:
    made = trajectories.recorded(6)
    standard = of("recall", made)
    episode = standard.episode(made)
    assert (episode.task, episode.family, episode.seed) == ("press", "recall", 7)
    assert episode.instruction == "press the red button"
    assert standard.cameras == {"agentview": "observation/image", "overhead": "observation/overhead"}
    np.testing.assert_array_equal(episode.action, made.numbers("action"))
    np.testing.assert_array_equal(episode.state, made.numbers("observation/state"))
    assert episode.raw_step.tolist() == list(range(6))
    assert episode.reasoning == made.texts("reasoning")
    assert episode.questions == made.texts("question")
    assert episode.answers == made.texts("answer")
    assert standard.normalised == (True,) * 6 + (False,)
    assert standard.gripper == "environment"


def test_what_was_not_recorded_is_empty() -> None:
    """LIBERO's layout from other hands: no metadata of ours, no reasoning."""
    made = trajectories.libero(4)
    episode = of("libero_copy", made).episode(made)
    assert (episode.task, episode.family, episode.seed) == ("pick up the bowl", "", -1)
    assert (episode.reasoning, episode.questions, episode.answers) == ((), (), ())
    assert set(episode.pictures) == {"agentview", "robot0_eye_in_hand"}


def test_liberos_gripper_becomes_one_where_it_is_open() -> None:
    made = trajectories.libero(50)
    episode = libero("libero_10_no_noops").episode(made)
    recorded = made.numbers("action")
    np.testing.assert_array_equal(episode.action[:, :6], recorded[:, :6])
    np.testing.assert_array_equal(episode.action[:, 6], np.where(recorded[:, 6] == -1, 1, 0))
    np.testing.assert_array_equal(episode.state, made.numbers("observation/state"))


@pytest.mark.parametrize(("standard", "dim"), [(libero("libero_10_no_noops"), 9), (bridge("bridge_orig"), 8)])
def test_openvlas_padding_puts_a_zero_before_the_gripper(standard: Standard, dim: int) -> None:
    made = (trajectories.bridge if isinstance(standard, Bridge) else trajectories.libero)(8, 0)
    plain, padded = standard.episode(made).state, replace(standard, padded_state=True).episode(made).state
    assert padded.shape[1] == dim
    assert (padded[:, 6] == 0).all()
    np.testing.assert_array_equal(np.delete(padded, 6, axis=1), plain)


def test_bridges_motion_is_what_the_hand_did_and_its_ends_are_left_out() -> None:
    made = trajectories.bridge(12)
    episode, state = bridge("bridge_orig").episode(made), made.numbers("observation/state")
    assert episode.raw_step.tolist() == list(range(1, 11))
    np.testing.assert_array_equal(episode.state, state[1:11])
    np.testing.assert_array_equal(episode.action[:, :6], state[2:12, :6] - state[1:11, :6])
    assert episode.pictures["primary"].encoded[int(episode.raw_step[0])] == b"0:1"  # type: ignore[attr-defined]


def test_bridges_gripper_takes_the_value_that_is_reached_next() -> None:
    opening = np.array([0.5, 1.0, 0.6, 0.3, 0.0, 0.4, 0.96, 0.5, 0.2, 0.7], np.float32)
    made = trajectories.bridge(10)
    action = made.numbers("action").copy()
    action[:, 6] = opening
    gripper = bridge("bridge_orig").episode(changed(made, action=action)).action[:, 6]
    np.testing.assert_array_equal(gripper, np.array([1, 0, 0, 0, 1, 1, 0.7, 0.7], np.float32))


@pytest.mark.parametrize(
    ("closing", "opening"),
    [
        ([0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),
        ([0, -1, 0, 1], [0, 1, 1, 0]),
        ([1, 0, 0, 0], [0, 0, 0, 0]),
        ([0.1, -0.1, 0.05, 0], [1, 1, 1, 1]),
        ([0.11, -0.11, 0, 0], [0, 1, 1, 1]),
    ],
)
def test_fractals_commands_become_states(closing: list[float], opening: list[float]) -> None:
    made = trajectories.fractal(len(closing))
    command = np.array(closing, np.float32)[:, None]
    episode = fractal("fractal20220817_data").episode(changed(made, action__gripper_closedness_action=command))
    assert episode.action[:, 6].tolist() == opening
    np.testing.assert_array_equal(episode.action[:, :3], made.numbers("action/world_vector"))
    np.testing.assert_array_equal(episode.action[:, 3:6], made.numbers("action/rotation_delta"))
    np.testing.assert_array_equal(episode.state[:, :7], made.numbers("observation/base_pose_tool_reached"))
    np.testing.assert_array_equal(episode.state[:, 7:], made.numbers("observation/gripper_closed"))
    assert episode.instruction == "pick coke can"


def test_droids_action_is_its_velocity_and_how_far_the_gripper_is_open() -> None:
    made = trajectories.droid(5)
    episode = droid("droid").episode(made)
    velocity = made.numbers("action_dict/cartesian_velocity").astype(np.float32)
    np.testing.assert_array_equal(episode.action[:, :6], velocity)
    np.testing.assert_allclose(episode.action[:, 6], 1 - made.numbers("action_dict/gripper_position")[:, 0])
    assert episode.state.shape == (5, 7)
    assert set(episode.pictures) == {"primary", "secondary", "wrist"}


def test_an_episode_without_a_task_in_words_has_an_empty_instruction() -> None:
    made = changed(trajectories.bridge(6), language_instruction=("",) * 6)
    assert of("bridge_orig", made).episode(made).instruction == ""


def test_the_first_text_that_is_there_is_the_instruction() -> None:
    made = changed(trajectories.libero(3), language_instruction=("", "open it", "open it"))
    assert of("libero_10_no_noops", made).episode(made).instruction == "open it"


@pytest.mark.parametrize("feature", ["action", "observation/state"])
def test_an_episode_with_a_number_that_is_not_finite_is_broken(feature: str) -> None:
    made = trajectories.libero(5)
    values = made.numbers(feature).copy()
    values[3, 2] = np.nan
    with pytest.raises(BrokenEpisodeError, match=r"by hand, episode 0 has .* not finite"):
        libero("libero_10_no_noops").episode(changed(made, **{feature.replace("/", "__"): values}))


def test_a_number_that_is_not_finite_does_no_harm_in_a_step_that_is_left_out() -> None:
    made = trajectories.bridge(5)
    action = made.numbers("action").copy()
    action[0] = np.nan
    assert len(bridge("bridge_orig").episode(changed(made, action=action))) == 3


@pytest.mark.parametrize("length", [1, 2])
def test_an_episode_of_which_nothing_is_left_is_broken(length: int) -> None:
    with pytest.raises(BrokenEpisodeError, match=f"of {length} steps the standard 'bridge_orig' keeps none"):
        bridge("bridge_orig").episode(trajectories.bridge(length))


def test_actions_of_another_size_are_refused() -> None:
    made = trajectories.recorded(4)
    standard = replace(of("recall", made), normalised=(True,) * 14, absolute=(True,) * 14)
    with pytest.raises(DatasetError, match=r"actions are \[4, 7\], the standard 'recall' has them as \[4, 14\]"):
        standard.episode(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {}}, "has no cameras"),
        ({"absolute": (True,)}, "normalised for 7 action dimensions and absolute for 1"),
        ({"normalised": (), "absolute": ()}, "for 0 action dimensions"),
        ({"gripper": "inverted"}, "gripper is 'inverted'; choose one of environment, open_is_one, none"),
        ({"trimmed": (0, -1)}, "trimmed is"),
    ],
)
def test_senseless_standards_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(libero("libero_10_no_noops"), **change)


def test_standards_that_differ_in_anything_have_other_settings() -> None:
    standard = libero("libero_10_no_noops")
    others = [
        standard,
        replace(standard, skip_noops=True),
        replace(standard, padded_state=True),
        replace(standard, trimmed=(1, 0)),
        replace(standard, name="libero_90_no_noops"),
        of("recall", trajectories.recorded(3)),
        bridge("bridge_orig"),
    ]
    assert len({json.dumps(other.settings(), sort_keys=True) for other in others}) == len(others)


@pytest.mark.parametrize("name", ["libero_10_no_noops", "bridge_orig"])
def test_a_standard_is_adjusted_as_told(name: str) -> None:
    standard = STANDARDS[name](name)
    assert adjusted(standard) == standard
    assert adjusted(standard, skip_noops=True) == replace(standard, skip_noops=True)
    assert adjusted(standard, padded_state=True) == replace(standard, padded_state=True)


def test_padding_where_openvla_has_none_is_refused() -> None:
    with pytest.raises(DatasetError, match="padded_state is true, and 'droid' is none of the datasets"):
        adjusted(droid("droid"), padded_state=True)
