"""Chunks that go on from what is left of the last one, of any head that integrates a velocity.

Real-Time Chunking (Black, Galliker, Levine 2025, arXiv 2506.07339, equations 2 to 5), a pseudoinverse guidance
(Song et al. 2023) towards the last chunk's rest Y, for x from noise at t = 0 to actions at t = 1:

    a = x + (1 - t) v(x, t)                                             an estimate of the chunk
    v' = v + min(beta, (1 - t) / (t r^2)) (da/dx)^T W (Y - a)           r^2 = (1 - t)^2 / (t^2 + (1 - t)^2)
    W_i = 1 for i < d;  c (e^c - 1) / (e - 1) with c = (R - i) / (R - d + 1) for d <= i < R;  0 from R on

d actions are played before the chunk is there, and R are left. A row with nothing left, or no guidance, has
v' = v. Actions that are given (arXiv 2512.05964) stand in x from the start, at t = 1, and have no velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import torch

from ipvla.models.heads.integrators import Field, integrate
from ipvla.models.heads.protocol import Rest

#: (x float32 [B, C, A], t float32 [B], or [B, C] where actions are given) -> velocity float32 [B, C, A].
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def soft_mask(left: torch.Tensor, frozen: torch.Tensor, chunk: int) -> torch.Tensor:
    """W, float32 [B, C] in [0, 1], from R and d, int64 [B] with 0 <= d <= R <= C."""
    place = torch.arange(chunk, device=left.device)
    rest, whole = left[:, None].float(), frozen[:, None].float()
    c = ((rest - place) / (rest - whole + 1)).clamp(0, 1)
    fading = c * torch.expm1(c) / (math.e - 1)
    return torch.where(place < whole, 1.0, fading).where(place < rest, 0.0)


def pull(t: float, largest: torch.Tensor) -> torch.Tensor:
    """The guidance's weight at t in [0, 1], clipped to `largest`, float32 [B]; infinite at both ends otherwise."""
    if t in (0.0, 1.0):
        return largest
    return largest.clamp(max=(t**2 + (1 - t) ** 2) / (t * (1 - t)))


def resumed(
    velocity: Velocity, noise: torch.Tensor, rest: Rest, varies: torch.Tensor, steps: int, integrator: str
) -> torch.Tensor:
    """Chunks float32 [B, C, A] from noise [B, C, A].

    Args:
        rest: with actions of A numbers.
        varies: bool [A], False for numbers of an action that nothing pulls at.
        steps, integrator: see `integrators.integrate`.
    """
    given = torch.arange(noise.shape[1], device=noise.device) < rest.given[:, None]
    some_given = bool(given.any())

    def times(t: float) -> torch.Tensor:
        return torch.where(given, 1.0, t) if some_given else torch.full_like(noise[:, 0, 0], t)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        return velocity(x, times(t)).masked_fill(given[..., None], 0.0)

    start = torch.where(given[..., None], rest.actions, noise)
    if not rest.guidance.any():
        return integrate(field, start, steps, integrator)
    # tensors of inference mode cannot be differentiated
    with torch.inference_mode(False):
        whole = Rest(**{one.name: usable(getattr(rest, one.name)) for one in fields(Rest)})
        mask = soft_mask(whole.left, whole.frozen, noise.shape[1])[..., None] * usable(varies)
        given, noise = usable(given), usable(noise)
        return integrate(_guided(field, whole, mask), usable(start), steps, integrator)


def usable(x: torch.Tensor) -> torch.Tensor:
    """A tensor that can take part in a differentiation: itself, or a copy of one that inference mode has made."""
    return x.clone() if x.is_inference() else x


def _guided(field: Field, rest: Rest, mask: torch.Tensor) -> Field:
    def guided(x: torch.Tensor, t: float) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = field(x, t)
            estimate = x + (1 - t) * v
            error = (rest.actions - estimate.detach()) * mask
            (correction,) = torch.autograd.grad(estimate, x, error)
        return v.detach() + pull(t, rest.guidance)[:, None, None] * correction

    return guided
