"""Integrators: reference results on a two-mode mixture, their orders, and how often they ask the field."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ipvla.models.heads.integrators import INTEGRATORS, Field, integrate, require_integrator

RECORDED = load_file(Path(__file__).with_name("integrators.safetensors"))
MEAN, STD, SHARE = (torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 0.8), (0.15, 0.3), (0.35, 0.65)))
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "dpmpp2m": 2, "rk4": 4}


def mixture(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[a - z | x] of a mixture of two Gaussians."""
    variance = (1 - t) ** 2 + t**2 * STD**2
    away = x[:, None] - t * MEAN
    share = (SHARE.log() - variance.log() / 2 - away.square() / (2 * variance)).softmax(-1)
    action, noise = MEAN + t * STD**2 / variance * away, (1 - t) / variance * away
    return (share * (action - noise)).sum(-1)


def counted(field: Field, calls: list[float]) -> Field:
    def call(x: torch.Tensor, t: float) -> torch.Tensor:
        calls.append(t)
        return field(x, t)

    return call


@pytest.mark.parametrize("name", [n for n in RECORDED if n.split("/")[0] in INTEGRATORS])
def test_recorded_results_are_reproduced_with_as_many_evaluations(name: str) -> None:
    integrator, evaluations = name.split("/")
    calls: list[float] = []
    steps = int(evaluations) // INTEGRATORS[integrator].evaluations
    ours = integrate(counted(mixture, calls), RECORDED["noise"], steps, integrator)
    torch.testing.assert_close(ours, RECORDED[name], rtol=0, atol=1e-9)
    assert len(calls) == int(evaluations)


@pytest.mark.parametrize("steps", [4, 8, 10])
def test_dpm_solver_equals_diffusers_on_its_grid(steps: int) -> None:
    times = RECORDED[f"diffusers_dpmpp2m/{steps}/t"].tolist()
    ours = integrate(mixture, RECORDED["noise"], steps, "dpmpp2m", times)
    torch.testing.assert_close(ours, RECORDED[f"diffusers_dpmpp2m/{steps}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("integrator", ORDERS)
@given(push=st.floats(-1, 1), start=st.floats(0.5, 2))
def test_halved_steps_divide_the_error_by_two_to_the_order(integrator: str, push: float, start: float) -> None:
    """On x' = rate x + push cos 3t, away from 0 and 1, where the logarithmic step of DPM-Solver++ ends."""
    rate = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)

    def forced(t: float) -> torch.Tensor:
        return push * (3 * math.sin(3 * t) - rate * math.cos(3 * t)) / (rate**2 + 9)

    def error(steps: int) -> float:
        times = [0.1 + 0.8 * i / steps for i in range(steps + 1)]
        x = torch.full_like(rate, start)
        reached = integrate(lambda x, t: rate * x + push * math.cos(3 * t), x, steps, integrator, times)
        exact = (start - forced(0.1)) * (0.8 * rate).exp() + forced(0.9)
        return float((reached - exact).abs().max())

    assert error(32) <= error(16) / 2 ** (ORDERS[integrator] - 0.6)


def test_every_integrator_has_an_order_here() -> None:
    assert ORDERS.keys() == INTEGRATORS.keys()


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_straight_path_needs_one_step(integrator: str) -> None:
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(integrate(lambda _, t: v, x, 1, integrator), x + v)
    torch.testing.assert_close(integrate(lambda _, t: v, x, 3, integrator), x + v)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.head\.integrator: 'hoyn' is unknown; did you mean 'heun'\?"):
        require_integrator(4, "hoyn", "model.head")
    with pytest.raises(ValueError, match=r"sampling\.steps is 0; it must be at least 1"):
        require_integrator(0, "euler", "sampling")
