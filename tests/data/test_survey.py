"""A survey in any parts is the survey of the whole, and its statistics are those of all values together."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla import files
from ipvla.data.normalisation import FeatureStatistics, FeatureSummary, tail_size
from ipvla.data.source import BrokenEpisodeError, DatasetError, Feature, Trajectory
from ipvla.data.standards import Standard, standard_for
from ipvla.data.standards.open_x import bridge
from ipvla.data.statistics import Statistics
from ipvla.data.survey import (
    SurveyPart,
    combined,
    completed,
    load_survey,
    merged,
    part_bounds,
    publish_survey,
    survey_part,
    survey_path,
    surveyed,
)
from tests.data.standards import trajectories

LENGTHS = (12, 3, 40, 2, 25, 9, 31)


@dataclass(frozen=True)
class MadeSource:
    """Episodes of Bridge's features; those in `unreadable` cannot be read."""

    lengths: np.ndarray
    name: str = "bridge_orig"
    location: str = "memory"
    unreadable: frozenset[int] = frozenset()
    instruction: str = "put the carrot on the plate"

    @property
    def features(self) -> Mapping[str, Feature]:
        return trajectories.features(trajectories.bridge(2))

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("a task",) * len(self.lengths)

    @property
    def families(self) -> tuple[str, ...]:
        return ("",) * len(self.lengths)

    def trajectory(self, index: int) -> Trajectory:
        if index in self.unreadable:
            raise BrokenEpisodeError(f"episode {index} is corrupt")
        length = int(self.lengths[index])
        made = trajectories.bridge(length, seed=index)
        texts = (self.instruction if index % 2 else "",) * length
        return replace(made, steps={**made.steps, "language_instruction": texts})


SOURCE = MadeSource(np.array(LENGTHS), unreadable=frozenset({4}))
STANDARD: Standard = bridge("bridge_orig")


def _whole(source: MadeSource = SOURCE, standard: Standard = STANDARD) -> SurveyPart:
    return survey_part(source, standard, range(len(source.lengths)))


@settings(deadline=None, max_examples=50)
@given(rounded=st.booleans(), seed=st.integers(0, 2**31), steps=st.integers(1, 1000), data=st.data())
def test_summaries_of_any_parts_give_the_statistics_of_all_values(
    rounded: bool, seed: int, steps: int, data: st.DataObject
) -> None:
    values = np.random.default_rng(seed).normal(scale=5, size=(steps, 3)).astype(np.float32)
    values = values.round() if rounded else values  # with many values alike
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=6)))
    episodes = [episode for episode in np.split(values, cuts) if len(episode)]
    tail = tail_size(len(values))
    at = data.draw(st.integers(0, len(episodes) - 1))
    parts = [FeatureSummary.of(part, tail) for part in (episodes[:at], episodes[at:]) if part]
    mask = np.ones(values.shape[1], np.bool_)
    found = FeatureSummary.merged(parts, tail).statistics(np.array([len(e) for e in episodes]), mask)
    expected = FeatureStatistics.compute(values, mask)
    for row in ("min", "max", "q01", "q99"):
        np.testing.assert_array_equal(getattr(found, row), getattr(expected, row), err_msg=row)
    for row in ("mean", "std"):
        np.testing.assert_allclose(getattr(found, row), getattr(expected, row), rtol=1e-6, atol=1e-6, err_msg=row)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000))
def test_tails_hold_what_the_quantiles_need_even_if_steps_are_left_out(steps: int) -> None:
    values = np.random.default_rng(steps).normal(size=(steps, 1)).astype(np.float32)
    for kept in {steps, max(1, steps // 2), max(1, steps - 1)}:
        summary = FeatureSummary.of([values[:kept]], tail_size(steps))
        assert len(summary.low) == min(kept, tail_size(steps))
        statistics = summary.statistics(np.array([kept]), np.ones(1, np.bool_))
        assert statistics.q01 == np.float32(np.quantile(values[:kept].astype(np.float64), 0.01))
        assert statistics.q99 == np.float32(np.quantile(values[:kept].astype(np.float64), 0.99))


def test_large_values_cost_little_to_keep() -> None:
    values = np.zeros((100_000, 7), np.float32)
    summary = FeatureSummary.of([values], tail_size(len(values)))
    assert summary.low.nbytes + summary.high.nbytes < 0.03 * values.nbytes


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(len(LENGTHS))), st.lists(st.integers(0, len(LENGTHS)), max_size=4))
def test_parts_of_any_grouping_and_order_give_the_same_survey_to_the_bit(
    order: list[int], cuts: list[int]
) -> None:
    bounds = [0, *sorted(cuts), len(order)]
    groups = [order[a:b] for a, b in pairwise(bounds) if b > a]
    parts = [survey_part(SOURCE, STANDARD, group) for group in groups]
    expected = completed(_whole(), SOURCE, STANDARD)
    assert combined(parts, SOURCE, STANDARD).to_dict() == expected.to_dict()
    assert completed(merged(parts, SOURCE), SOURCE, STANDARD).to_dict() == expected.to_dict()


def test_a_survey_has_kept_lengths_labels_and_what_is_broken() -> None:
    survey = completed(_whole(), SOURCE, STANDARD)
    assert survey.lengths.tolist() == [10, 1, 38, 0, 0, 7, 29]
    assert survey.labelled.tolist() == [False, True, False, False, False, True, False]
    assert set(survey.broken) == {3, 4}
    assert "keeps none" in survey.broken[3]
    assert survey.broken[4] == "episode 4 is corrupt"


