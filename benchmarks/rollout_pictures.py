"""How far the pictures of profile `fast` are from those of `exact`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.standard.tasks import HORIZONS, standard_tasks

#: Of 255: what an eye sees, and what an edge or another skin of the robot makes.
SEEN_LEVELS: Final = 8
OTHER_LEVELS: Final = 48
_TRIALS = 2
_STEPS = 20  # of random actions, after the picture of the settled scene
_PROTOCOL = load_protocol("oft")


def difference(
    suite: str, camera: str, pairs: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]
) -> dict[str, Any]:
    """Of pairs (fast, exact) of one suite's and camera's pictures, uint8 [H, W, 3].

    Returns:
        `mean_levels` of 255, over pixels and channels of all `pictures`; `worst_levels`, of the picture that
        differs most; shares of pixels, in [0, 1], of which a channel differs by more than `SEEN_LEVELS` (`seen`)
        and by more than `OTHER_LEVELS` (`other`).
    """
    levels = np.stack([np.abs(fast.astype(np.int16) - exact) for fast, exact in pairs])
    means, most = levels.mean((1, 2, 3)), levels.max(-1)
    shares = {"seen": float((most > SEEN_LEVELS).mean()), "other": float((most > OTHER_LEVELS).mean())}
    found = {"mean_levels": float(means.mean()), "worst_levels": float(means.max()), **shares}
    return {"suite": suite, "camera": camera, "pictures": len(pairs), **found}


def measure_pictures(cache_dir: Path, tasks: int) -> list[dict[str, Any]]:
    """Of so many tasks of each suite, spread evenly over it, a suite per process."""
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        told = processes.map(_suite_pictures, repeat(cache_dir), tuple(HORIZONS), repeat(tasks))
        return list(chain.from_iterable(told))


def _suite_pictures(cache_dir: Path, suite: str, tasks: int) -> list[dict[str, Any]]:
    names = [task.name for task in standard_tasks(suite)]
    chosen = [names[round(place)] for place in np.linspace(0, len(names) - 1, min(tasks, len(names)))]
    shown: dict[str, list[Any]] = {camera: [] for camera in _PROTOCOL.cameras}
    for task in chosen:
        fast, exact = (_looks(cache_dir, suite, task, profile) for profile in ("fast", "exact"))
        for camera, pictures in shown.items():
            pictures += [(one[camera], other[camera]) for one, other in zip(fast, exact, strict=True)]
    return [difference(suite, camera, pairs) for camera, pairs in shown.items()]


def _looks(cache_dir: Path, suite: str, task: str, profile: str) -> list[Mapping[str, npt.NDArray[np.uint8]]]:
    """Of each trial the settled scene, and the one after some motion, as they are rendered."""
    played = SuiteSimulators(cache_dir, protocol=_PROTOCOL, profile=profile)(suite, task)
    rendering: Simulator = played.simulator
    actions = np.random.default_rng(0).uniform(-1, 1, (_STEPS, 7))
    looks = []
    for trial in range(_TRIALS):
        played.reset(Split.HELD_OUT.seed(trial))
        looks.append(rendering.observe().images)
        for action in actions:
            played.step(action)
        looks.append(rendering.observe().images)
    played.close()
    return looks
