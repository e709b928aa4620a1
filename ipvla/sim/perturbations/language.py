"""The task is said otherwise: by one of the 50 instructions that LIBERO-Plus has for every task.

They come from within its task files (`_language_{n}`). Which of them are harder, the files do not say: a level is
a fifth of them in the order of how many words they share with the task's own instruction, the likest first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from ipvla.sim.altered_tasks import goal_of
from ipvla.sim.perturbations.perturbation import LEVELS, Change, PerturbationConfig
from ipvla.sim.standard.assets import AssetsError
from ipvla.sim.standard.tasks import base_suite, instruction, instruction_within

#: Where `make assets` installs LIBERO-Plus' package; only its task files are read.
PLUS_ROOT: Final = Path(sys.prefix) / "libero_plus" / "liberoplus" / "liberoplus"
_INSTRUCTIONS: Final = 50
_PER_LEVEL: Final = _INSTRUCTIONS // len(LEVELS)


@dataclass(frozen=True)
class Wording(Change):
    """`text` instead of the task's own; `number` as in LIBERO-Plus' file name."""

    number: int
    text: str

    @property
    def drawn(self) -> Mapping[str, Any]:
        return {"language": self.number, "instruction": self.text}

    def instruction(self, given: str) -> str:
        return self.text


@PerturbationConfig.register_subclass("language")
@dataclass(frozen=True)
class LanguageConfig(PerturbationConfig):
    """The instruction is another one, the less like the task's own the higher the level."""

    def build(self, suite: str) -> Rewordings:
        """Of a suite's tasks.

        Raises:
            AssetsError: LIBERO-Plus' package is not installed.
        """
        directory = PLUS_ROOT / "bddl_files" / base_suite(suite)
        if not directory.is_dir():
            raise AssetsError(
                f"perturbation language of suite {suite} needs LIBERO-Plus' task files, and {PLUS_ROOT} has none; "
                "run make assets"
            )
        return Rewordings(self, directory)


@dataclass(frozen=True)
class Rewordings:
    """A suite's instructions; `directory` has its task files."""

    config: LanguageConfig
    directory: Path

    def change(self, task: str, seed: int) -> Wording:
        """Of an episode.

        Raises:
            AssetsError: files of the task are missing.
        """
        first = (self.config.level - 1) * _PER_LEVEL
        candidates = instructions(self.directory, goal_of(task))[first : first + _PER_LEVEL]
        return candidates[self.config.numbers(task, seed).integers(_PER_LEVEL)]


@cache
def instructions(directory: Path, task: str) -> tuple[Wording, ...]:
    """The task's 50, the likest first; of equally like ones in the order of their files.

    Raises:
        AssetsError: some of them are missing.
    """
    files = {number: directory / f"{task}_language_{number}.bddl" for number in range(1, _INSTRUCTIONS + 1)}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise AssetsError(f"{directory} lacks {len(missing)} task files, such as {missing[0]}; run make assets")
    found = [Wording(number, instruction_within(path)) for number, path in files.items()]
    return tuple(sorted(found, key=lambda wording: (-likeness(wording.text, instruction(task)), wording.number)))


def likeness(one: str, other: str) -> float:
    """Words that two texts share among all of theirs, in [0, 1], whatever their case (Jaccard's index)."""
    words, others = set(one.lower().split()), set(other.lower().split())
    return len(words & others) / len(words | others)
