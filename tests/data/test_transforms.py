"""The transforms that training and rollout share."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from ipvla.contract import HAND
from ipvla.data.conventions import Conventions
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.statistics import Statistics
from ipvla.data.transforms import Transforms
from ipvla.types import NO_TOKEN, Observation
from tests.data.conftest import SIZE

Make = Callable[..., Transforms]


def _observation(size: int = SIZE, instruction: str = "press the red button", t: int = 0) -> Observation:
    rng = np.random.default_rng(t)
    images = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    return Observation(images, rng.normal(size=8).astype(np.float32), instruction, t)


def test_inputs_have_the_declared_shapes_and_types(make_transforms: Make) -> None:
    transforms = make_transforms(cameras=("wrist", "agentview"))
    observations = [_observation(t=t) for t in range(3)]
    inputs = transforms.inputs(observations)
    assert (inputs.images.shape, inputs.images.dtype) == ((3, 2, SIZE, SIZE, 3), torch.uint8)
    assert (inputs.proprio.shape, inputs.proprio.dtype) == ((3, 8), torch.float32)
    assert (inputs.input_ids.shape, inputs.input_ids.dtype) == ((3, 6), torch.int64)
    assert (inputs.attention_mask.shape, inputs.attention_mask.dtype) == ((3, 6), torch.bool)
    np.testing.assert_array_equal(inputs.images[2, 0], observations[2].images["wrist"])
    np.testing.assert_array_equal(inputs.images[2, 1], observations[2].images["agentview"])


def test_a_batch_equals_its_rows(make_transforms: Make) -> None:
    transforms = make_transforms()
    observations = [_observation(t=t, instruction="go " * (t + 1)) for t in range(4)]
    batch = transforms.inputs(observations)
    for row, observation in enumerate(observations):
        single = transforms.inputs([observation])
        for name in ("images", "proprio", "input_ids", "attention_mask"):
            assert torch.equal(getattr(batch, name)[row], getattr(single, name)[0])


def test_prompts_are_padded_at_the_end_and_tokenised_once(make_transforms: Make) -> None:
    calls: list[str] = []
    transforms = make_transforms(tokenize=lambda text: calls.append(text) or [7, 8])
    inputs = transforms.inputs([_observation(), _observation()])
    assert inputs.input_ids.tolist() == [[7, 8, 0, 0, 0, 0]] * 2
    assert inputs.attention_mask.tolist() == [[True, True, False, False, False, False]] * 2
    assert calls == ["press the red button"]


def test_a_prompt_that_is_too_long_is_refused(make_transforms: Make) -> None:
    with pytest.raises(ValueError, match="7 tokens, more than max_prompt_tokens 6"):
        make_transforms().inputs([_observation(instruction="a b c d e f g")])


def test_plans_are_padded_at_the_end_and_tokenised_once(make_transforms: Make) -> None:
    calls: list[str] = []
    transforms = make_transforms(tokenize_text=lambda text: calls.append(text) or [7, 8], plan_tokens=3)
    for _ in range(2):
        assert transforms.prompts.plan("PLAN: press red").tolist() == [7, 8, NO_TOKEN]
    assert transforms.prompts.plan("PLAN: press red").dtype == np.int64
    assert transforms.prompts.plan("").tolist() == [NO_TOKEN] * 3
    assert calls == ["PLAN: press red"]


def test_a_plan_is_tokenised_as_instructions_are_unless_told_otherwise(make_transforms: Make) -> None:
    assert make_transforms(plan_tokens=4).prompts.plan("PLAN: press red").tolist() == [5, 5, 3, NO_TOKEN]


def test_a_cached_plan_cannot_be_spoiled(make_transforms: Make) -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_transforms(plan_tokens=4).prompts.plan("PLAN: press red")[0] = 9


def test_plans_that_never_repeat_do_not_fill_the_memory(make_transforms: Make) -> None:
    transforms = make_transforms(tokenize_plan=lambda text: [int(text)], plan_tokens=1)
    first = weakref.ref(transforms.prompts.plan("1"))
    assert first() is not None, "what was seen a moment ago is there"
    for number in range(2, 10_000):
        assert transforms.prompts.plan(str(number))[0] == number
    assert first() is None


def test_a_plan_that_is_too_long_says_by_how_much(make_transforms: Make) -> None:
    message = r"5 tokens, 2 more than plan_tokens 3; raise memory\.plan_tokens to 5"
    with pytest.raises(ValueError, match=message):
        make_transforms(plan_tokens=3).prompts.plan("a b c d e")


def test_questions_are_prompts_of_their_own_and_answers_plain_text(make_transforms: Make) -> None:
    transforms = make_transforms(
        tokenize_question=lambda text: [7, 8, 9],
        tokenize_text=lambda text: [4],
        question_tokens=4,
        answer_tokens=2,
    )
    assert transforms.prompts.question("is a button lit").tolist() == [7, 8, 9, NO_TOKEN]
    assert transforms.prompts.answer("yes").tolist() == [4, NO_TOKEN]
    assert transforms.prompts.question("").tolist() == [NO_TOKEN] * 4
    assert transforms.prompts.answer("").tolist() == [NO_TOKEN] * 2
    with pytest.raises(ValueError, match="read-only"):
        transforms.prompts.question("is a button lit")[0] = 1


def test_questions_and_answers_that_are_too_long_are_refused(make_transforms: Make) -> None:
    transforms = make_transforms(question_tokens=3, answer_tokens=1)
    with pytest.raises(ValueError, match="'is a button lit' has 4 tokens, more than question_tokens 3"):
        transforms.prompts.question("is a button lit")
    with pytest.raises(ValueError, match=r"more than answer_tokens 1; raise model\.questions\.tokens to 2"):
        transforms.prompts.answer("the left")


def test_proprio_is_normalised_and_its_columns_are_selected(make_transforms: Make) -> None:
    index = (0, 1, 2, 6, 7)
    transforms = make_transforms(proprio_index=index)
    observation = _observation()
    expected = transforms.statistics.proprio.normalise(observation.proprio)[list(index)]
    np.testing.assert_array_equal(transforms.inputs([observation]).proprio[0], expected)
    assert transforms.conventions.proprio_dim == 5
    assert make_transforms().conventions.proprio_dim == 8


def test_frames_of_another_size_are_resized(make_transforms: Make) -> None:
    flat = Observation({"agentview": np.full((40, 40, 3), 77, np.uint8)}, np.zeros(8, np.float32), "go", 0)
    images = make_transforms().inputs([flat]).images
    assert images.shape == (1, 1, SIZE, SIZE, 3)
    assert (images == 77).all()


def test_a_missing_camera_is_named(make_transforms: Make) -> None:
    with pytest.raises(ValueError, match=r"no camera 'overhead' .* \['agentview', 'wrist'\]"):
        make_transforms(cameras=("overhead",)).inputs([_observation()])


def test_targets_repeat_the_last_action_past_the_end_and_say_so(
    make_transforms: Make, dataset: EpisodeDataset
) -> None:
    transforms = make_transforms()
    action = dataset.episode(0).action
    normal = transforms.statistics.action.normalise(action)
    target, valid = transforms.chunk_targets(action, len(action) - 2)
    np.testing.assert_array_equal(target, normal[[-2, -1, -1, -1]])
    assert valid.tolist() == [True, True, False, False]


def test_targets_of_many_steps_equal_those_of_each(make_transforms: Make, dataset: EpisodeDataset) -> None:
    transforms, action = make_transforms(), dataset.episode(1).action
    steps = np.array([[0, 4], [8, 16]])
    targets, valid = transforms.chunk_targets(action, steps)
    assert targets.shape == (2, 2, 4, 7)
    for place in np.ndindex(2, 2):
        target, ok = transforms.chunk_targets(action, int(steps[place]))
        np.testing.assert_array_equal(targets[place], target)
        np.testing.assert_array_equal(valid[place], ok)


def test_targets_denormalise_to_the_actions(make_transforms: Make, dataset: EpisodeDataset) -> None:
    transforms, action = make_transforms(), dataset.episode(3).action
    played = transforms.denormalise(torch.from_numpy(transforms.chunk_targets(action, 5)[0]))
    statistics = transforms.statistics.action
    np.testing.assert_allclose(played[:, :3], action.clip(statistics.q01, statistics.q99)[5:9, :3], atol=1e-5)
    np.testing.assert_array_equal(played[:, 3:], action[5:9, 3:])  # constant dimensions and gripper are exact


def test_played_actions_stay_in_range_whatever_the_model_says(make_transforms: Make) -> None:
    played = make_transforms().denormalise(np.array([[9.0] * 6 + [0.2], [-9.0] * 6 + [-0.01]]))
    assert np.abs(played).max() <= 1
    assert played[:, 6].tolist() == [1.0, -1.0]
    assert played.dtype == np.float32


def test_they_survive_json(make_transforms: Make) -> None:
    transforms = make_transforms(
        proprio_index=(0, 7),
        plan_tokens=9,
        question_tokens=5,
        answer_tokens=2,
        normalisation="normal",
        past_end="openvla",
        absolute=(False,) * 5 + (True,) * 2,
        gripper="open_is_one",
    )
    stored = json.loads(json.dumps(transforms.to_dict()))
    loaded = Transforms(Conventions.from_dict(stored), transforms.prompts)
    assert loaded.to_dict() == transforms.to_dict()
    original, restored = (x.inputs([_observation()]) for x in (transforms, loaded))
    assert torch.equal(original.proprio, restored.proprio)


def test_what_was_saved_before_there_were_plans_or_questions_is_read(make_transforms: Make) -> None:
    stored = make_transforms().to_dict()
    for name in ("plan_tokens", "question_tokens", "answer_tokens"):
        assert stored.pop(name) == 0
    assert Conventions.from_dict(stored).to_dict() == make_transforms().conventions.to_dict()


def test_transforms_saved_before_there_was_a_choice_do_what_was_done_then(make_transforms: Make) -> None:
    stored = make_transforms().to_dict()
    for name in ("normalisation", "past_end", "absolute", "gripper"):
        del stored[name]
    restored = Conventions.from_dict(stored)
    assert restored.to_dict() == make_transforms().conventions.to_dict()
    assert (restored.normalisation, restored.past_end) == ("bounds_q99", "mask")
    assert (restored.absolute, restored.gripper) == (None, "environment")


@pytest.mark.parametrize("kind", ["bounds", "normal"])
def test_the_normalisation_is_that_of_targets_states_and_played_actions(
    make_transforms: Make, dataset: EpisodeDataset, kind: str
) -> None:
    transforms, action = make_transforms(normalisation=kind), dataset.episode(3).action
    statistics = transforms.statistics
    targets, _ = transforms.chunk_targets(action, 5)
    np.testing.assert_array_equal(targets, statistics.action.normalise(action[5:9], kind))
    np.testing.assert_allclose(transforms.denormalise(targets), action[5:9], atol=1e-5)
    observation = _observation()
    expected = statistics.proprio.normalise(observation.proprio, kind)
    np.testing.assert_array_equal(transforms.inputs([observation]).proprio[0], expected)


def test_past_the_end_openvlas_relative_dimensions_are_zero_and_its_absolute_ones_repeat(
    make_transforms: Make, dataset: EpisodeDataset
) -> None:
    action = dataset.episode(0).action
    for absolute in (None, (True,) + (False,) * 5 + (True,)):
        transforms = make_transforms(past_end="openvla", absolute=absolute)
        normal = transforms.statistics.action.normalise(action)
        target, valid = transforms.chunk_targets(action, np.array([0, len(action) - 2]))
        last = np.where(absolute or [False] * 6 + [True], normal[-1], 0)
        np.testing.assert_array_equal(target[0], normal[:4])
        np.testing.assert_array_equal(target[1], [normal[-2], normal[-1], last, last])
        assert target.dtype == np.float32
        assert valid.all()


def test_truncated_chunks_that_reach_past_the_end_are_no_targets(
    make_transforms: Make, dataset: EpisodeDataset
) -> None:
    transforms, action = make_transforms(past_end="truncate"), dataset.episode(1).action
    target, valid = transforms.chunk_targets(action, np.arange(len(action)))
    counted = np.arange(len(action)) <= len(action) - transforms.chunk
    assert valid.shape == target.shape[:2]
    assert (valid == counted[:, None]).all()
    windows = np.stack([transforms.statistics.action.normalise(action)[t : t + 4] for t in np.nonzero(counted)[0]])
    np.testing.assert_array_equal(target[counted], windows)


def test_an_episode_shorter_than_a_chunk_has_no_targets_when_truncated(make_transforms: Make) -> None:
    _, valid = make_transforms(past_end="truncate").chunk_targets(np.zeros((3, 7), np.float32), np.arange(3))
    assert not valid.any()


@pytest.mark.parametrize(
    ("gripper", "said", "played"),
    [
        ("environment", [-3, -0.1, 0.1, 3], [-1, -1, 1, 1]),
        ("open_is_one", [-3, 0.4, 0.6, 3], [1, 1, -1, -1]),
    ],
)
def test_the_environment_is_told_minus_one_to_open_and_one_to_close(
    make_transforms: Make, gripper: str, said: list[float], played: list[float]
) -> None:
    outputs = np.zeros((4, 7), np.float32)
    outputs[:, 6] = said
    result = make_transforms(gripper=gripper).denormalise(outputs)
    assert result[:, 6].tolist() == played
    assert result.dtype == np.float32


def test_recorded_grippers_of_either_convention_are_played_as_they_were(make_transforms: Make) -> None:
    rng = np.random.default_rng(0)
    closes = rng.choice([-1.0, 1.0], 40)
    action = rng.uniform(-1, 1, (40, 7)).astype(np.float32)
    for gripper, column in (("environment", closes), ("open_is_one", (1 - closes) / 2)):
        action[:, 6] = column
        statistics = Statistics.compute([action], [np.zeros((40, 8), np.float32)])
        transforms = make_transforms(statistics=statistics, gripper=gripper, chunk=1)
        targets, _ = transforms.chunk_targets(action, np.arange(40))
        assert transforms.denormalise(targets)[:, 0, 6].tolist() == closes.tolist()


def test_actions_without_a_gripper_stay_in_the_datasets_units(make_transforms: Make) -> None:
    rng = np.random.default_rng(0)
    joints = rng.uniform(-3, 3, (60, 14)).astype(np.float32)
    statistics = Statistics.compute([joints], [joints], (True,) * 14)
    transforms = make_transforms(statistics=statistics, gripper="none", normalisation="bounds")
    targets, _ = transforms.chunk_targets(joints, 0)
    np.testing.assert_allclose(transforms.denormalise(targets), joints[:4], atol=1e-5)


def test_joints_with_a_gripper_are_not_clipped(make_transforms: Make) -> None:
    rng = np.random.default_rng(0)
    joints = rng.uniform(-3, 3, (60, 8)).astype(np.float32)
    joints[:, -1] = rng.choice([0, 1], 60)
    statistics = Statistics.compute([joints], [joints])
    transforms = make_transforms(statistics=statistics, gripper="open_is_one", normalisation="bounds")
    targets, _ = transforms.chunk_targets(joints, 0)
    played = transforms.denormalise(targets)
    np.testing.assert_allclose(played[:, :7], joints[:4, :7], atol=1e-5)
    assert played[:, 7].tolist() == (1 - 2 * joints[:4, 7]).tolist()


def test_policies_saved_before_there_were_contracts_are_taken_for_what_there_was(make_transforms: Make) -> None:
    for gripper, orientation in (("environment", "upright"), ("open_is_one", "mirrored"), ("none", "unknown")):
        stored = make_transforms(gripper=gripper).to_dict()
        del stored["contract"]
        contract = Conventions.from_dict(stored).contract
        assert contract.pictures.orientation == orientation
        assert contract.gripper == gripper
        assert contract.cameras == make_transforms().cameras


def test_a_contract_of_other_data_is_refused(make_transforms: Make) -> None:
    for wrong in (
        replace(HAND, action_size=14),
        replace(HAND, gripper="open_is_one"),
        replace(HAND, state_size=9),
    ):
        with pytest.raises(ValueError, match=r"recorded has actions and states of .* give those of one dataset"):
            make_transforms(recorded=wrong)


def test_statistics_that_lack_what_the_normalisation_needs_are_refused(make_transforms: Make) -> None:
    values = make_transforms().statistics.to_dict()
    values["proprio"]["min"] = [None] * 8
    with pytest.raises(ValueError, match="normalisation is 'bounds', and the statistics have no min"):
        make_transforms(statistics=Statistics.from_dict(values), normalisation="bounds")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalisation": "minmax"}, "normalisation is 'minmax'; choose one of bounds_q99, bounds, normal"),
        ({"past_end": "repeat"}, "past_end is 'repeat'; choose one of mask, openvla, truncate"),
        ({"gripper": "open"}, "gripper is 'open'; choose one of environment"),
        ({"absolute": (True, False)}, "absolute has 2 values for 7 action dimensions"),
        ({"chunk": 0}, "chunk is 0"),
        ({"plan_tokens": -1}, "plan_tokens is -1"),
        ({"question_tokens": 3}, "question_tokens is 3 and answer_tokens 0"),
        ({"question_tokens": -1, "answer_tokens": -1}, "set both to 0"),
        ({"image_size": -4}, "image_size is -4"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"cameras": ()}, "cameras is empty"),
        ({"proprio_index": (0, 8)}, "use 0..7"),
    ],
)
def test_senseless_settings_are_refused(make_transforms: Make, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_transforms(**change)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_no_clipping_hides_what_is_not_finite(make_transforms: Make, broken: float) -> None:
    transforms = make_transforms()
    for dimension in range(transforms.action_dim):
        output = np.zeros((2, 1, transforms.action_dim), np.float32)
        output[1, 0, dimension] = broken
        actions = transforms.denormalise(output)
        assert np.isfinite(actions[0]).all()
        assert np.isnan(actions[1, 0, dimension])


def test_a_resized_observation_is_the_same_to_the_model(make_transforms: Make) -> None:
    transforms = make_transforms(cameras=("wrist",))
    observation = _observation(3 * SIZE)
    resized = transforms.conventions.resized(observation)
    assert resized.images.keys() == {"wrist"}
    assert resized.images["wrist"].shape == (SIZE, SIZE, 3)
    for name in ("images", "proprio", "input_ids"):
        assert torch.equal(
            getattr(transforms.inputs([resized]), name), getattr(transforms.inputs([observation]), name)
        )
