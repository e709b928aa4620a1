"""Simulators are added while they wait for the policy, and no further than that helps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.rollout.sim_pool import MOST_PER_CORE, simulators_for


@pytest.mark.parametrize(("waiting", "simulators"), [(0.0, 8), (0.2, 10), (0.5, 16), (0.9, 16)])
def test_as_many_as_keep_the_cores_busy(waiting: float, simulators: int) -> None:
    assert simulators_for(8, waiting, policy_busy=0.3, room=100) == simulators


def test_nobody_is_added_to_a_queue() -> None:
    assert simulators_for(4, 0.8, policy_busy=0.95, room=100) == 4


@given(st.integers(1, 64), st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_never_fewer_than_cores_nor_many_more_nor_beyond_memory(
    cores: int, waiting: float, busy: float, room: int
) -> None:
    assert min(cores, room) <= simulators_for(cores, waiting, busy, room) <= min(MOST_PER_CORE * cores, room)
