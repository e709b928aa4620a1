"""A simulator as a protocol has it: settled before the policy's first step, seen and moved in its conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.sim.preprocessing import preprocess
from ipvla.sim.protocols import Protocol
from ipvla.sim.simulator import Simulator, StepOutcome
from ipvla.types import Observation


class ProtocolSimulator:
    """Control steps are counted from the policy's first one; what was settled before does not count.

    Args:
        simulator: of the suite; it renders at the protocol's size.
        protocol: how it is played.
        suite: the simulator's, for its horizon.

    Raises:
        ProtocolError: the protocol says nothing of this suite.
    """

    def __init__(self, simulator: Simulator, protocol: Protocol, suite: str) -> None:
        self._simulator, self._protocol = simulator, protocol
        horizon = protocol.horizon(suite, simulator.task.horizon)
        self.task = replace(simulator.task, horizon=horizon)

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed and lets it settle.

        Raises:
            ValueError: the simulator has no episode of this seed.
        """
        self._simulator.reset(seed)
        for _ in range(self._protocol.settle_steps):
            self._simulator.step(np.array(self._protocol.settle_action))

    def step(self, action: npt.NDArray[np.floating[Any]]) -> StepOutcome:
        """Plays one control step of the policy's action, [7] in the protocol's conventions."""
        command = np.array(action, dtype=np.float64)
        if self._protocol.gripper == "open_is_1":
            command[-1] = -np.sign(2 * command[-1] - 1)
        return self._simulator.step(command)

    def action(self, command: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """[7], the action in the protocol's conventions that the simulator plays as this command."""
        action = np.array(command, dtype=np.float64)
        if self._protocol.gripper == "open_is_1":
            action[-1] = (1 - np.sign(action[-1])) / 2
        return action

    @property
    def simulator(self) -> Simulator:
        """What is played by the protocol."""
        return self._simulator

    def observe(self) -> Observation:
        """What the policy sees."""
        seen = self._simulator.observe()
        return Observation(
            images={name: preprocess(seen.images[name], self._protocol) for name in self._protocol.cameras},
            proprio=self.joints() if self._protocol.proprio == "joints" else seen.proprio,
            instruction=seen.instruction,
            t=seen.t - self._protocol.settle_steps,
        )

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

    def details(self) -> Mapping[str, Any]:
        return self._simulator.details()

    def close(self) -> None:
        self._simulator.close()
