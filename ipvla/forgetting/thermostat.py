"""The controller that turns drift readings into the strength of what works against forgetting.

One strength s in [0, 1] sets all gains at once,

    gamma = 1 - s (1 - gamma_min),  beta = 1 - s (1 - beta_min),  lam = s lambda_max,  kappa = s kappa_max

The first `calibration` readings are only looked at (s = `start`, 0 unless it is set). At their end the thresholds
are set, from their mean and from sigma, by which readings of the student as it is then differ through the draw of
records alone:

    lo = max(mean + lo_sigma * sigma, LEAST_LO),  hi = hi_over_lo * lo

A reading counts as drift if it is above what calibration saw and the draw does not explain it. The noise of paired
readings is a share of the drift, 0 at the teacher, so it cannot be measured before training; nor is it how
calibration's readings differ from one another, which is mostly that the student moves on. The mean is what is put
up with: let calibration end early in the training. Where it is known how much drift may be spent, set `lo` itself,
`calibration` 0 and `start` 1: training then begins with full protection, and gives away what the drift leaves room
for.

Mode "proportional", the law of the requirement (2.3): s = (d - lo) / (hi - lo), clipped to [0, 1].

Mode "pi": PI control, in its velocity form, of log s:

    m = EMA of min(d, hi),  e = m / lo - 1, but 0 within the hysteresis band |e| <= h
    log s += kp (e - e_before) + ki e, clamped to [log FLOOR, 0], where FLOOR counts as s = 0
    s moves by at most `slew` per reading

It has no integral that could wind up: what is integrated is log s itself, clamped, with the slew taken into
account; a reading above hi counts as hi, so that the average forgets an outburst as quickly as a moderate excess.

Mode "replay": s is what `strengths` say, one per reading after calibration, and the last of them once they have
run out, whatever the drift reads. It opens the loop (`controls`): a closed loop's strengths (`trace`), shuffled or
all at their mean, spend exactly what the loop spent; a loop that is no better than both adds nothing.

The controller is pure: all that changes is in `ThermostatState`, which goes into a checkpoint as a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean
from typing import Any, Self

import numpy as np

from ipvla.forgetting.method import Gains

#: What one call of a metrics sink was given, and its `step`.
Line = Mapping[str, float]
FLOOR = 0.01
#: Less drift than this, in the relative unit of paired readings, is within bfloat16's rounding.
LEAST_LO = 1e-3


@dataclass(frozen=True)
class ThermostatConfig:
    """See the module's docstring for the law.

    Attributes:
        mode: "proportional", "pi" or "replay".
        every: training steps from one reading to the next.
        batch: probe records of a reading.
        calibration: readings that measure but do not act; may be 0 if `lo` is set.
        lo: lower threshold, > 0; None to set it at calibration's end.
        start: s in [0, 1] until a reading acts.
        gamma_min, beta_min: gains at full strength, in [0, 1]; beta_min must not be 0.
        lo_sigma: height of the lower threshold above calibration's mean, in standard deviations of a reading.
        hi_over_lo: > 1; the upper threshold over the lower.
        ema_half_life: readings after which a reading counts half ("pi").
        kp, ki: gains of the controller per unit of e ("pi").
        slew: most that s may move per reading, in [0.01, 1] ("pi").
        hysteresis: half width of the band around lo that counts as no error, in units of lo, in [0, 1) ("pi").
        lambda_max, kappa_max: at full strength; kappa_max < 1.
        strengths: s in [0, 1] of each reading after calibration, at least one ("replay"; empty in other modes).
    """

    mode: str = "proportional"
    every: int = 25
    batch: int = 64
    calibration: int = 8
    lo: float | None = None
    start: float = 0.0
    gamma_min: float = 0.0
    beta_min: float = 0.5
    lo_sigma: float = 5.0
    hi_over_lo: float = 3.0
    ema_half_life: float = 2.0
    kp: float = 1.0
    ki: float = 0.5
    slew: float = 0.1
    hysteresis: float = 0.1
    lambda_max: float = 10.0
    kappa_max: float = 3e-3
    strengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("proportional", "pi", "replay"):
            raise ValueError(f'thermostat.mode is {self.mode!r}; choose "proportional", "pi" or "replay"')
        ranges = {
            "every": (1, math.inf),
            "batch": (2, math.inf),
            "calibration": (1 if self.lo is None else 0, math.inf),
            **({} if self.lo is None else {"lo": (LEAST_LO, math.inf)}),
            "start": (0, 1),
            "gamma_min": (0, 1),
            "beta_min": (1e-6, 1),
            "lo_sigma": (1e-6, math.inf),
            "hi_over_lo": (1 + 1e-6, math.inf),
            "ema_half_life": (1e-6, math.inf),
            "kp": (0, math.inf),
            "ki": (1e-6, math.inf),
            "slew": (FLOOR, 1),
            "hysteresis": (0, 1 - 1e-6),
            "lambda_max": (0, math.inf),
            "kappa_max": (0, 1 - 1e-6),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"thermostat.{name} is {value}; it must be a number in [{low:g}, {high:g}]")
        if (self.mode == "replay") != bool(self.strengths):
            raise ValueError(
                f"thermostat.strengths has {len(self.strengths)} values in mode {self.mode!r}; "
                "give at least one in mode replay, and none in the others, which find their own"
            )
        for place, strength in enumerate(self.strengths):
            if not 0 <= strength <= 1:
                raise ValueError(f"thermostat.strengths[{place}] is {strength}; it must be a number in [0, 1]")

    def build(self) -> Thermostat:
        return Thermostat(self)


@dataclass(frozen=True)
class ThermostatState:
    """All that a run must keep to go on as if it had not stopped.

    Attributes:
        readings: so far.
        mean: of the calibration's readings.
        lo, hi: thresholds; 0 while they are not set yet.
        ema, error: m and e of the last reading.
        strength: s.
    """

    readings: int = 0
    mean: float = 0.0
    lo: float = 0.0
    hi: float = 0.0
    ema: float = 0.0
    error: float = 0.0
    strength: float = 0.0

    def to_dict(self) -> dict[str, float | int]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave; ValueError if a value is missing, unknown or not a finite number."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"a thermostat's state has {sorted(names)}, got {sorted(values)}; "
                "resume from a checkpoint of this version"
            )
        for name, value in values.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"a thermostat's {name} is {value!r}; it must be a finite number")
        return cls(**values)


class Thermostat:
    """See the module's docstring."""

    def __init__(self, config: ThermostatConfig) -> None:
        self.config = config
        self._remember = 0.5 ** (1 / config.ema_half_life)

    def begin(self) -> ThermostatState:
        """The state before the first reading."""
        lo = self.config.lo or 0.0
        return ThermostatState(lo=lo, hi=self.config.hi_over_lo * lo, strength=self.config.start)

    def due(self, step: int) -> bool:
        """Is a reading due after `step` optimizer steps?"""
        return step % self.config.every == 0

    def ends_calibration(self, state: ThermostatState) -> bool:
        """Whether the next reading sets the thresholds, for which sigma is needed."""
        return self.config.lo is None and state.readings + 1 == self.config.calibration

    def step(self, state: ThermostatState, d: float, sigma: float | None = None) -> tuple[ThermostatState, Gains]:
        """The state after a reading, and the gains until the next.

        Args:
            d: the reading, >= 0.
            sigma: >= 0, standard deviation of readings of this student (`DriftProbe.sigma`); only the reading that
                ends calibration needs it.

        Raises:
            ValueError: d or sigma is not such a number.
        """
        if not 0 <= d < math.inf:
            raise ValueError(f"drift reading {state.readings} is {d}; look for NaN in the student, or lower lr")
        after = (
            self._calibrate(state, d, sigma) if state.readings < self.config.calibration else self._act(state, d)
        )
        return after, self.gains(after)

    def gains(self, state: ThermostatState) -> Gains:
        """What holds in this state, e.g. after a resume."""
        c, s = self.config, state.strength
        return Gains(1 - s * (1 - c.beta_min), 1 - s * (1 - c.gamma_min), s * c.lambda_max, s * c.kappa_max)

    def _calibrate(self, state: ThermostatState, d: float, sigma: float | None) -> ThermostatState:
        n = state.readings + 1
        mean = state.mean + (d - state.mean) / n
        ema = self._average(state, min(d, state.hi or math.inf))
        measured = replace(state, readings=n, mean=mean, ema=ema)
        if not self.ends_calibration(state):
            return measured
        if sigma is None or not 0 <= sigma < math.inf:
            raise ValueError(
                f"the noise sigma of readings is {sigma} where calibration ends; measure it on this student"
            )
        lo = max(mean + self.config.lo_sigma * sigma, LEAST_LO)
        hi = self.config.hi_over_lo * lo
        return replace(measured, lo=lo, hi=hi, ema=min(ema, hi))

    def _act(self, state: ThermostatState, d: float) -> ThermostatState:
        c = self.config
        ema = self._average(state, min(d, state.hi))
        error = ema / state.lo - 1
        if abs(error) <= c.hysteresis:
            error = 0.0
        if c.mode == "replay":
            strength = c.strengths[min(state.readings - c.calibration, len(c.strengths) - 1)]
        elif c.mode == "proportional":
            strength = min(max((d - state.lo) / (state.hi - state.lo), 0.0), 1.0)
        else:
            log = math.log(max(state.strength, FLOOR)) + c.kp * (error - state.error) + c.ki * error
            unbounded = math.exp(min(log, 0.0)) if log > math.log(FLOOR) else 0.0
            strength = min(max(unbounded, state.strength - c.slew), state.strength + c.slew)
        return replace(state, readings=state.readings + 1, ema=ema, error=error, strength=strength)

    def _average(self, state: ThermostatState, d: float) -> float:
        return d + self._remember * (state.ema - d) if state.readings else d


