"""The episodic view: reasoning at each kept step, read by lanes as plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ipvla.data.conventions import Conventions
from ipvla.data.dataset import EpisodeDataset
from ipvla.data.lanes import LaneConfig
from ipvla.data.plan import PlanPosition
from ipvla.data.reasoning.episodes import ReasonedSource
from ipvla.data.reasoning.store import ReasoningStore, compile_reasoning
from ipvla.data.rlds import RldsSource
from ipvla.data.standards import standard_for
from ipvla.data.transforms import PromptEncoder, Transforms
from ipvla.reasoning import TAGS, parse
from ipvla.types import NO_TOKEN
from tests.data.reasoning import bridge


@pytest.fixture
def source(bridge_root: Path) -> RldsSource:
    return RldsSource(bridge_root / bridge.NAME / "1.0.0")


@pytest.fixture
def store(bridge_root: Path, tmp_path: Path) -> ReasoningStore:
    return ReasoningStore(compile_reasoning(bridge_root / "reasoning.json", tmp_path))


def test_every_kept_step_has_the_reasoning_of_its_own_number(source: RldsSource, store: ReasoningStore) -> None:
    standard = standard_for(source.name, source.features)
    reasoned = ReasonedSource(source, store)
    for index, length in enumerate(bridge.LENGTHS):
        episode = standard.episode(reasoned.trajectory(index))
        assert episode.raw_step.tolist() == list(range(1, length - 1)), "Bridge leaves its ends out"
        if index == bridge.SILENT:
            assert episode.reasoning == ()
            continue
        assert len(episode.reasoning) == len(episode)
        for t, text in enumerate(episode.reasoning):
            raw = int(episode.raw_step[t])
            if (index, raw) == bridge.MISSING_STEP:
                assert text == ""
                continue
            read = parse(text)
            assert list(read) == list(TAGS)
            assert read["SUBTASK"] == f"reach {index}/{raw}"
            seen = episode.image(t, "primary").mean()
            assert abs(seen - bridge.grey(index, raw, 0)) < 2, "and the picture is of that step too"


def test_what_is_not_of_reasoning_is_the_sources(source: RldsSource, store: ReasoningStore) -> None:
    reasoned = ReasonedSource(source, store)
    assert (reasoned.name, reasoned.location, reasoned.tasks) == (source.name, source.location, source.tasks)
    assert (reasoned.lengths == source.lengths).all()
    assert set(reasoned.features) == {*source.features, "reasoning"}
    np.testing.assert_array_equal(reasoned.trajectory(1).numbers("action"), source.trajectory(1).numbers("action"))


def test_tags_choose_what_is_read(source: RldsSource, store: ReasoningStore) -> None:
    texts = ReasonedSource(source, store, tags=("PLAN", "SUBTASK")).trajectory(0)
    assert texts.texts("reasoning")[2] == "PLAN: 1. reach 2. grasp — für 0 SUBTASK: reach 0/2"


def test_an_unknown_tag_is_named(source: RldsSource, store: ReasoningStore) -> None:
    with pytest.raises(ValueError, match="unknown tag 'SUBTASKS' of reasoning; use some of TASK, PLAN"):
        ReasonedSource(source, store, tags=("SUBTASKS",))


def test_lanes_read_reasoning_as_plans(source: RldsSource, store: ReasoningStore) -> None:
    standard = standard_for(source.name, source.features)
    dataset = EpisodeDataset(ReasonedSource(source, store, tags=("SUBTASK",)), standard)

    def tokens(text: str) -> list[int]:
        """`SUBTASK: reach 3/7` -> [3 + 1, 7 + 1]"""
        return [int(number) + 1 for number in text.rpartition(" ")[2].split("/")]

    transforms = Transforms(
        Conventions(dataset.statistics(), ("primary",), image_size=28, chunk=4),
        PromptEncoder(lambda _: [1], 1, tokenize_text=tokens, plan_tokens=2),
    )
    reader = LaneConfig(lanes=2, window=4, stride=1).build(dataset, transforms)
    position, seen = PlanPosition(), 0
    while position.epoch == 0:
        batch = reader.batch(position)
        for lane, k in np.argwhere(batch.valid.numpy()):
            episode, t = int(batch.episode_key[lane, k]), int(batch.t[lane, k])
            raw = t + 1
            silent = episode == bridge.SILENT or (episode, raw) == bridge.MISSING_STEP
            assert batch.plan[lane, k].tolist() == ([NO_TOKEN] * 2 if silent else [episode + 1, raw + 1])
            seen += not silent
        position = reader.after(position)
    assert seen == sum(length - 2 for i, length in enumerate(bridge.LENGTHS) if i != bridge.SILENT) - 1
