"""The suites by name: a new one is a folder and a line here, or a settings file (`ipvla.sim.gym.settings`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ipvla.sim.gym.settings import PREFIX, GymSettings
from ipvla.sim.gym.suite import entry_of, gym_entry
from ipvla.sim.kitchen_recall.suite import KITCHEN_RECALL
from ipvla.sim.libero_mem.suite import LIBERO_MEM
from ipvla.sim.recall.suite import RECALL
from ipvla.sim.standard.suite import libero_entry
from ipvla.sim.standard.tasks import PRO_SUITES, base_suite
from ipvla.sim.suite import Suite, SuiteEntry, unknown

#: Of a result's fingerprint: the settings of a suite that has no line here.
SETTINGS: Final = "suite_settings"
#: All of their tasks put one object somewhere, which the scripted expert can.
_PICK_AND_PLACE: Final = ("libero_spatial", "libero_object")

SUITES: Final[dict[str, SuiteEntry]] = {
    "recall": RECALL,
    "libero_spatial": libero_entry("libero_spatial", has_expert=True),
    "libero_object": libero_entry("libero_object", has_expert=True),
    "libero_goal": libero_entry("libero_goal"),
    "libero_10": libero_entry("libero_10"),
    "libero_90": libero_entry("libero_90"),
    "libero_mem": LIBERO_MEM,
    "kitchen_recall": KITCHEN_RECALL,
    **{name: libero_entry(name, has_expert=base_suite(name) in _PICK_AND_PLACE) for name in PRO_SUITES},
}


def suite_entry(name: str) -> SuiteEntry:
    """The line of the suite of this name, or of this settings file (`gym:PATH.yaml`).

    Raises:
        ValueError: there is no such suite, or the file is none of a suite (`GymError`).
    """
    if name.startswith(PREFIX):
        return gym_entry(Path(name.removeprefix(PREFIX)))
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def known_entry(name: str) -> SuiteEntry | None:
    """The same, None for a name that no suite has."""
    return suite_entry(name) if name in SUITES or name.startswith(PREFIX) else None


def recorded_entry(fingerprint: Mapping[str, str]) -> SuiteEntry:
    """The suite that a result is of; its settings, if it has any, are those of then. ValueError as above."""
    if SETTINGS in fingerprint:
        return entry_of(fingerprint["suite"], GymSettings.from_dict(json.loads(fingerprint[SETTINGS])))
    return suite_entry(fingerprint["suite"])


def require_expert(name: str, setting: str) -> None:
    """ValueError if the suite of this name has no scripted expert. Of unknown names it says nothing."""
    entry = known_entry(name)
    if entry is not None and not entry.facts.has_expert:
        choices = (
            "its settings name none"
            if entry.facts.settings
            else f"choose one of {', '.join(suites_with_expert())}"
        )
        raise ValueError(f"{setting}: {name} has no scripted expert; {choices}")


def load_suite(name: str, cache_dir: Path) -> Suite:
    """The suite of this name; the files that it generates go under `cache_dir`.

    Raises:
        ValueError: there is no such suite, or its files are missing (`AssetsError`).
    """
    return suite_entry(name).load(cache_dir)


def suites_with_expert() -> tuple[str, ...]:
    """The names of those with a scripted expert."""
    return tuple(name for name, entry in SUITES.items() if entry.facts.has_expert)
