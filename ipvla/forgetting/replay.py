"""Does it matter that the Thermostat closes the loop? Its controls, which replay what a closed loop found.

The strengths are played again at their mean, and in another order. Both spend exactly what the loop spent; only
the answer to the drift is gone. A loop that is no better than both adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from ipvla.forgetting.thermostat import ThermostatConfig

#: What one call of a metrics sink was given, and its `step`.
Line = Mapping[str, float]


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
