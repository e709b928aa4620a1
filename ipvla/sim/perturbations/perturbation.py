"""What a perturbation of a suite is: a change per episode, drawn from the episode's task and seed alone.

A dimension is one file of this folder: a `PerturbationConfig` that is registered under its name, and the `Change`
that it draws for an episode. What an evaluation sets is `success.perturbation: {type: camera, level: 3}`.
Source: LIBERO-Plus (arXiv 2510.13626), version 0.1.5 of its package on the index. Its noise and the order of its
tasks are drawn without a seed, and its language is taken from file names; here every draw has a seed, and language
comes from within its task files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import draccus
import numpy as np
import numpy.typing as npt

from ipvla.choices import did_you_mean
from ipvla.sim.perturbations.scene import Scene

#: Those that need no further assets, in the order of LIBERO-Plus' tables.
DIMENSIONS: Final = ("camera", "robot", "language", "light", "noise")
LEVELS: Final = (1, 2, 3, 4, 5)


class Change:
    """Of one episode; what a dimension does not change stays as it is."""

    @property
    def drawn(self) -> Mapping[str, Any]:
        """What was drawn, as JSON values for the episode's record."""
        raise NotImplementedError

    def apply(self, scene: Scene) -> None:
        """Changes the world of an episode that has just begun, before anything settles."""

    def picture(self, picture: npt.NDArray[np.uint8], camera: str, t: int) -> npt.NDArray[np.uint8]:
        """What a camera sees at control step t; both uint8 [S, S, 3], upright."""
        return picture

    def instruction(self, given: str) -> str:
        """What the policy hears."""
        return given


class Perturbation(Protocol):
    """Of one suite."""

    def change(self, task: str, seed: int) -> Change:
        """Of the task's episode of this seed: the same whenever it is asked."""


@dataclass(frozen=True)
class PerturbationConfig(draccus.ChoiceRegistry):
    """A choice by `type`: one of the dimensions of this folder.

    The levels of an episode share their draw: they differ in strength alone.

    Attributes:
        level: strength, 1 to 5.
        seed: another one draws every episode anew.
    """

    #: Part of a result's fingerprint: another one for whatever changes what is drawn.
    version: ClassVar[int] = 1

    level: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"perturbation.level is {self.level}; choose one of 1 to {LEVELS[-1]}")
        if self.seed < 0:
            raise ValueError(f"perturbation.seed is {self.seed}; it must be at least 0")

    @property
    def dimension(self) -> str:
        """The name of the choice."""
        name: str = self.get_choice_name(type(self))
        return name

    def build(self, suite: str) -> Perturbation:
        """For the tasks of this suite.

        Raises:
            AssetsError: a package that it reads is not installed.
        """
        raise NotImplementedError

    def numbers(self, task: str, seed: int) -> np.random.Generator:
        """The random numbers of an episode, the same for every level."""
        return np.random.default_rng([self.seed, seed, zlib.crc32(f"{self.dimension}/{task}".encode())])

    def strength(self, share: float) -> float:
        """In (0, 1]: where the level's fifth of the range is passed by a share in [0, 1] of it."""
        return (self.level - 1 + share) / LEVELS[-1]

    def __str__(self) -> str:
        """As results record it."""
        fields = {"type": self.dimension, "level": self.level, "seed": self.seed, "version": self.version}
        return json.dumps(fields)


def perturbation_config(dimension: str, level: int, seed: int = 0) -> PerturbationConfig:
    """The config of a dimension by its name.

    Raises:
        ValueError: there is no such dimension or level.
    """
    choices = PerturbationConfig.get_known_choices()
    if dimension not in choices:
        raise ValueError(f"{dimension!r} is no dimension of LIBERO-Plus here; {did_you_mean(dimension, choices)}")
    config: PerturbationConfig = choices[dimension](level=level, seed=seed)
    return config


def recorded_perturbation(recorded: str | None) -> PerturbationConfig | None:
    """The perturbation that a result names; None for none. ValueError if it is another one now."""
    if recorded is None:
        return None
    fields = json.loads(recorded)
    config = perturbation_config(fields["type"], fields["level"], fields["seed"])
    if str(config) != recorded:
        raise ValueError(f"perturbation {recorded} is {config} here; replay with what it was played with")
    return config
