"""Batches are the plan's steps with the dataset's content, whenever and wherever they are read."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.lanes import LaneConfig, LaneReader
from ipvla.data.pictures import EncodedPictures
from ipvla.data.plan import PlanPosition
from ipvla.data.probe import ProbeConfig, ProbeSet
from ipvla.data.recording import Recording
from ipvla.data.rlds import RldsSource, write_rlds
from ipvla.data.source import DatasetError, Trajectory
from ipvla.data.standards import standard_for
from ipvla.data.transforms import Transforms
from ipvla.types import NO_TOKEN, ModelInputs, StepBatch
from tests.data.conftest import LENGTHS, SIZE, random_episode

Make = Callable[..., Transforms]
CONFIG = LaneConfig(lanes=3, window=4, stride=3, seed=11)


@pytest.fixture
def reader(dataset: EpisodeDataset, make_transforms: Make) -> LaneReader:
    return CONFIG.build(dataset, make_transforms())


def _tensors(batch: StepBatch) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        nested = isinstance(value, ModelInputs)
        tensors += [getattr(value, f.name) for f in fields(value)] if nested else [value]
    return [tensor for tensor in tensors if tensor is not None]  # points, of a model that reads none


def _equal(a: StepBatch, b: StepBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def test_batches_are_the_plan_filled_from_the_dataset(
    reader: LaneReader, dataset: EpisodeDataset, make_transforms: Make
) -> None:
    transforms, plan = make_transforms(), reader.plan(PlanPosition())
    for w in range(plan.num_windows):
        window, batch = plan.window(w), reader.batch(PlanPosition(0, w))
        np.testing.assert_array_equal(batch.episode_key, window.episode)
        np.testing.assert_array_equal(batch.t, window.t)
        np.testing.assert_array_equal(batch.is_first, window.is_first)
        np.testing.assert_array_equal(batch.valid, window.episode >= 0)
        for place in np.ndindex(window.episode.shape):
            episode, t = int(window.episode[place]), int(window.t[place])
            if episode < 0:
                assert not batch.action_valid[place].any()
                continue
            target, valid = transforms.chunk_targets(dataset.episode(episode).action, t)
            np.testing.assert_array_equal(batch.actions[place], target)
            np.testing.assert_array_equal(batch.action_valid[place], valid)
            single = transforms.inputs([dataset.observation(episode, t, ("agentview",))])
            for name in ("images", "proprio", "input_ids", "attention_mask"):
                assert torch.equal(getattr(batch.inputs, name)[place], getattr(single, name)[0])


def test_every_tensor_has_the_declared_shape(reader: LaneReader) -> None:
    batch = reader.batch(PlanPosition())
    assert batch.actions.shape == (3, 4, 4, 7)
    assert batch.action_valid.shape == (3, 4, 4)
    assert {tuple(x.shape[:2]) for x in _tensors(batch)} == {(3, 4)}
    assert batch.actions.dtype == torch.float32
    assert {x.dtype for x in (batch.is_first, batch.valid, batch.action_valid)} == {torch.bool}
    integers = (
        batch.t,
        batch.episode_key,
        batch.noise_seed,
        batch.plan,
        batch.last_plan,
        batch.question,
        batch.answer,
    )
    assert {x.dtype for x in integers} == {torch.int64}


def test_plans_are_those_recorded_now_and_one_policy_step_ago(
    dataset: EpisodeDataset, make_transforms: Make
) -> None:
    transforms = make_transforms(tokenize_text=lambda text: list(text.encode()), plan_tokens=40)
    reader = CONFIG.build(dataset, transforms)
    late_starts = changes = 0
    for epoch in range(3):
        for w in range(reader.plan(PlanPosition(epoch)).num_windows):
            batch = reader.batch(PlanPosition(epoch, w))
            assert batch.plan.shape == batch.last_plan.shape == (3, 4, 40)
            for place in np.ndindex(3, 4):
                plan, last = (_text(ids[place]) for ids in (batch.plan, batch.last_plan))
                if not batch.valid[place]:
                    assert (plan, last) == ("", "")
                    continue
                reasoning, t = dataset.episode(int(batch.episode_key[place])).reasoning, int(batch.t[place])
                assert plan == reasoning[t]
                assert last == ("" if batch.is_first[place] else reasoning[t - CONFIG.stride])
                late_starts += bool(batch.is_first[place]) and t > 0
                changes += last not in ("", plan)
    assert late_starts
    assert changes


def _text(ids: torch.Tensor) -> str:
    return bytes(ids[ids != NO_TOKEN].tolist()).decode()


def test_what_the_last_window_ended_with_is_the_next_ones_last_plan(
    dataset: EpisodeDataset, make_transforms: Make
) -> None:
    reader = CONFIG.build(dataset, make_transforms(plan_tokens=6))
    batches = [reader.batch(PlanPosition(0, w)) for w in range(reader.plan(PlanPosition()).num_windows)]
    plan, last_plan, is_first, valid = (
        torch.cat([getattr(batch, name) for batch in batches], 1)
        for name in ("plan", "last_plan", "is_first", "valid")
    )
    goes_on = (valid & ~is_first)[:, 1:]
    assert goes_on.any()
    assert torch.equal(last_plan[:, 1:][goes_on], plan[:, :-1][goes_on])


def test_without_plan_tokens_no_plan_is_tokenised(dataset: EpisodeDataset, make_transforms: Make) -> None:
    calls: list[str] = []
    reader = CONFIG.build(dataset, make_transforms(tokenize_text=lambda text: calls.append(text) or [1]))
    batch = reader.batch(PlanPosition())
    assert batch.plan.shape == batch.last_plan.shape == (3, 4, 0)
    assert calls == []


def test_each_plan_is_tokenised_once_for_all_batches(dataset: EpisodeDataset, make_transforms: Make) -> None:
    calls: list[str] = []
    transforms = make_transforms(tokenize_text=lambda text: calls.append(text) or [1], plan_tokens=1)
    reader = CONFIG.build(dataset, transforms)
    for w in range(reader.plan(PlanPosition()).num_windows):
        reader.batch(PlanPosition(0, w))
    assert len(calls) == len(set(calls)) > 0


def test_episodes_without_reasoning_have_empty_plans(tmp_path: Path, make_transforms: Make) -> None:
    plain = replace(random_episode(0, 9), reasoning=())
    dataset = open_dataset(write_rlds(tmp_path, "plain", [plain], SIZE))
    batch = CONFIG.build(dataset, make_transforms(plan_tokens=6)).batch(PlanPosition())
    assert batch.valid.any()
    assert (batch.plan == NO_TOKEN).all()
    assert (batch.last_plan == NO_TOKEN).all()


def test_questions_and_answers_are_those_recorded_at_the_step(tmp_path: Path, make_transforms: Make) -> None:
    texts = [f"what {t}" if t % 3 else "" for t in range(20)]
    episodes = [
        replace(
            random_episode(seed, 20),
            questions=tuple(text and f"{text} of {seed}" for text in texts),
            answers=tuple(text and f"{t + seed}" for t, text in enumerate(texts)),
        )
        for seed in range(4)
    ]
    dataset = open_dataset(write_rlds(tmp_path, "asked", [*episodes, random_episode(4, 20)], SIZE))
    transforms = make_transforms(
        tokenize_question=lambda text: list(text.encode()),
        tokenize_text=lambda text: [int(text) + 1],
        question_tokens=16,
        answer_tokens=2,
    )
    reader, seen = CONFIG.build(dataset, transforms), 0
    for w in range(reader.plan(PlanPosition()).num_windows):
        batch = reader.batch(PlanPosition(0, w))
        assert (batch.question.shape, batch.answer.shape) == ((3, 4, 16), (3, 4, 2))
        for place in np.ndindex(3, 4):
            key, t = int(batch.episode_key[place]), int(batch.t[place])
            asked = 0 <= key < 4 and t % 3 > 0
            assert _text(batch.question[place]) == (episodes[key].questions[t] if asked else "")
            assert batch.answer[place].tolist() == ([t + key + 1, NO_TOKEN] if asked else [NO_TOKEN] * 2)
            seen += asked
    assert seen > 5


def test_without_question_tokens_none_is_tokenised(dataset: EpisodeDataset, make_transforms: Make) -> None:
    batch = CONFIG.build(dataset, make_transforms(tokenize_question=None)).batch(PlanPosition())
    assert batch.question.shape == batch.answer.shape == (3, 4, 0)


def test_workers_share_an_epoch_without_overlap(dataset: EpisodeDataset, make_transforms: Make) -> None:
    readers = [CONFIG.build(dataset, make_transforms(), rank, 2) for rank in range(2)]
    seen: list[tuple[int, int]] = []
    for reader in readers:
        for w in range(reader.plan(PlanPosition()).num_windows):
            batch = reader.batch(PlanPosition(0, w))
            seen += zip(batch.episode_key[batch.valid].tolist(), batch.t[batch.valid].tolist(), strict=True)
    assert len(seen) == len(set(seen))
    assert {episode for episode, _ in seen} == set(range(len(LENGTHS)))


def test_resuming_mid_epoch_equals_never_having_stopped(
    reader: LaneReader, dataset: EpisodeDataset, make_transforms: Make
) -> None:
    count = reader.plan(PlanPosition()).num_windows + reader.plan(PlanPosition(1)).num_windows + 2
    with closing(reader.batches(PlanPosition())) as stream:
        undisturbed = list(itertools.islice(stream, count))
    stopped_after = undisturbed[1][0]
    again = CONFIG.build(open_dataset(dataset.location, cache_bytes=0), make_transforms())
    with closing(again.batches(again.after(stopped_after))) as stream:
        resumed = list(itertools.islice(stream, count - 2))
    assert resumed[-1][0] == PlanPosition(2, 1)
    for (position, batch), (expected_position, expected) in zip(resumed, undisturbed[2:], strict=True):
        assert position == expected_position
        assert _equal(batch, expected)


@given(
    lanes=st.integers(1, 4),
    world=st.integers(1, 8),
    window=st.integers(1, 5),
    stride=st.integers(1, 4),
    stop=st.integers(0, 60),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_killed_at_any_step_the_same_batches_follow(
    written: Path,
    make_transforms: Make,
    lanes: int,
    world: int,
    window: int,
    stride: int,
    stop: int,
    data: st.DataObject,
) -> None:
    config = LaneConfig(lanes=lanes, window=window, stride=stride, seed=3)
    rank, transforms = data.draw(st.integers(0, world - 1)), make_transforms()
    reader = config.build(open_dataset(written), transforms, rank, world)
    position = PlanPosition()
    for _ in range(stop):
        position = reader.after(position)
    again = config.build(open_dataset(written, cache_bytes=0), transforms, rank, world)
    resumed = PlanPosition.from_dict(json.loads(json.dumps(asdict(position))))
    for _ in range(3):
        assert _equal(again.batch(resumed), reader.batch(position))
        position, resumed = reader.after(position), again.after(resumed)
    assert position == resumed


def test_what_is_idle_and_broken_is_told(written: Path, make_transforms: Make) -> None:
    whole = CONFIG.build(open_dataset(written), make_transforms())
    idle = whole.plan(PlanPosition()).idle_share
    assert whole.readings(PlanPosition()) == {"train/epoch": 0, "data/idle_share": idle}
    reader = CONFIG.build(damaged(written, {(2, t) for t in range(9)}, skips=True), make_transforms())
    for w in range(reader.plan(PlanPosition()).num_windows):
        reader.batch(PlanPosition(0, w))
    assert reader.readings(PlanPosition(1))["data/broken_episodes"] == 1


def test_closing_the_stream_ends_its_thread(reader: LaneReader) -> None:
    before = threading.active_count()
    stream = reader.batches(PlanPosition())
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_a_corrupt_episode_is_raised_to_the_trainer(reader: LaneReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(index: int) -> None:
        raise DatasetError(f"shard is corrupt at episode {index}")

    monkeypatch.setattr(reader._dataset, "_read", corrupt)
    with pytest.raises(DatasetError, match="corrupt at episode"):
        next(reader.batches(PlanPosition()))


class Damaged:
    """A source some of whose pictures do not decode."""

    def __init__(self, source: RldsSource, places: set[tuple[int, int]]) -> None:
        self._source, self._places = source, places

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def trajectory(self, index: int) -> Trajectory:
        whole = self._source.trajectory(index)
        pictures = whole.pictures("observation/image")
        assert isinstance(pictures, EncodedPictures)
        damaged = [b"" if (index, t) in self._places else one for t, one in enumerate(pictures.encoded)]
        return replace(whole, steps={**whole.steps, "observation/image": EncodedPictures(damaged)})


def damaged(written: Path, places: set[tuple[int, int]], skips: bool) -> EpisodeDataset:
    source = RldsSource(written)
    standard = standard_for(source.name, source.features)
    return EpisodeDataset(Damaged(source, places), standard, skips_bad_episodes=skips)


def test_a_picture_that_does_not_decode_is_told_with_dataset_and_episode(
    written: Path, make_transforms: Make
) -> None:
    reader = CONFIG.build(damaged(written, {(2, 0), (2, 1), (2, 2)}, skips=False), make_transforms())
    with (
        closing(reader.batches(PlanPosition())) as stream,
        pytest.raises(DatasetError, match=r"synthetic.*episode 2"),
    ):
        list(itertools.islice(stream, reader.plan(PlanPosition()).num_windows))


@given(places=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 29)), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_steps_that_cannot_be_read_are_idle_and_all_others_as_ever(
    written: Path, make_transforms: Make, places: set[tuple[int, int]]
) -> None:
    places = {(episode, t) for episode, t in places if t < LENGTHS[episode]}
    transforms = make_transforms()
    whole = CONFIG.build(open_dataset(written), transforms)
    reader = CONFIG.build(damaged(written, places, skips=True), transforms)
    met = set()
    for w in range(reader.plan(PlanPosition()).num_windows):
        position = PlanPosition(0, w)
        batch, expected = reader.batch(position), whole.batch(position)
        assert torch.equal(batch.is_first, expected.is_first)
        for place in np.ndindex(batch.valid.shape):
            at = (int(expected.episode_key[place]), int(expected.t[place]))
            if at in places:
                met.add(at[0])
                assert not batch.action_valid[place].any()
                assert batch.valid[place] == expected.is_first[place]
            elif not expected.valid[place]:
                assert not batch.valid[place]
            else:
                for ours, theirs in zip(_tensors(batch), _tensors(expected), strict=True):
                    assert torch.equal(ours[place], theirs[place])
    assert reader.broken == met


def test_a_position_of_another_configuration_is_refused(reader: LaneReader) -> None:
    with pytest.raises(ValueError, match="window 99 is outside this epoch's"):
        reader.batch(PlanPosition(0, 99))


@pytest.mark.parametrize("change", [{"lanes": 0}, {"window": 0}, {"stride": -1}, {"seed": -1}])
def test_senseless_settings_are_refused(change: dict[str, int]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        LaneConfig(**change)


def test_a_rank_outside_the_world_is_refused(dataset: EpisodeDataset, make_transforms: Make) -> None:
    with pytest.raises(ValueError, match="rank 2 is outside the 2 workers"):
        CONFIG.build(dataset, make_transforms(), rank=2, world_size=2)


def test_a_stride_between_two_new_pictures_is_refused(tmp_path: Path, make_transforms: Make) -> None:
    episodes = [random_episode(index, length) for index, length in enumerate(LENGTHS)]
    written = write_rlds(tmp_path, "seldom", episodes, SIZE, Recording("upright", 20.0, pictures_every=4))
    seldom = open_dataset(written)
    with pytest.raises(DatasetError, match=r"lanes.stride is 6, and .* has a new picture every 4 control steps"):
        LaneConfig(stride=6).build(seldom, make_transforms())
    reader = LaneConfig(lanes=2, window=3, stride=8).build(seldom, make_transforms())
    batch = reader.batch(PlanPosition())
    assert (batch.t % 4 == 0).all()
    assert ProbeSet(seldom, ProbeConfig(records=2)).frames
    assert all(t % 4 == 0 for _, t in ProbeSet(seldom, ProbeConfig(records=len(LENGTHS))).frames)
