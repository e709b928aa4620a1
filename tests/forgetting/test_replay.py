"""The Thermostat's controls spend what the closed loop spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.forgetting.thermostat import Line, ThermostatConfig, ThermostatState, controls, trace

THERMOSTAT = ThermostatConfig(every=5, calibration=2)
strengths = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(tuple)


def run(strengths: Sequence[float], every: int = 5, calibration: int = 2) -> list[Line]:
    """Metrics of a run whose readings after calibration set these strengths; one more comes at its last step."""
    lines: list[Line] = []
    for reading, strength in enumerate([*[0.0] * calibration, *strengths, 0.123], start=1):
        lines.append({"step": reading * every, "probe/d": 0.1, "gain/strength": strength})
        lines.append({"step": reading * every, "train/loss": 1.0})
    return lines


@settings(max_examples=30, deadline=None)
@given(strengths)
def test_a_trace_is_what_was_in_force_after_calibration(of_loop: tuple[float, ...]) -> None:
    assert trace(run(of_loop), THERMOSTAT, steps=5 * (3 + len(of_loop))) == of_loop


@settings(max_examples=30, deadline=None)
@given(strengths, st.integers(0, 1000))
def test_controls_spend_what_the_loop_spent(of_loop: tuple[float, ...], seed: int) -> None:
    made = controls(of_loop, THERMOSTAT, seed)
    assert made == controls(of_loop, THERMOSTAT, seed)
    played = {}
    for name, settings_ in made.items():
        thermostat, state, played[name] = settings_.build(), ThermostatState(), []
        for reading in range(2 + len(of_loop)):
            state, _ = thermostat.step(state, 7.0 * reading, 0.1)
            played[name].append(state.strength)
    assert played["mean"][:2] == played["shuffled"][:2] == [0, 0], "calibration is left as it was"
    assert sorted(played["shuffled"][2:]) == sorted(of_loop)
    assert played["mean"][2:] == pytest.approx([np.mean(of_loop)] * len(of_loop))


def test_controls_differ_from_the_loop_in_nothing_else() -> None:
    of_loop = tuple(np.linspace(0, 1, 20).tolist())
    one, other = (controls(of_loop, THERMOSTAT, seed)["shuffled"] for seed in (0, 1))
    assert len({of_loop, one.strengths, other.strengths}) == 3
    assert replace(one, mode="proportional", strengths=()) == THERMOSTAT


def test_a_trace_that_cannot_be_replayed_fairly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps is 31, not a multiple of thermostat\.every 5"):
        trace(run([0.5]), THERMOSTAT, steps=31)
    with pytest.raises(ValueError, match=r"no reading at steps \[25\]"):
        trace(run([0.5]), THERMOSTAT, steps=30)
    with pytest.raises(ValueError, match="no reading acted: 2 before step 15, of which calibration takes 2"):
        trace(run([]), THERMOSTAT, steps=15)
    with pytest.raises(ValueError, match="no strengths"):
        controls((), THERMOSTAT, seed=0)
