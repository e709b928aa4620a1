"""What the controller promises for any readings: bounds, monotony, slew, recovery, and a resume without a seam."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvla.forgetting.method import Gains
from ipvla.forgetting.thermostat import FLOOR, LEAST_LO, Thermostat, ThermostatConfig, ThermostatState

SIGMA = 0.01  # with lo_sigma 5 after QUIET: lo = 0.06, hi = 0.18
QUIET = [0.005, 0.01, 0.015]
readings = st.floats(0, 1e6) | st.floats(0, 0.4)
traces = st.lists(readings, max_size=40)
strengths = st.lists(st.floats(0, 1), min_size=1, max_size=30).map(tuple)


@st.composite
def configs(draw: st.DrawFn, mode: str | None = None) -> ThermostatConfig:
    mode = mode or draw(st.sampled_from(["proportional", "pi", "replay"]))
    lo = draw(st.none() | st.floats(LEAST_LO, 1))
    return ThermostatConfig(
        mode=mode,
        strengths=draw(strengths) if mode == "replay" else (),
        calibration=draw(st.integers(1 if lo is None else 0, 6)),
        lo=lo,
        start=draw(st.floats(0, 1)),
        gamma_min=draw(st.floats(0, 1)),
        beta_min=draw(st.floats(0.01, 1)),
        hi_over_lo=draw(st.floats(1.1, 8)),
        ema_half_life=draw(st.floats(0.5, 5)),
        kp=draw(st.floats(0, 5)),
        ki=draw(st.floats(0.1, 5)),
        slew=draw(st.floats(FLOOR, 1)),
        hysteresis=draw(st.floats(0, 0.5)),
        lambda_max=draw(st.floats(0, 100)),
        kappa_max=draw(st.floats(0, 0.03)),
    )


def run(
    thermostat: Thermostat, trace: Iterable[float], state: ThermostatState | None = None
) -> tuple[ThermostatState, list[Gains]]:
    state, gains = state or thermostat.begin(), []
    for d in trace:
        state, now = thermostat.step(state, d, SIGMA)
        gains.append(now)
    return state, gains


def calibrated(mode: str, **settings: float) -> tuple[Thermostat, ThermostatState]:
    thermostat = ThermostatConfig(mode=mode, calibration=len(QUIET), **settings).build()  # type: ignore[arg-type]
    return thermostat, run(thermostat, QUIET)[0]


@settings(max_examples=50, deadline=None)
@given(configs(), traces)
def test_gains_stay_within_their_bounds_and_beta_above_zero(config: ThermostatConfig, trace: list[float]) -> None:
    for g in run(config.build(), trace)[1]:
        assert config.gamma_min - 1e-12 <= g.gamma <= 1
        assert 0 < config.beta_min - 1e-12 <= g.beta <= 1
        assert 0 <= g.lam <= config.lambda_max
        assert 0 <= g.kappa <= config.kappa_max


@settings(max_examples=50, deadline=None)
@given(configs(), traces, readings, readings)
def test_more_drift_never_means_less_protection(
    config: ThermostatConfig, trace: list[float], d: float, other: float
) -> None:
    thermostat = config.build()
    state, _ = run(thermostat, trace)
    less, more = (thermostat.step(state, x, SIGMA)[1] for x in sorted((d, other)))
    assert more.gamma <= less.gamma
    assert more.beta <= less.beta
    assert more.lam >= less.lam
    assert more.kappa >= less.kappa


@settings(max_examples=50, deadline=None)
@given(configs(), traces)
def test_calibration_measures_and_does_not_act(config: ThermostatConfig, trace: list[float]) -> None:
    thermostat = config.build()
    began = thermostat.gains(thermostat.begin())
    assert began == Gains() or config.start > 0
    assert run(thermostat, trace)[1][: config.calibration] == [began] * min(len(trace), config.calibration)


@settings(max_examples=50, deadline=None)
@given(configs(), st.lists(st.floats(0, 10), min_size=6, max_size=6), st.floats(0, 1))
def test_drift_is_what_exceeds_calibrations_readings_by_more_than_their_noise(
    config: ThermostatConfig, trace: list[float], sigma: float
) -> None:
    thermostat = replace(config, lo=None, calibration=max(config.calibration, 1)).build()
    config, state = thermostat.config, thermostat.begin()
    for d in trace[: config.calibration]:
        state, _ = thermostat.step(state, d, sigma if thermostat.ends_calibration(state) else None)
    assert not thermostat.ends_calibration(state)
    assert state.lo == pytest.approx(max(np.mean(trace[: config.calibration]) + 5 * sigma, LEAST_LO))
    assert state.hi == pytest.approx(config.hi_over_lo * state.lo)


@pytest.mark.parametrize("mode", ["proportional", "pi"])
@pytest.mark.parametrize("slope", [0.001, 0.01, 0.1])
def test_a_student_that_moves_on_all_through_calibration_is_acted_on_at_its_end(mode: str, slope: float) -> None:
    """The noise of paired readings is a share of the drift, here 8 %; how fast the drift grows is no noise."""
    thermostat = ThermostatConfig(mode=mode, calibration=4).build()
    state = ThermostatState()
    for reading in range(1, 7):
        state, gains = thermostat.step(state, slope * reading, 0.08 * slope * reading)
    assert gains.gamma < 1


def test_a_student_that_stood_still_during_calibration_is_given_what_rounding_needs() -> None:
    thermostat = ThermostatConfig(calibration=2).build()
    state, _ = thermostat.step(ThermostatState(), 0.0)
    state, _ = thermostat.step(state, 0.0, 0.0)
    assert (state.lo, state.hi) == (LEAST_LO, 3 * LEAST_LO)


def test_the_proportional_law_is_a_straight_line_between_the_thresholds() -> None:
    thermostat, state = calibrated("proportional", gamma_min=0.2, beta_min=0.6, lambda_max=10, kappa_max=0.02)
    assert (state.lo, state.hi) == pytest.approx((0.06, 0.18))
    at = {d: thermostat.step(state, d)[1] for d in (0.0, 0.059, 0.12, 0.18, 9.0)}
    assert at[0.0] == at[0.059] == Gains()
    assert (at[0.12].gamma, at[0.12].beta, at[0.12].lam, at[0.12].kappa) == pytest.approx((0.6, 0.8, 5, 0.01))
    assert (at[9.0].gamma, at[9.0].beta, at[9.0].lam, at[9.0].kappa) == pytest.approx((0.2, 0.6, 10, 0.02))
    assert at[0.18].gamma == pytest.approx(at[9.0].gamma)


@settings(max_examples=50, deadline=None)
@given(configs(mode="proportional"), traces, traces, readings)
def test_the_proportional_law_has_no_memory(
    config: ThermostatConfig, one: list[float], other: list[float], d: float
) -> None:
    thermostat = config.build()
    calibrated_state, _ = run(thermostat, [0.0] * config.calibration)
    after = [thermostat.step(run(thermostat, past, calibrated_state)[0], d)[1] for past in (one, other)]
    assert after[0] == after[1]


@settings(max_examples=50, deadline=None)
@given(strengths, traces, traces, st.integers(1, 6))
def test_a_replay_plays_what_was_recorded_in_order_whatever_the_drift_reads(
    recorded: tuple[float, ...], one: list[float], other: list[float], calibration: int
) -> None:
    thermostat = ThermostatConfig(mode="replay", calibration=calibration, strengths=recorded).build()
    for trace in (one, other):
        state = ThermostatState()
        for place, d in enumerate(trace):
            state, _ = thermostat.step(state, d, SIGMA)
            after = place - calibration
            assert state.strength == (0 if after < 0 else recorded[min(after, len(recorded) - 1)])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["proportional", "pi"]).flatmap(lambda mode: configs(mode=mode)), traces)
def test_a_replay_of_a_closed_loops_strengths_gives_its_gains_to_the_last_bit(
    config: ThermostatConfig, trace: list[float]
) -> None:
    thermostat, played = config.build(), []
    state = thermostat.begin()
    for d in trace:
        state, _ = thermostat.step(state, d, SIGMA)
        played.append(state.strength)
    recorded = tuple(json.loads(json.dumps(played[config.calibration :]))) or (0.0,)
    replay = replace(config, mode="replay", strengths=recorded)
    assert run(replay.build(), trace)[1] == run(thermostat, trace)[1]


def test_a_replay_still_takes_its_readings() -> None:
    closed, replayed = (
        calibrated(mode, **extra)  # type: ignore[arg-type]
        for mode, extra in (("proportional", {}), ("replay", {"strengths": (0.5,)}))
    )
    assert replayed[1] == closed[1]
    after, _ = replayed[0].step(replayed[1], 0.12)
    assert replace(after, strength=0) == replace(closed[0].step(closed[1], 0.12)[0], strength=0)


@settings(max_examples=50, deadline=None)
@given(configs(mode="pi"), traces)
def test_the_loop_moves_no_faster_than_its_slew(config: ThermostatConfig, trace: list[float]) -> None:
    thermostat = config.build()
    state = thermostat.begin()
    played = [state.strength]
    for d in trace:
        state, _ = thermostat.step(state, d, SIGMA)
        played.append(state.strength)
    assert np.abs(np.diff(played)).max(initial=0) <= config.slew + 1e-12
    assert all(0 <= s <= 1 for s in played)


@settings(max_examples=50, deadline=None)
@given(st.lists(readings, max_size=60), st.integers(0, 300))
def test_however_long_and_hard_it_was_pressed_the_loop_lets_go(trace: list[float], pressed: int) -> None:
    thermostat, state = calibrated("pi")
    state, _ = run(thermostat, [*trace, *[1e6] * pressed], state)
    assert run(thermostat, [0.0] * 20, state)[1][-1] == Gains()


def test_a_drift_that_stays_brings_the_loop_to_full_strength() -> None:
    thermostat, state = calibrated("pi")
    _, gains = run(thermostat, [0.15] * 40, state)
    assert gains[-1].gamma == pytest.approx(0)
    assert gains[-1].beta == pytest.approx(0.5)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.06 * 0.9 + 1e-6, 0.06 * 1.1 - 1e-6), st.integers(1, 30))
def test_within_the_hysteresis_band_the_strength_stays(d: float, count: int) -> None:
    thermostat, state = calibrated("pi")
    resting = replace(state, strength=0.4, ema=0.06)
    after, _ = run(thermostat, [d] * count, resting)
    assert after.strength == pytest.approx(0.4)


def test_the_loop_holds_a_plant_that_integrates_near_its_threshold() -> None:
    """Drift grows unless surgery restores: in the closed loop it settles, in the open loop it runs away."""
    thermostat, state = calibrated("pi")
    d, gains, trace = 0.0, Gains(), []
    for _ in range(400):
        d = max(d + 0.004 - 0.0012 * gains.lam * d / 0.05, 0.0)
        state, gains = thermostat.step(state, d)
        trace.append(d)
    assert max(trace[200:]) < 2 * state.lo < 0.004 * 400
    assert np.mean(trace[200:]) == pytest.approx(state.lo, rel=0.2)


def test_a_drift_that_may_be_spent_is_given_away_from_full_protection_and_then_held() -> None:
    """With `lo` set nothing is calibrated: no reading needs a sigma, and the first one acts."""
    thermostat = ThermostatConfig(mode="pi", calibration=0, lo=0.05, start=1.0, slew=1.0).build()
    state = thermostat.begin()
    assert (state.lo, state.hi, thermostat.gains(state).gamma) == (0.05, pytest.approx(0.15), 0)
    d, trace = 0.0, []
    for _ in range(400):
        assert not thermostat.ends_calibration(state)
        d = max(d + 0.004 - 0.0012 * thermostat.gains(state).lam * d / 0.05, 0.0)
        state, _ = thermostat.step(state, d)
        trace.append((d, state.strength))
    assert trace[0][1] < 1, "there was room"
    assert np.mean([d for d, _ in trace[200:]]) == pytest.approx(0.05, rel=0.2)


@settings(max_examples=50, deadline=None)
@given(configs(), traces, traces)
def test_a_resumed_run_goes_on_as_one_that_never_stopped(
    config: ThermostatConfig, before: list[float], after: list[float]
) -> None:
    whole = run(config.build(), before + after)
    state, first = run(config.build(), before)
    resumed = ThermostatState.from_dict(json.loads(json.dumps(state.to_dict())))
    thermostat = config.build()
    assert thermostat.gains(resumed) == (first[-1] if first else thermostat.gains(thermostat.begin()))
    last, second = run(config.build(), after, resumed)
    assert (last, first + second) == whole


@pytest.mark.parametrize("d", [math.nan, math.inf, -0.1])
def test_a_reading_that_is_no_drift_is_refused(d: float) -> None:
    thermostat, state = calibrated("pi")
    with pytest.raises(ValueError, match=r"drift reading 3 is .*; look for NaN in the student"):
        thermostat.step(state, d)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "pid"),
        ("every", 0),
        ("calibration", 0),
        ("lo", 0.0),
        ("start", 1.5),
        ("beta_min", 0.0),
        ("gamma_min", 1.1),
        ("gamma_min", math.nan),
        ("hi_over_lo", 1.0),
        ("slew", 0.0),
        ("ki", 0.0),
        ("kappa_max", 1.0),
        ("lambda_max", math.inf),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"thermostat\.{name} is '?{value}"):
        ThermostatConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [None, -1.0, math.nan, math.inf])
def test_calibration_cannot_end_without_the_noise_of_readings(sigma: float | None) -> None:
    thermostat = ThermostatConfig(calibration=2).build()
    state, _ = thermostat.step(ThermostatState(), 0.1)
    with pytest.raises(ValueError, match=rf"sigma of readings is {sigma} .*; measure it on this student"):
        thermostat.step(state, 0.1, sigma)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "replay"}, r"thermostat\.strengths has 0 values in mode 'replay'; give at least one"),
        ({"strengths": (0.1,)}, r"thermostat\.strengths has 1 values in mode 'proportional'"),
        ({"mode": "replay", "strengths": (0.1, 1.5)}, r"thermostat\.strengths\[1\] is 1\.5"),
        ({"mode": "replay", "strengths": (math.nan,)}, r"thermostat\.strengths\[0\] is nan"),
    ],
)
def test_what_cannot_be_replayed_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThermostatConfig(**settings)  # type: ignore[arg-type]


def test_a_state_of_another_version_is_refused() -> None:
    values = ThermostatState().to_dict()
    with pytest.raises(ValueError, match="resume from a checkpoint of this version"):
        ThermostatState.from_dict({**values, "integral": 0.0})
    with pytest.raises(ValueError, match="thermostat's ema is nan"):
        ThermostatState.from_dict({**values, "ema": math.nan})


def test_a_reading_is_due_every_so_many_steps() -> None:
    thermostat = ThermostatConfig(every=25).build()
    assert [step for step in range(80) if thermostat.due(step)] == [0, 25, 50, 75]
