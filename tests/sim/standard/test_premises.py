"""A scene that is no longer what its task says is found before anybody measures success in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.suites import load_suite

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


def test_the_embedded_suite_has_no_published_states(simulator: LiberoSimulator, tmp_path: Path) -> None:
    recall = load_suite("recall", tmp_path).simulator("ground_red")
    assert isinstance(recall, LiberoSimulator)
    with pytest.raises(ValueError, match="ground_red is not of LIBERO's own suites"):
        found(recall, 0)
    recall.close()
