"""The loop of public evaluation scripts: one environment of LIBERO's, every frame rendered, one episode at a time.

The order of things is theirs (OpenVLA-OFT's `run_libero_eval`); policy and pictures are those of the service it is
compared with.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.policy import Policy
from ipvla.sim.libero import axis_angle, configure
from ipvla.sim.preprocessing import preprocess
from ipvla.sim.protocols import EvaluationProtocol
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states, instruction
from ipvla.types import Observation


def play_serially(
    cache_dir: Path, policy_directory: Path, protocol: EvaluationProtocol, suite: str, task: str, trials: int
) -> tuple[list[float], list[int]]:
    """Seconds and control steps of each trial, without what comes before the first one (imports, building)."""
    assert protocol.render_size is not None
    configure(cache_dir, find_assets(cache_dir))
    from libero.libero.envs import OffScreenRenderEnv

    policy, states = Policy.load(policy_directory), initial_states(suite, task)
    size, horizon = protocol.render_size, protocol.horizon(suite, 0)
    environment = OffScreenRenderEnv(
        bddl_file_name=str(bddl_file(suite, task)), camera_heights=size, camera_widths=size
    )
    environment.seed(protocol.world_seed)
    seconds, steps = [], []
    for trial in range(trials):
        started = time.perf_counter()
        environment.reset()
        seen = environment.set_init_state(states[trial])
        for _ in range(protocol.settle_steps):
            seen, _, _, _ = environment.step(np.array(protocol.settle_action))
        memory, chunk, t, done = policy.initial_memory(1), deque[npt.NDArray[np.float32]](), 0, False
        while t < horizon and not done:
            if not chunk:
                actions, memory = policy.act([_observation(seen, protocol, instruction(task), t)], memory)
                chunk.extend(actions[0])
            seen, _, done, _ = environment.step(chunk.popleft().astype(np.float64))
            t += 1
        seconds.append(time.perf_counter() - started)
        steps.append(t)
    environment.close()
    return seconds, steps


def _observation(seen: dict[str, Any], protocol: EvaluationProtocol, words: str, t: int) -> Observation:
    turned = axis_angle(np.roll(seen["robot0_eef_quat"], 1))  # from x, y, z, w
    proprio = np.concatenate([seen["robot0_eef_pos"], turned, seen["robot0_gripper_qpos"]])
    images = {name: preprocess(seen[f"{name}_image"][::-1], protocol.pictures) for name in protocol.cameras}
    return Observation(images, proprio.astype(np.float32), words, t)
