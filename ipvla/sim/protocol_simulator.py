"""A simulator as a protocol has it: settled before the policy's first step, seen and moved as its client does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.contract import HAND, Contract, Pictures, to_environment
from ipvla.sim.protocols import EvaluationProtocol
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import Observation

Picture = npt.NDArray[np.uint8]

#: Where the fingers begin in the hand's state.
_FINGERS = 6
_JPEG_QUALITY = 95  # tensorflow's default


class ProtocolSimulator:
    """Control steps are counted from the policy's first one; what was settled before does not count.

    Until `show` names other terms it shows the protocol's pictures and state, and takes actions in the simulator's
    units, as every policy of this project gives them.

    Args:
        simulator: of the suite; it renders at the protocol's size.
        protocol: how it is played.
        suite: the simulator's, for its horizon.

    Raises:
        ProtocolError: the protocol says nothing of this suite.
    """

    def __init__(self, simulator: Simulator, protocol: EvaluationProtocol, suite: str) -> None:
        self._simulator, self._protocol = simulator, protocol
        horizon = protocol.horizon(suite, simulator.task.horizon)
        self.task = replace(simulator.task, horizon=horizon)
        self._played: npt.NDArray[np.float32] | None = None  # within limits, what the next may differ from
        self.show(None)

    def show(self, view: Contract | None) -> None:
        """From now on: the terms of the client that plays, by `ipvla.contract.fitted`; None for the first ones."""
        self.view = view or replace(self._protocol.contract(HAND), gripper="environment")

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed and lets it settle.

        Raises:
            ValueError: the simulator has no episode of this seed.
        """
        self._simulator.reset(seed)
        self._played = None
        for _ in range(self._protocol.settle_steps):
            self._simulator.step(np.array(self._protocol.settle_action))

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        """Plays one control step of the client's action, [A] on its terms and within its limits.

        ValueError if it is not finite.
        """
        if not np.isfinite(action).all():
            raise ValueError(
                f"an action of {np.asarray(action).tolist()} is not finite; check the policy's weights"
            )
        if (limits := self.view.limits) is not None:
            action = self._played = limits.kept(np.asarray(action, np.float32)[None], self._played)[0]
        return self._simulator.step(to_environment(np.array(action, dtype=np.float64), self.view.gripper))

    @property
    def simulator(self) -> Simulator:
        """What is played by the protocol."""
        return self._simulator

    def observe(self, geometry: bool = False) -> Observation:
        """What the policy sees, with the geometry of its pictures if the policy or the caller asks for it."""
        view = self.view
        seen = self._simulator.observe(geometry=True) if view.geometry or geometry else self._simulator.observe()
        return Observation(
            images={name: preprocess(seen.images[name], view.pictures) for name in view.cameras},
            proprio=self._state(seen.proprio),
            instruction=seen.instruction,
            t=seen.t - self._protocol.settle_steps,
            geometry=seen.geometry and {name: seen.geometry[name].shown(view.pictures) for name in view.cameras},
        )

    @property
    def t(self) -> int:
        """Control steps since the policy's first one."""
        return self._simulator.t - self._protocol.settle_steps

    def joints(self) -> npt.NDArray[np.float32]:
        """float32 [9], arm and fingers."""
        return self._simulator.joints()

    def frame(self, size: int = 256) -> npt.NDArray[np.uint8]:
        """uint8 [size, size, 3], upright RGB, for people."""
        return self._simulator.frame(size)

    def state(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self._simulator.state()

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """ValueError if the state is of another task."""
        self._simulator.restore(state)
        self._played = None

    def details(self) -> Mapping[str, Any]:
        return self._simulator.details()

    def close(self) -> None:
        self._simulator.close()

    def _state(self, given: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The state in the client's layout, from the simulator's own."""
        if self.view.state == "joints":
            return self.joints()
        if self.view.state == "hand_padded":
            return np.insert(given, _FINGERS, np.float32(0))
        if self.view.state == "none":
            return np.zeros(self.view.state_size, np.float32)
        return given


def preprocess(picture: Picture, shown: Pictures) -> Picture:
    """From uint8 [S, S, 3], upright RGB, to what is shown: turned, through JPEG, resized, cropped.

    Raises:
        KeyError: nothing tells how they are turned.
    """
    turned = {
        "upright": picture,
        "mirrored": picture[:, ::-1],
        "upside_down": picture[::-1],
    }[shown.orientation]
    made = np.ascontiguousarray(turned)
    if shown.jpeg:
        made = _through_jpeg(made)
    if shown.size is not None and shown.size != len(made):
        made = _resized(made, shown.size, shown.resize)
    return _cropped(made, shown.crop_area) if shown.crop_area < 1 else made


def _through_jpeg(picture: Picture) -> Picture:
    import simplejpeg

    coded = simplejpeg.encode_jpeg(picture, quality=_JPEG_QUALITY, colorsubsampling="420")
    decoded: Picture = simplejpeg.decode_jpeg(coded)
    return decoded


def _resized(picture: Picture, size: int, method: str) -> Picture:
    from PIL import Image

    filters = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
    return np.array(Image.fromarray(picture).resize((size, size), filters[method]))


def _cropped(picture: Picture, area: float) -> Picture:
    """Cut out around the centre and blown up, corners on corners, as tensorflow's crop_and_resize does it."""
    import torch
    import torch.nn.functional as F

    size, share = len(picture), area**0.5
    theta = torch.tensor([[[share, 0.0, 0.0], [0.0, share, 0.0]]])
    grid = F.affine_grid(theta, [1, 3, size, size], align_corners=True)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    blown_up = F.grid_sample(pixels, grid, mode="bilinear", align_corners=True)
    return blown_up[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
