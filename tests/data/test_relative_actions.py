"""Actions relative to the state (openpi's DeltaActions and AbsoluteActions): trained, played and saved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.contract import Contract
from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics

CHUNK, STEPS, ACTIONS, STATES = 4, 12, 7, 8
SIX = (True,) * 6


def episode(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(STEPS, ACTIONS)).astype(np.float32)
    action[:, 6] = np.where(action[:, 6] > 0, 1, -1)
    return action, rng.normal(size=(STEPS, STATES)).astype(np.float32)


def relative(action: np.ndarray, state: np.ndarray, t: int, mask: tuple[bool, ...]) -> np.ndarray:
    """The chunk at t as openpi's DeltaActions has it, [C, A]; past the end the last action repeats."""
    chunk = action[np.minimum(np.arange(t, t + CHUNK), STEPS - 1)].copy()
    chunk[:, : len(mask)] -= np.where(mask, state[t, : len(mask)], 0)
    return chunk


def conventions(mask: tuple[bool, ...], seed: int = 0, **changes: object) -> Conventions:
    """With the statistics of the relative actions of one episode."""
    action, state = episode(seed)
    chunks = [relative(action, state, t, mask) for t in range(STEPS)]
    statistics = Statistics.compute([np.concatenate(chunks)], [state])
    recorded = Contract(("agentview",), action_size=ACTIONS, clipped=False, state_size=STATES)
    made = Conventions(
        statistics, ("agentview",), 16, CHUNK, normalisation="normal", recorded=recorded, relative_actions=mask
    )
    return replace(made, **changes)  # type: ignore[arg-type]


masks = st.lists(st.booleans(), min_size=1, max_size=6).map(tuple)


@settings(max_examples=25)
@given(masks, st.integers(0, 99), st.integers(0, STEPS - 1))
def test_a_target_is_the_difference_and_playing_adds_the_state_back(
    mask: tuple[bool, ...], seed: int, t: int
) -> None:
    made, (action, state) = conventions(mask, seed), episode(seed)
    target, valid = made.chunk_targets(action, t, state)
    expected = made.statistics.action.normalise(relative(action, state, t, mask), "normal")
    np.testing.assert_allclose(target, expected, atol=1e-5)
    played = made.denormalise(target, state[t])
    np.testing.assert_allclose(played[valid], action[t : t + CHUNK], atol=1e-4)
    np.testing.assert_allclose(made.normalise(played, state[t])[valid], target[valid], atol=1e-3)


@settings(max_examples=25)
@given(masks, st.integers(0, 99))
def test_a_batch_has_each_rows_own_state(mask: tuple[bool, ...], seed: int) -> None:
    made, (action, state) = conventions(mask, seed), episode(seed)
    steps = np.array([[0, 3], [7, 1]])
    targets, _ = made.chunk_targets(action, steps, state)
    played = made.denormalise(targets, state[steps])
    assert played.shape == (2, 2, CHUNK, ACTIONS)
    for place in np.ndindex(steps.shape):
        one, _ = made.chunk_targets(action, int(steps[place]), state)
        np.testing.assert_array_equal(targets[place], one)
        np.testing.assert_array_equal(played[place], made.denormalise(one, state[steps[place]]))


def test_without_any_nothing_changes_and_nothing_is_written() -> None:
    (action, state), made = episode(0), conventions(())
    with_state, _ = made.chunk_targets(action, 2, state)
    without, _ = made.chunk_targets(action, 2)
    np.testing.assert_array_equal(with_state, without)
    np.testing.assert_array_equal(made.denormalise(without, state[2]), made.denormalise(without))
    assert "relative_actions" not in made.to_dict()
    assert Conventions.from_dict(made.to_dict()).relative_actions == ()


def test_what_is_saved_comes_back() -> None:
    assert Conventions.from_dict(conventions(SIX).to_dict()).relative_actions == SIX


def test_a_state_is_needed() -> None:
    made, (action, _) = conventions(SIX), episode(0)
    with pytest.raises(ValueError, match="relative to the state, and no state is given"):
        made.chunk_targets(action, 0)
    with pytest.raises(ValueError, match="relative to the state, and no state is given"):
        made.denormalise(action[:CHUNK])


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ((True,) * 8, "relative_actions has 8 values for actions of 7 numbers and states of 8; give at most 7"),
        ((True,) * 7, "relative_actions is true of number 7, which is the gripper"),
    ],
)
def test_refused(mask: tuple[bool, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(conventions(()), relative_actions=mask)
