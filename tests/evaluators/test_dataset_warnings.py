"""Every warning about a dataset appears where it should, and none on a dataset as it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ipvla.data.standards import Standard, StandardConfig, adjusted, standard_for
from ipvla.data.standards.libero import libero
from tests.evaluators.made_dataset import (
    FEATURES,
    MadeEpisode,
    MadeSource,
    card_of,
    good_episode,
    good_episodes,
    with_gripper,
)

RECORDED = standard_for("made", FEATURES)
LIBERO = libero("libero_goal_no_noops")


def warned(episodes: Sequence[MadeEpisode], standard: Standard = RECORDED) -> list[str]:
    return [warning.what for warning in card_of(MadeSource(episodes), standard).warnings]


def with_action(episode: MadeEpisode, dimension: int, values: np.ndarray | float) -> MadeEpisode:
    action = episode.action.copy()
    action[:, dimension] = values
    return replace(episode, action=action)


@pytest.mark.parametrize("standard", [RECORDED, LIBERO], ids=["as recorded", "LIBERO's"])
def test_a_dataset_as_it_should_be_has_no_warnings(standard: Standard) -> None:
    assert warned(good_episodes(), standard) == []


def _reversed(episode: MadeEpisode) -> MadeEpisode:
    return with_gripper(episode, -episode.action[:, 6])


def _rare(episode: MadeEpisode) -> MadeEpisode:
    return with_action(episode, 3, np.where(np.arange(len(episode.action)) % 300 == 7, 0.5, 0))


def _idle(episode: MadeEpisode) -> MadeEpisode:
    action = episode.action.copy()
    action[np.arange(len(action)) % 4 == 1, :6] = 0
    return replace(episode, action=action)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: with_action(with_action(e, 3, 0), 5, 0), "action 3, 5: q01 = q99, and no other value"),
        (_rare, "action 3: q01 = q99, although less than one step in fifty"),
        (lambda e: replace(e, state=np.where(np.arange(8) == 2, 1, e.state)), "proprioception 2: q01 = q99"),
        (lambda e: with_action(e, 1, 3 * e.action[:, 1]), "action 1 up to 3 in size: the environment clips"),
        (lambda e: with_gripper(e, e.action[:, 6] > 0), "it goes from 0 to 1, as openings of 0 and 1 do"),
        (lambda e: with_gripper(e, 255 * (e.action[:, 6] > 0)), "it goes from 0 to 255; environment takes -1"),
        (lambda e: with_gripper(e, 1), "it is 1 throughout"),
        (_idle, "of the steps do nothing"),
        (lambda e: replace(e, instruction=""), "6 episodes without a task in words"),
        (lambda e: replace(e, size=(6, 8)), "has pictures of 8 x 6: training squeezes them"),
        (lambda e: replace(e, picture=b"no picture"), "the first picture of 6 episodes cannot be decoded"),
    ],
)
def test_what_is_suspicious_is_told(change: Callable[[MadeEpisode], MadeEpisode], told: str) -> None:
    assert any(told in what for what in warned([change(episode) for episode in good_episodes()]))


@pytest.mark.parametrize("standard", [RECORDED, LIBERO], ids=["as recorded", "LIBERO's"])
def test_a_gripper_of_the_other_sign_is_seen_by_its_fingers_and_by_its_start(standard: Standard) -> None:
    told = [what for what in warned([_reversed(e) for e in good_episodes()], standard) if "sign" in what]
    assert len(told) == 2
    assert "fingers are 0.08 m apart where they are told to close and 0.004 m where" in told[0]
    assert "6 of 6 episodes begin with it closed" in told[1]


def _with_fingers(episode: MadeEpisode, apart_m: np.ndarray | float) -> MadeEpisode:
    state = episode.state.copy()
    state[:, 6] = np.divide(apart_m, 2)
    state[:, 7] = -state[:, 6]
    return replace(episode, state=state)


def test_a_gripper_that_begins_or_stays_closed_is_fine_where_fingers_do_what_they_are_told() -> None:
    late = [_reversed(e) for e in good_episodes()]
    late = [_with_fingers(e, np.where(e.action[:, 6] > 0, 0.004, 0.08)) for e in late]
    pressing = [_with_fingers(with_gripper(e, 1), 0.01 + 0.001 * e.action[:, 0]) for e in good_episodes()]
    waving = [_with_fingers(with_gripper(e, -1), 0.07 + 0.001 * e.action[:, 0]) for e in good_episodes()]
    for episodes in (late, pressing, waving):
        assert not any("sign" in what for what in warned(episodes))
    told = warned([_with_fingers(with_gripper(e, 1), 0.07 + 0.001 * e.action[:, 0]) for e in good_episodes()])
    assert any("it is 1 throughout" in what for what in told)


def test_without_fingers_in_the_state_the_start_decides() -> None:
    standard = StandardConfig({"front": "observation/image"}, state=("action",)).build("made", FEATURES)
    told = [what for what in warned([_reversed(e) for e in good_episodes()], standard) if "sign" in what]
    assert len(told) == 1
    assert "6 of 6 episodes begin with it closed" in told[0]


def test_fingers_are_not_judged_by_what_they_are_just_told() -> None:
    """They lag: a command that changes at every step is never carried out."""
    episodes = [with_gripper(e, np.where(np.arange(len(e.action)) % 2, 1, -1)) for e in good_episodes()]
    assert not any("fingers" in what for what in warned(episodes))


def test_openings_outside_of_0_and_1_are_suspicious_where_1_is_open() -> None:
    opened = replace(RECORDED, gripper="open_is_one")
    assert any("it goes from -1 to 1; open_is_one takes 1" in what for what in warned(good_episodes(), opened))


def test_actions_that_end_in_no_gripper_are_not_judged_as_one() -> None:
    standard = replace(RECORDED, gripper="none", normalised=(True,) * 7)
    told = warned([_reversed(e) for e in good_episodes()], standard)
    assert not any("gripper" in what for what in told)
    assert card_of(MadeSource(good_episodes()), standard).noops is None


def test_few_transitions_and_episodes_of_one_step() -> None:
    told = warned([good_episode(0, 4000), good_episode(1, 998), good_episode(2, 1)])
    assert "4999 transitions are fewer than 5,000" in told[0]
    assert told[1].startswith("1 episode of one step")
    assert not any("fewer than" in what for what in warned([good_episode(0, 5000)]))


def test_pictures_of_several_sizes() -> None:
    episodes = [replace(e, size=(8, 8) if n else (16, 16)) for n, e in enumerate(good_episodes())]
    assert any("agentview has pictures of several sizes: 8 x 8, 16 x 16" in what for what in warned(episodes))


def test_broken_episodes_are_counted() -> None:
    episodes = [replace(e, broken=n == 2) for n, e in enumerate(good_episodes())]
    assert "1 of 6 episodes cannot be used" in warned(episodes)


def test_noops_are_no_warning_once_they_are_left_out() -> None:
    episodes = [_idle(e) for e in good_episodes()]
    standard = adjusted(RECORDED, skip_noops=True)
    card = card_of(MadeSource(episodes), standard)
    assert not any("do nothing" in warning.what for warning in card.warnings)
    assert card.noops == pytest.approx(0.25, abs=0.01)
    assert card.transitions < 6 * 1000


def test_every_warning_says_what_to_do() -> None:
    episodes = [replace(_idle(with_action(_reversed(e), 0, 2)), size=(4, 8)) for e in good_episodes()]
    warnings = card_of(MadeSource(episodes), RECORDED).warnings
    assert len(warnings) > 4
    assert all(warning.remedy for warning in warnings)
