"""A Gymnasium environment of the tests' own: a dot on a line, to be pushed onto a mark that is seen."""

import gymnasium
import numpy as np
from gymnasium.envs.registration import register

SIDE = 24


class Reach(gymnasium.Env):
    """Actions move the dot in two directions; it is there when it is near the mark, and lost when it leaves."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None, speed=0.1, seeded=True, flat=False):
        self.render_mode, self._speed, self._seeded, self._flat = render_mode, speed, seeded, flat
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict()
        self.drawn = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if self._seeded else None)
        self.dot, self.mark = np.zeros(2), self.np_random.uniform(-0.8, 0.8, 2)
        return self._seen(), {}

    def step(self, action):
        self.dot = self.dot + self._speed * np.clip(action, -1, 1)
        there = bool(np.abs(self.dot - self.mark).max() < 0.1)
        lost = bool(np.abs(self.dot).max() > 1)
        return self._seen(), float(there), there or lost, False, {"is_success": there}

    def render(self):
        self.drawn += 1
        return self._picture(SIDE, SIDE)

    def _seen(self):
        if self._flat:
            return self.dot.astype(np.float32)
        places = {"dot": self.dot.astype(np.float32), "mark": self.mark.astype(np.float32)}
        return {**places, "pixels": {"wide": self._picture(SIDE, 2 * SIDE)}}

    def _picture(self, height, width):
        picture = np.zeros((height, width, 3), np.uint8)
        for channel, place in enumerate((self.dot, self.mark)):
            row, column = ((np.clip(place, -1, 1) + 1) / 2 * [height - 1, width - 1]).astype(int)
            picture[max(row - 1, 0) : row + 2, max(column - 2, 0) : column + 3, channel] = 255
        return picture


class Walker:
    """Goes where the mark is."""

    def __init__(self, environment):
        self._environment = environment

    def act(self):
        return np.clip((self._environment.mark - self._environment.dot) / 0.1, -1, 1)


def expert(environment, rng):
    return Walker(environment)


register(id="ipvla_tests/Reach-v0", entry_point="tests.sim.gym.reach:Reach", max_episode_steps=3)
