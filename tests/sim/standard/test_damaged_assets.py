"""Files of LIBERO's packages that are damaged, or of another version: one line each, before anything is played."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.libero import configure
from ipvla.sim.standard import tasks as tasks_module
from ipvla.sim.standard.assets import AssetsError, find_assets
from ipvla.sim.standard.tasks import bddl_file, initial_states, standard_tasks

SUITE, TASK = "libero_object", "pick_up_the_milk_and_place_it_in_the_basket"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more"])
def test_damaged_initial_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    path = tmp_path / "init_files" / SUITE / f"{TASK}.pruned_init"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.setattr(tasks_module, "package_directory", lambda: tmp_path)
    with pytest.raises(
        AssetsError, match=rf"the initial states .*{TASK}.pruned_init cannot be read .*: make assets"
    ):
        initial_states(SUITE, TASK)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[: len(text) // 2], r"milk.bddl is no task file \(.*make assets"),
        (lambda text: "", r"milk.bddl is no task file \(.*make assets"),
        (
            lambda text: text.replace("LIBERO_Floor_Manipulation", "Kitchen"),
            "is of problem 'kitchen'; LIBERO",
        ),
    ],
)
@pytest.mark.slow
def test_a_task_file_that_is_none(standard_cache: Path, tmp_path: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    configure(standard_cache, find_assets(standard_cache))
    from ipvla.sim.standard.problem import StandardProblem

    (task,) = (one for one in standard_tasks(SUITE) if one.name == TASK)
    damaged = tmp_path / "milk.bddl"
    damaged.write_text(change(bddl_file(SUITE, TASK).read_text()))
    with pytest.raises(AssetsError, match=told):
        StandardProblem(damaged, task, initial_states(SUITE, TASK))


@pytest.mark.slow
def test_initial_states_of_another_model(standard_cache: Path) -> None:
    configure(standard_cache, find_assets(standard_cache))
    from ipvla.sim.standard.problem import StandardProblem

    (task,) = (one for one in standard_tasks(SUITE) if one.name == TASK)
    with pytest.raises(AssetsError, match=r"initial states of .*milk.* have 40 numbers, its world has \d+: "):
        StandardProblem(bddl_file(SUITE, TASK), task, np.zeros((50, 40)))