def test_its_statistics_are_those_of_the_episodes_that_can_be_used() -> None:
    episodes = [STANDARD.episode(SOURCE.trajectory(i)) for i in (0, 1, 2, 5, 6)]
    survey = completed(_whole(), SOURCE, STANDARD)
    expected = Statistics.compute([e.action for e in episodes], [e.state for e in episodes])
    for feature in ("action", "proprio"):
        for row in ("mean", "std", "min", "max", "q01", "q99", "mask"):
            found, wanted = (
                getattr(getattr(survey.statistics, feature), row),
                getattr(getattr(expected, feature), row),
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6, err_msg=f"{feature} {row}")
    assert survey.statistics.num_transitions == 85
    assert survey.statistics.num_trajectories == 5


def test_the_standard_says_what_is_normalised_and_what_is_skipped() -> None:
    standard = replace(STANDARD, normalised=(True, False) * 3 + (True,), skip_noops=True)
    survey = completed(_whole(standard=standard), SOURCE, standard)
    assert survey.statistics.action.mask.tolist() == list(standard.normalised)
    lengths = [len(standard.episode(SOURCE.trajectory(i))) for i in (0, 1, 2)]
    assert survey.lengths[:3].tolist() == lengths


def test_a_part_survives_the_way_between_processes() -> None:
    for episodes in (range(7), [4], [2, 0]):
        part = survey_part(SOURCE, STANDARD, episodes)
        again: SurveyPart = pickle.loads(pickle.dumps(part))
        assert again.broken == part.broken
        assert (again.action is None) == (part.action is None)


def test_missing_episodes_are_noticed() -> None:
    with pytest.raises(DatasetError, match="6 of 7 episodes were surveyed"):
        completed(survey_part(SOURCE, STANDARD, range(6)), SOURCE, STANDARD)
    twice = merged([_whole(), survey_part(SOURCE, STANDARD, [1])], SOURCE)
    with pytest.raises(DatasetError, match="7 of 7 episodes were surveyed; start"):
        completed(twice, SOURCE, STANDARD)


def test_a_dataset_of_broken_episodes_alone_is_refused() -> None:
    source = MadeSource(np.array([5, 6]), unreadable=frozenset({0, 1}))
    with pytest.raises(DatasetError, match=r"memory: none of its 2 episodes can be used .*: episode 0 is corrupt"):
        combined([survey_part(source, STANDARD, range(2))], source, STANDARD)


def test_a_standard_that_does_not_fit_is_not_taken_for_broken_episodes() -> None:
    wrong = replace(STANDARD, normalised=(True,) * 3, absolute=(True,) * 3)
    with pytest.raises(DatasetError, match="configure one for this dataset"):
        _whole(standard=wrong)


def test_a_survey_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = surveyed(SOURCE, STANDARD, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [survey_path(tmp_path, SOURCE, STANDARD).name]
    monkeypatch.setattr(MadeSource, "trajectory", lambda self, index: pytest.fail("it was read again"))
    second = surveyed(SOURCE, STANDARD, tmp_path)
    assert second.to_dict() == first.to_dict()
    np.testing.assert_array_equal(second.labelled, first.labelled)


def test_what_the_in_process_survey_reads_in_parts_is_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipvla.data.survey.PART_EPISODES", 2)
    assert surveyed(SOURCE, STANDARD, tmp_path).to_dict() == completed(_whole(), SOURCE, STANDARD).to_dict()


@pytest.mark.parametrize("episodes", [0, 1, 255, 256, 257, 1000])
def test_parts_cover_every_episode_once(episodes: int) -> None:
    covered = [index for first, stop in part_bounds(episodes) for index in range(first, stop)]
    assert covered == list(range(episodes))


def test_a_survey_belongs_to_contents_and_settings_not_to_a_place(tmp_path: Path) -> None:
    path = survey_path(tmp_path, SOURCE, STANDARD)
    assert path.name.startswith("bridge_orig-")
    assert survey_path(tmp_path, replace(SOURCE, location="elsewhere"), STANDARD) == path
    others = [
        survey_path(tmp_path, SOURCE, replace(STANDARD, skip_noops=True)),
        survey_path(tmp_path, SOURCE, replace(STANDARD, padded_state=True)),  # type: ignore[call-arg]
        survey_path(tmp_path, replace(SOURCE, lengths=np.array([1, *LENGTHS[1:]])), STANDARD),
        survey_path(tmp_path, replace(SOURCE, name="bridge_dataset"), STANDARD),
    ]
    assert len({path, *others}) == 5


def test_publishing_replaces_whole_files_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey, path = completed(_whole(), SOURCE, STANDARD), tmp_path / "surveys" / "a.json"
    publish_survey(path, "bridge_orig", survey)
    publish_survey(path, "bridge_orig", survey)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(OSError, match="full"):
        publish_survey(path, "bridge_orig", replace(survey, broken={}))
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"lengths": [1], "unlabelled": [5], "broken": {}}'])
def test_a_damaged_survey_says_what_to_do(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"a\.json is no survey of a dataset .*; delete it"):
        load_survey(path)


def test_our_own_datasets_are_surveyed_too(tmp_path: Path) -> None:
    made = [trajectories.recorded(n, seed) for seed, n in enumerate((4, 6))]
    features = trajectories.features(made[0])
    source = MadeSource(np.array([4, 6]), name="recall")
    standard = standard_for("recall", features)
    parts = [standard.episode(each) for each in made]

    class Recorded(MadeSource):
        def trajectory(self, index: int) -> Trajectory:
            return made[index]

    survey = surveyed(Recorded(source.lengths, "recall"), standard, tmp_path)
    assert survey.lengths.tolist() == [4, 6]
    assert survey.labelled.all()
    assert survey.statistics.action.max.tolist() == np.concatenate([p.action for p in parts]).max(0).tolist()
