"""Sub-goals count in their order, each once, and a finished sequence must last."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.sim.libero_mem.progress import (
    ABSENT_STEPS,
    LOST_STEPS,
    PRESENT_STEPS,
    REST_STEPS,
    Goal,
    SubgoalProgress,
)
from ipvla.sim.libero_mem.tasks import TASKS

A, B, C = (("on", f"bowl_{i}", "plate") for i in range(3))
#: How long a goal is away and back so that it counts.
AWAY, BACK = ABSENT_STEPS + 1, PRESENT_STEPS + 1


def play(progress: SubgoalProgress, spans: Iterable[tuple[set[Goal], int]]) -> SubgoalProgress:
    """Each span: which relations hold, and for how many control steps."""
    for holding, steps in spans:
        for _ in range(steps):
            progress.advance(lambda goal, holding=holding: goal in holding)
    return progress


def reach(*goals: Goal) -> list[tuple[set[Goal], int]]:
    return [span for goal in goals for span in ((set(), AWAY), ({goal}, BACK))]


def test_what_was_true_from_the_beginning_does_not_count() -> None:
    assert play(SubgoalProgress(((A,),)), [({A}, 500)]).reached == 0


def test_one_lift_counts_once_however_long_it_stands() -> None:
    progress = play(SubgoalProgress(((A, A, A),)), [*reach(A), ({A}, 500)])
    assert (progress.reached, progress.completion) == (1, pytest.approx(1 / 3))
    assert not progress.success


@given(lifts=st.integers(0, 9), needed=st.integers(1, 7))
def test_exactly_as_many_lifts_as_needed_succeed(lifts: int, needed: int) -> None:
    progress = play(SubgoalProgress(((A,) * needed,)), [({A}, 20), *reach(A) * lifts, ({A}, REST_STEPS)])
    assert progress.reached == min(lifts, needed)
    assert progress.success == (lifts == needed)
    assert progress.failure == (lifts > needed)


@given(order=st.permutations([A, B, C]))
def test_order_matters(order: list[Goal]) -> None:
    progress = play(SubgoalProgress(((A, B, C),)), [*reach(*order), ({order[-1]}, REST_STEPS)])
    in_order = iter(order)
    expected = 0
    for goal in (A, B, C):
        if goal not in in_order:
            break
        expected += 1
    assert progress.reached == expected
    assert progress.success == (order == [A, B, C])


@given(spans=st.lists(st.tuples(st.sets(st.sampled_from([A, B, C])), st.integers(1, 40)), max_size=12))
def test_never_backwards_never_two_at_once(spans: list[tuple[set[Goal], int]]) -> None:
    progress = SubgoalProgress(((A, B, A), (C, B, A)))
    before = 0
    for holding, steps in spans:
        for _ in range(steps):
            play(progress, [(holding, 1)])
            assert progress.reached - before in (0, 1)
            before = progress.reached
    assert not (progress.success and progress.failure)


@given(spans=st.lists(st.tuples(st.sets(st.sampled_from([A, B, C])), st.integers(1, 40)), max_size=12))
def test_a_saved_episode_goes_on_as_if_it_had_not_been_saved(spans: list[tuple[set[Goal], int]]) -> None:
    ways = ((A, B), (C, B))
    one, other = SubgoalProgress(ways), SubgoalProgress(ways)
    for span in spans:
        play(one, [span])
        loaded = SubgoalProgress(ways)
        loaded.load_array(other.to_array())
        other = play(loaded, [span])
    np.testing.assert_array_equal(one.to_array(), other.to_array())


def test_of_two_ways_the_one_that_was_begun_counts() -> None:
    progress = play(SubgoalProgress(((A, B), (B, A))), reach(B))
    assert progress.possible == ((B, A),)
    assert play(progress, reach(B)).reached == 1
    assert play(progress, [*reach(A), ({A}, REST_STEPS)]).success


def test_a_short_loss_at_the_end_is_forgiven_and_a_long_one_is_not() -> None:
    done = reach(A)
    assert play(SubgoalProgress(((A,),)), [*done, (set(), LOST_STEPS), ({A}, REST_STEPS)]).success
    failed = play(SubgoalProgress(((A,),)), [*done, (set(), LOST_STEPS + 1), ({A}, REST_STEPS)])
    assert failed.failure
    assert not failed.success


@pytest.mark.parametrize("sequences", [(), ((),), ((A,), (A, B))])
def test_sequences_of_different_lengths_are_refused(sequences: tuple[tuple[Goal, ...], ...]) -> None:
    with pytest.raises(ValueError, match="give one or more, equally long"):
        SubgoalProgress(sequences)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name.split("_")[2])
def test_every_task_is_solved_by_each_of_its_ways(task) -> None:  # type: ignore[no-untyped-def]
    for sequence in task.sequences:
        progress = play(SubgoalProgress(task.sequences), [*reach(*sequence), ({sequence[-1]}, REST_STEPS)])
        assert progress.success
