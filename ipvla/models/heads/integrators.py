"""From noise to a chunk along a velocity field: dx/dt = v(x, t) from t = 0 (noise) to t = 1 (actions).

The path is x_t = (1 - t) z + t a, so v predicts a - z, and D = x + (1 - t) v is an estimate of a. One step from t
to t' = t + h:

    euler      x' = x + h v                                        order 1 (DDIM and DPM-Solver-1 on this path)
    midpoint   x' = x + h v(x + h/2 v, t + h/2)                    order 2
    heun       x' = x + h/2 (v + v(x + h v, t'))                   order 2
    ab2        x' = x + h (v + h/(2 g) (v - v_before))             order 2, g the step before; the first is Euler's
    dpmpp2m    x' = (1 - t')/(1 - t) x + (t' - t)/(1 - t) (D + r (D - D_before))
               order 2, r = h_log / (2 h_log_before), h_log the step in log(t / (1 - t)), which has no end at 0 and
               1: steps from there and to there are of order 1 (DPM-Solver++(2M), Lu et al., arXiv 2211.01095)
    rk4        the classical Runge-Kutta method                    order 4
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch

from ipvla.choices import did_you_mean

#: (x, t) -> velocity, of the shape of x.
Field = Callable[[torch.Tensor, float], torch.Tensor]


def integrate(
    field: Field, x: torch.Tensor, steps: int, integrator: str = "euler", times: Sequence[float] | None = None
) -> torch.Tensor:
    """x at t = 1, from x at t = 0, in equal steps.

    Args:
        steps: at least 1; each asks the field `INTEGRATORS[integrator].evaluations` times.
        integrator: one of `INTEGRATORS`.
        times: other times than i / steps, ascending, the first and the last included.
    """
    times = [i / steps for i in range(steps + 1)] if times is None else times
    return INTEGRATORS[integrator].run(field, x, times)


def require_integrator(steps: int, integrator: str, setting: str) -> None:
    """ValueError that names the setting if there are no such steps or no such integrator."""
    if integrator not in INTEGRATORS:
        raise ValueError(
            f"{setting}.integrator: {integrator!r} is unknown; {did_you_mean(integrator, INTEGRATORS)}"
        )
    if steps < 1:
        raise ValueError(f"{setting}.steps is {steps}; it must be at least 1")


def _euler(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    for t, then in pairwise(times):
        x = x + (then - t) * field(x, t)
    return x


def _midpoint(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    for t, then in pairwise(times):
        half = (then - t) / 2
        x = x + 2 * half * field(x + half * field(x, t), t + half)
    return x


def _heun(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    for t, then in pairwise(times):
        h, v = then - t, field(x, t)
        x = x + h / 2 * (v + field(x + h * v, then))
    return x


def _ab2(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    before: tuple[torch.Tensor, float] | None = None
    for t, then in pairwise(times):
        h, v = then - t, field(x, t)
        x = x + h * (v if before is None else v + h / (2 * before[1]) * (v - before[0]))
        before = v, h
    return x


def _dpmpp2m(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    before: tuple[torch.Tensor, float] | None = None
    for t, then in pairwise(times):
        data, log_step = x + (1 - t) * field(x, t), _logit(then) - _logit(t)
        estimate = data
        if before is not None and math.isfinite(log_step):
            estimate = data + log_step / (2 * before[1]) * (data - before[0])
        x = (1 - then) / (1 - t) * x + (then - t) / (1 - t) * estimate
        before = data, log_step
    return x


def _rk4(field: Field, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    for t, then in pairwise(times):
        h = then - t
        a = field(x, t)
        b = field(x + h / 2 * a, t + h / 2)
        c = field(x + h / 2 * b, t + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + field(x + h * c, then))
    return x


def _logit(t: float) -> float:
    if t in (0, 1):
        return math.inf if t else -math.inf
    return math.log(t / (1 - t))


@dataclass(frozen=True)
class Integrator:
    """run: (field, x at the first time, times) -> x at the last one; evaluations: of the field, per step."""

    run: Callable[[Field, torch.Tensor, Sequence[float]], torch.Tensor]
    evaluations: int


INTEGRATORS: Final[dict[str, Integrator]] = {
    "euler": Integrator(_euler, 1),
    "midpoint": Integrator(_midpoint, 2),
    "heun": Integrator(_heun, 2),
    "ab2": Integrator(_ab2, 1),
    "dpmpp2m": Integrator(_dpmpp2m, 1),
    "rk4": Integrator(_rk4, 4),
}
