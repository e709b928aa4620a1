"""A scene that is no longer what its task says is found before anybody measures success in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.standard.assets import assets_version, find_assets
from ipvla.sim.standard.tasks import HORIZONS, standard_tasks
from ipvla.sim.suites import load_suite
from ray_jobs import doctor
from ray_jobs.doctor import VISIBLE_LEVELS

pytestmark = pytest.mark.slow

TASK = "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate"


@pytest.fixture(scope="module")
def simulator(standard_cache: Path) -> Iterator[LiberoSimulator]:
    built = load_suite("libero_spatial", standard_cache).simulator(TASK)
    assert isinstance(built, LiberoSimulator)
    yield built
    built.close()


def found(simulator: LiberoSimulator, trial: int) -> list[str]:
    from ipvla.sim.standard.premises import violations

    return [violation.what for violation in violations(simulator, trial)]


def test_with_the_pinned_physics_the_bowl_is_on_the_ramekin(simulator: LiberoSimulator) -> None:
    assert [found(simulator, trial) for trial in range(0, 50, 7)] == [[]] * 8


def test_a_bowl_that_falls_beside_the_ramekin_is_found(
    simulator: LiberoSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = simulator.problem
    states = problem._initial_states.copy()  # type: ignore[attr-defined]
    (joint,) = problem._env.objects_dict["akita_black_bowl_1"].joints  # type: ignore[attr-defined]
    address, _ = problem.sim.model.get_joint_qpos_addr(joint)
    states[4, 1 + address] += 0.12
    monkeypatch.setattr(problem, "_initial_states", states)
    assert found(simulator, 3) == []
    assert "(on akita_black_bowl_1 glazed_rim_porcelain_ramekin_1) does not hold" in found(simulator, 4)


def test_a_scene_that_looks_otherwise_is_found(simulator: LiberoSimulator, standard_cache: Path) -> None:
    from ipvla.sim.standard.golden import golden, take

    assets = assets_version(find_assets(standard_cache))
    kept = golden().frames[f"libero_spatial/{TASK}"]
    assert kept.assets == assets, "golden pictures are of the packages' assets"
    assert take(simulator, assets).difference(kept) < VISIBLE_LEVELS / 4
    light = simulator.problem.sim.model.vis.headlight
    before = light.diffuse.copy()
    light.diffuse[:] *= 0.8
    darker = take(simulator, assets)
    light.diffuse[:] = before
    assert darker.sha256 != kept.sha256
    assert darker.difference(kept) > VISIBLE_LEVELS


def test_every_task_is_known(simulator: LiberoSimulator) -> None:
    from ipvla.sim.standard.golden import golden

    tasks = {f"{suite}/{task.name}" for suite in HORIZONS for task in standard_tasks(suite)}
    assert set(golden().frames) == tasks
    assert {state.rpartition("/")[0] for state in golden().violated} < tasks


def test_only_what_was_right_before_is_an_error() -> None:
    from ipvla.sim.standard.golden import Frame, Golden

    def compared(shade: int, violated: set[str]) -> doctor.Finding:
        frame = Frame(f"{shade}", np.full((16, 16, 3), shade, np.uint8))
        found = Golden({"s/t": frame}, frozenset(violated))
        return doctor._compared(found, known, 50, {state: f"{state} fell" for state in violated})

    known = Golden({"s/t": Frame("100", np.full((16, 16, 3), 100, np.uint8))}, frozenset({"s/t/3"}))
    fine = compared(100, {"s/t/3"})
    assert fine.status is doctor.Status.OK
    assert "1 of them never were" in fine.detail
    assert "1 of 1 pictures" in fine.detail
    assert "0 of 1 pictures" in compared(101, set()).detail, "another renderer"
    assert "look otherwise, by up to 5.0 of 255 levels: s/t" in compared(105, set()).detail
    assert "pinned mujoco" not in compared(105, set()).remedy, "physics is as published"
    broken = compared(100, {"s/t/3", "s/t/4"})
    assert (broken.status, "s/t/4 fell" in broken.detail) == (doctor.Status.FAIL, True)


def test_pictures_of_other_assets_are_not_compared(simulator: LiberoSimulator) -> None:
    from ipvla.sim.standard.golden import Frame, Golden

    def shown(assets: str) -> Golden:
        return Golden({"s/t": Frame("1", np.full((16, 16, 3), len(assets), np.uint8), assets)})

    finding = doctor._compared(shown("theirs and more"), shown("golden"), 50, {})
    assert finding.status is doctor.Status.WARN
    assert "pictures are of assets theirs and more, the golden ones of golden" in finding.detail
    assert "make assets" in finding.remedy


def test_the_embedded_suite_has_no_published_states(simulator: LiberoSimulator, tmp_path: Path) -> None:
    recall = load_suite("recall", tmp_path).simulator("ground_red")
    assert isinstance(recall, LiberoSimulator)
    with pytest.raises(ValueError, match="ground_red is not of LIBERO's own suites"):
        found(recall, 0)
    recall.close()
