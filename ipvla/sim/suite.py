"""What a suite is: its facts, which cost nothing to know, and its simulators, which import the physics engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipvla.choices import did_you_mean
from ipvla.contract import Contract
from ipvla.sim.demonstration import Demonstration, Expert, Lead, Showing
from ipvla.sim.perturbations.perturbation import Perturbation
from ipvla.sim.simulator import Simulator, Task

#: How pictures are drawn: "exact", as the suite's authors do, or "fast": without anti-aliasing, with coarse
#: shadows and the robot by its collision meshes. Physics are the same. Recall is always drawn as it is.
PROFILES: Final = ("exact", "fast")


@dataclass(frozen=True)
class SuiteFacts:
    """What the jobs must know of a suite before they open it.

    Attributes:
        default_protocol: by which it is played unless another one is named.
        profiles: of `PROFILES`, those in which it can be drawn.
        contract: on which terms its simulators exchange observations and actions, all their cameras included; None
            compares nothing with policies.
        has_expert: there is a scripted expert, which also demonstrates.
        takes_over: that expert can take over in the middle of an episode.
        publishes_states: initial states of its tasks are published; else held-out layouts are drawn.
        drawing: version of how layouts are drawn, part of what a dataset was collected with; published states have
            no part in it.
        perturbations: of LIBERO-Plus, those that its simulators can play (`ipvla.sim.perturbations`).
        replayable: the same actions lead to the same episode, so videos can be made from a journal.
        packages: name in results -> distribution package whose version physics or pixels depend on.
        environment: environment variables of a process that runs its simulators.
        worlds: tasks that such a process holds open at a time; one more closes the one used longest ago.
        simulator_bytes: that a process with so many worlds takes in memory.
        python: the interpreter of these processes; empty for the one that this process has.
        inspect: finds out whether its simulators can be opened, and returns the versions of what they depend on,
            name -> version, as their processes have them. ValueError in one line if they cannot.
        settings: of a suite that has no line in `ipvla.sim.suites.SUITES` but settings: these, as JSON.
    """

    default_protocol: str = "recall"
    profiles: tuple[str, ...] = ("exact",)
    contract: Contract | None = None
    has_expert: bool = False
    takes_over: bool = False
    publishes_states: bool = False
    drawing: int = 1
    perturbations: tuple[str, ...] = ()
    replayable: bool = True
    packages: Mapping[str, str] = field(default_factory=dict)
    environment: Callable[[], Mapping[str, str]] = dict
    worlds: int = 4
    simulator_bytes: int = 2**30
    python: str = ""
    inspect: Callable[[], Mapping[str, str]] = dict
    settings: str = ""


@dataclass(frozen=True)
class Suite:
    """A set of tasks that share an engine and a version.

    Attributes:
        name: as in `ipvla.sim.suites.SUITES`.
        version: results of different versions are not comparable.
        tasks: all of them, in the order of reports.
        build: makes the simulator of a task's name at a camera size, with these cameras, drawn by this profile,
            its world built from this seed.
        unlisted: the task of a name that is not in `tasks`, None if there is none either.
        expert: (simulator at the start of an episode, the episode's seed) -> who solves it; None if nobody does.
        demonstrate: (simulator, seed, how it is shown) -> the expert's demonstration of that episode, None if it
            failed.
        correct: the same after a learner's first steps; None where the expert cannot take over.
        facts: known without opening it.
        perturb: perturbs the episodes that a simulator begins from now on, or no longer; None where it cannot.
    """

    name: str
    version: str
    tasks: tuple[Task, ...]
    build: Callable[[str, int, Sequence[str], str, int], Simulator]
    unlisted: Callable[[str], Task | None] = lambda name: None
    expert: Callable[[Simulator, int], Expert] | None = None
    demonstrate: Callable[[Simulator, int, Showing], Demonstration | None] | None = None
    correct: Callable[[Simulator, int, Showing, Lead], Demonstration | None] | None = None
    facts: SuiteFacts = field(default_factory=SuiteFacts)
    perturb: Callable[[Simulator, Perturbation | None], None] | None = None

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
        raise unknown(f"task of suite {self.name}", name, [task.name for task in self.tasks])

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
            world_seed: see `ipvla.sim.protocols.EvaluationProtocol`; Recall has nothing that depends on it.

        Raises:
            ValueError: the suite has no such task, or there is no such profile.
        """
        if profile not in PROFILES:
            raise unknown("render profile", profile, PROFILES)
        return self.build(self.task(task_name).name, camera_size, cameras, profile, world_seed)


@dataclass(frozen=True)
class SuiteEntry:
    """A suite's line in `ipvla.sim.suites.SUITES`.

    Attributes:
        name: the suite's.
        load: opens it; the files that it generates go under the directory. ValueError if files are missing.
        tasks: lists those of its tasks that have a name of their own, without files that may be missing.
        facts: the suite's.
    """

    name: str
    load: Callable[[Path], Suite]
    tasks: Callable[[], tuple[Task, ...]]
    facts: SuiteFacts


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that nothing has, with what was probably meant."""
    hint = did_you_mean(name, known)
    return ValueError(f"{name!r} is no {kind}. {hint[0].upper()}{hint[1:]}")
