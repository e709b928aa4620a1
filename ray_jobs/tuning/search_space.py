"""What a sweep may vary: settings of an experiment by their dotted names, and the values that each may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from ipvla.experiment import ExperimentConfig
from ray_jobs.command_line.settings import SettingError, with_values


@dataclass(frozen=True)
class Dimension:
    """The values that one setting may take: a range, or a few choices.

    Attributes:
        low, high: ends of a range, low < high; whole numbers are drawn if both are written as such.
        log: evenly in the logarithm, for settings whose size is unknown.
        choices: instead of a range, at least two.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError(f"choices {list(self.choices)} and a range; give one of them")
            if len(self.choices) < 2:
                raise ValueError(f"choices is {list(self.choices)}; a sweep needs at least two values")
            return
        if self.low is None or self.high is None:
            raise ValueError(f"a range from {self.low} to {self.high}; give both ends, or choices")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range from {self.low} to {self.high}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range from {self.low}; it must begin above 0")

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def extremes(self) -> tuple[Any, ...]:
        """Values that are refused if any is."""
        return self.choices or (self.low, self.high)

    def domain(self) -> Any:
        """For Ray Tune."""
        if self.choices:
            return tune.choice(list(self.choices))
        if self.is_whole:
            end = self.high + 1  # type: ignore[operator]  # Ray leaves the end out
            return tune.lograndint(self.low, end) if self.log else tune.randint(self.low, end)
        return tune.loguniform(self.low, self.high) if self.log else tune.uniform(self.low, self.high)


def require_usable(space: Mapping[str, Dimension], experiment: ExperimentConfig) -> None:
    """Refuses names and values that the experiment would refuse in some trial.

    Raises:
        SettingError: which setting, and what is wrong with it.
    """
    if not space:
        raise SettingError("space is empty; name at least one setting to vary, with low and high, or choices")
    for name, dimension in space.items():
        for value in dimension.extremes():
            try:
                with_values(experiment, {name: value})
            except SettingError as error:
                raise SettingError(f"space.{name} = {value}: {error}") from None