def trace(lines: Sequence[Line], thermostat: ThermostatConfig, steps: int) -> tuple[float, ...]:
    """The strengths that were in force after calibration, one per reading, of a run of so many steps.

    A reading at the run's last step is left out: nothing was trained after it.

    Raises:
        ValueError: readings are missing, none acted, or the last one acted for fewer steps than the others.
    """
    if steps % thermostat.every:
        raise ValueError(
            f"training.steps is {steps}, not a multiple of thermostat.every {thermostat.every}: in another order "
            "the last strength would act for longer; change one of them"
        )
    read = {int(line["step"]): line["gain/strength"] for line in lines if "gain/strength" in line}
    due = range(thermostat.every, steps, thermostat.every)
    if missing := [step for step in due if step not in read]:
        raise ValueError(f"the metrics have no reading at steps {missing}; give those of the whole run")
    acted = tuple(read[step] for step in due[thermostat.calibration :])
    if not acted:
        raise ValueError(
            f"no reading acted: {len(due)} before step {steps}, of which calibration takes "
            f"{thermostat.calibration}; train longer or calibrate less"
        )
    return acted


def controls(strengths: Sequence[float], thermostat: ThermostatConfig, seed: int) -> dict[str, ThermostatConfig]:
    """Settings that replay a closed loop's `trace`: "mean", every one at their mean, and "shuffled", reordered.

    Gains are straight lines in the strength, so that the mean strength gives the mean of every gain.
    """
    if not strengths:
        raise ValueError("there are no strengths to replay; give a closed loop's trace")
    order = np.random.default_rng(seed).permutation(len(strengths))
    shuffled = tuple(strengths[place] for place in order)
    return {
        "mean": constant(fmean(strengths), thermostat),
        "shuffled": replace(thermostat, mode="replay", strengths=shuffled),
    }


def constant(strength: float, thermostat: ThermostatConfig) -> ThermostatConfig:
    """Settings that hold one strength in [0, 1] from calibration's end on; 0 is the open loop."""
    return replace(thermostat, mode="replay", strengths=(strength,))
