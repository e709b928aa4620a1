"""Suites by name. Listing tasks is cheap; only `Suite.simulator` imports the physics engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipvla.choices import did_you_mean
from ipvla.sim.demonstration import Demonstration
from ipvla.sim.expert import Expert
from ipvla.sim.simulator import Simulator, Task
from ipvla.sim.standard.tasks import HORIZONS

SUITES: Final = ("recall", *HORIZONS)
#: Those with a scripted expert.
EXPERT_SUITES: Final = ("recall", "libero_spatial", "libero_object")
#: How pictures are drawn: "exact", as the suite's authors do, or "fast": without anti-aliasing, with coarse
#: shadows and the robot by its collision meshes. Physics are the same. Recall is always drawn as it is.
PROFILES: Final = ("exact", "fast")


@dataclass(frozen=True)
class Suite:
    """A set of tasks that share an engine and a version.

    Attributes:
        name: as in `SUITES`.
        version: results of different versions are not comparable.
        tasks: all of them, in the order of reports.
        build: makes the simulator of a task's name at a camera size, with these cameras, drawn by this profile,
            its world built from this seed.
        unlisted: the task of a name that is not in `tasks`, None if there is none either.
        expert: (simulator at the start of an episode, the episode's seed) -> who solves it; None if nobody does.
        demonstrate: (simulator, seed) -> the expert's demonstration of that episode, None if it failed.
    """

    name: str
    version: str
    tasks: tuple[Task, ...]
    build: Callable[[str, int, Sequence[str], str, int], Simulator]
    unlisted: Callable[[str], Task | None] = lambda name: None
    expert: Callable[[Simulator, int], Expert] | None = None
    demonstrate: Callable[[Simulator, int], Demonstration | None] | None = None

    def task(self, name: str) -> Task:
        """The task of this name, listed or not.

        Raises:
            ValueError: the suite has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        unlisted = self.unlisted(name)
        if unlisted is not None:
            return unlisted
        raise _unknown(f"task of suite {self.name}", name, [task.name for task in self.tasks])

    def simulator(
        self,
        task_name: str,
        camera_size: int = 64,
        cameras: Sequence[str] = ("agentview",),
        profile: str = "exact",
        world_seed: int = 0,
    ) -> Simulator:
        """A world of the task, at some episode; call `reset` for the one you want.

        Args:
            camera_size: side of the pictures that are observed, in pixels.
            cameras: that are observed, by MuJoCo's names.
            profile: of `PROFILES`.
            world_seed: see `ipvla.sim.protocols.Protocol`; Recall has nothing that depends on it.

        Raises:
            ValueError: the suite has no such task, or there is no such profile.
        """
        if profile not in PROFILES:
            raise _unknown("render profile", profile, PROFILES)
        return self.build(self.task(task_name).name, camera_size, cameras, profile, world_seed)


def load_suite(name: str, cache_dir: Path) -> Suite:
    """The suite of this name; the files that it generates go under `cache_dir`.

    Raises:
        ValueError: there is no such suite, or its files are missing (`AssetsError`).
    """
    if name == "recall":
        from ipvla.sim.recall.suite import recall_suite

        return recall_suite(cache_dir)
    if name in HORIZONS:
        from ipvla.sim.standard.suite import standard_suite

        return standard_suite(name, cache_dir)
    raise _unknown("suite", name, SUITES)


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    hint = did_you_mean(name, known)
    return ValueError(f"{name!r} is no {kind}. {hint[0].upper()}{hint[1:]}")
