"""The environment of `integrations.gym_aloha`, the only file that imports gym-aloha."""

from __future__ import annotations

from typing import Any

import numpy as np
from gym_aloha.env import AlohaEnv
from gymnasium import spaces

_JOINTS = 14


class DrawnOnDemand(AlohaEnv):
    """`gym_aloha.env.AlohaEnv` whose steps take a millisecond instead of a second, as nothing is drawn in them.

    Observations are `agent_pos`, float64 [14]: of each arm six joints (rad) and the gripper (0 closed, 1 open).
    `render` draws the camera `top`, uint8 [size, size, 3], its width squeezed, without shadows and smoothed edges.

    Args:
        task: "transfer_cube" or "insertion".
        size: side of pictures in pixels.
        render_mode: "rgb_array".
    """

    def __init__(self, task: str, size: int = 96, render_mode: str = "rgb_array") -> None:
        super().__init__(
            task, "pixels_agent_pos", render_mode, visualization_width=size, visualization_height=size
        )
        self.observation_space = spaces.Dict({"agent_pos": spaces.Box(-np.inf, np.inf, (_JOINTS,), np.float64)})

    @property
    def physics(self) -> Any:
        """dm_control's, of the world that is played."""
        return self._env.physics

    def close(self) -> None:
        """Frees the GL context while there is a thread to do it; gym-aloha leaves it to the interpreter's end."""
        self.physics.free()

    def _make_env_task(self, task_name: str) -> Any:
        made = super()._make_env_task(task_name)
        made.task.get_observation = lambda physics: {"qpos": made.task.get_qpos(physics)}
        model = made.physics.model
        model.vis.quality.offsamples = 0  # before the context exists that draws
        model.light_castshadow[:] = 0
        return made

    def _format_raw_obs(self, raw_obs: Any) -> dict[str, Any]:
        return {"agent_pos": np.array(raw_obs["qpos"])}
