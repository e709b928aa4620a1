"""The suites by name, and what their results depend on: a new suite is a folder and a line here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ipvla.sim.recall.suite import RECALL
from ipvla.sim.standard.suite import libero_entry
from ipvla.sim.standard.tasks import PRO_SUITES, base_suite
from ipvla.sim.suite import Suite, SuiteEntry, unknown

#: All of their tasks put one object somewhere, which the scripted expert can.
_PICK_AND_PLACE: Final = ("libero_spatial", "libero_object")

SUITES: Final[dict[str, SuiteEntry]] = {
    "recall": RECALL,
    "libero_spatial": libero_entry("libero_spatial", has_expert=True),
    "libero_object": libero_entry("libero_object", has_expert=True),
    "libero_goal": libero_entry("libero_goal"),
    "libero_10": libero_entry("libero_10"),
    "libero_90": libero_entry("libero_90"),
    **{name: libero_entry(name, has_expert=base_suite(name) in _PICK_AND_PLACE) for name in PRO_SUITES},
}


def suite_entry(name: str) -> SuiteEntry:
    """The line of the suite of this name. ValueError if there is none."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def load_suite(name: str, cache_dir: Path) -> Suite:
    """The suite of this name; the files that it generates go under `cache_dir`.

    Raises:
        ValueError: there is no such suite, or its files are missing (`AssetsError`).
    """
    return suite_entry(name).load(cache_dir)


def suites_with_expert() -> tuple[str, ...]:
    """The names of those with a scripted expert."""
    return tuple(name for name, entry in SUITES.items() if entry.facts.has_expert)
