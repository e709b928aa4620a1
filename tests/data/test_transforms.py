"""The transforms that training and rollout share."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ipvla.data.dataset import EpisodeDataset
from ipvla.data.transforms import Transforms
from ipvla.types import Observation
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
    transforms = make_transforms(tokenize_plan=lambda text: calls.append(text) or [7, 8], plan_tokens=3)
    for _ in range(2):
        assert transforms.plan("PLAN: press red").tolist() == [7, 8, 0]
    assert transforms.plan("PLAN: press red").dtype == np.int64
    assert transforms.plan("").tolist() == [0, 0, 0]
    assert calls == ["PLAN: press red"]


def test_a_plan_is_tokenised_as_instructions_are_unless_told_otherwise(make_transforms: Make) -> None:
    assert make_transforms(plan_tokens=4).plan("PLAN: press red").tolist() == [5, 5, 3, 0]


def test_a_cached_plan_cannot_be_spoiled(make_transforms: Make) -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_transforms(plan_tokens=4).plan("PLAN: press red")[0] = 9


def test_a_plan_that_is_too_long_says_by_how_much(make_transforms: Make) -> None:
    message = r"5 tokens, 2 more than plan_tokens 3; raise memory\.plan_tokens to 5"
    with pytest.raises(ValueError, match=message):
        make_transforms(plan_tokens=3).plan("a b c d e")


def test_questions_are_prompts_of_their_own_and_answers_plain_text(make_transforms: Make) -> None:
    transforms = make_transforms(
        tokenize_question=lambda text: [7, 8, 9],
        tokenize_plan=lambda text: [4],
        question_tokens=4,
        answer_tokens=2,
    )
    assert transforms.question("is a button lit").tolist() == [7, 8, 9, 0]
    assert transforms.answer("yes").tolist() == [4, 0]
    assert transforms.question("").tolist() == [0] * 4
    assert transforms.answer("").tolist() == [0] * 2
    with pytest.raises(ValueError, match="read-only"):
        transforms.question("is a button lit")[0] = 1


def test_questions_and_answers_that_are_too_long_are_refused(make_transforms: Make) -> None:
    transforms = make_transforms(question_tokens=3, answer_tokens=1)
    with pytest.raises(ValueError, match="'is a button lit' has 4 tokens, more than question_tokens 3"):
        transforms.question("is a button lit")
    with pytest.raises(ValueError, match=r"more than answer_tokens 1; raise model\.questions\.tokens to 2"):
        transforms.answer("the left")


def test_proprio_is_normalised_and_its_columns_are_selected(make_transforms: Make) -> None:
    index = (0, 1, 2, 6, 7)
    transforms = make_transforms(proprio_index=index)
    observation = _observation()
    expected = transforms.statistics.proprio.normalise(observation.proprio)[list(index)]
    np.testing.assert_array_equal(transforms.inputs([observation]).proprio[0], expected)
    assert transforms.proprio_dim == 5
    assert make_transforms().proprio_dim == 8


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
    transforms = make_transforms(proprio_index=(0, 7), plan_tokens=9, question_tokens=5, answer_tokens=2)
    stored = json.loads(json.dumps(transforms.to_dict()))
    loaded = Transforms.from_dict(stored, tokenize=transforms.tokenize, tokenize_plan=lambda text: [3])
    assert loaded.to_dict() == transforms.to_dict()
    assert loaded.plan("PLAN: press red").tolist() == [3] + [0] * 8
    original, restored = (x.inputs([_observation()]) for x in (transforms, loaded))
    assert torch.equal(original.proprio, restored.proprio)


def test_transforms_saved_before_there_were_plans_or_questions_have_none(make_transforms: Make) -> None:
    stored = make_transforms().to_dict()
    for name in ("plan_tokens", "question_tokens", "answer_tokens"):
        del stored[name]
    restored = Transforms.from_dict(stored, tokenize=len)
    assert (restored.plan_tokens, restored.question_tokens, restored.answer_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
