"""The scripted expert of LIBERO's own suites solves their published initial states, by shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.simulator import Split
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.suite import Suite
from ipvla.sim.suites import load_suite

pytestmark = pytest.mark.slow

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
RAMEKIN = "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate"
DRAWER = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"

Open = Callable[[str, str], LiberoSimulator]


@pytest.fixture(scope="module")
def opened(standard_cache: Path) -> Iterator[Open]:
    """(suite, task) -> a simulator, loaded once."""
    configure(standard_cache, find_assets(standard_cache))
    loaded: dict[tuple[str, str], LiberoSimulator] = {}

    def open_simulator(suite: str, task: str) -> LiberoSimulator:
        if (suite, task) not in loaded:
            loaded[suite, task] = load_suite(suite, standard_cache).simulator(task, 32)  # type: ignore[assignment]
        return loaded[suite, task]

    yield open_simulator
    for simulator in loaded.values():
        simulator.close()


def settled(simulator: LiberoSimulator, seed: int) -> None:
    from ipvla.sim.standard.premises import settle

    simulator.reset(seed)
    settle(simulator)


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_object", SOUP), ("libero_spatial", RAMEKIN), ("libero_spatial", DRAWER)]
)
def test_published_initial_states_are_solved(opened: Open, suite: str, task: str) -> None:
    from ipvla.sim.standard.expert import expert

    simulator = opened(suite, task)
    solved = []
    for trial in range(4):
        seed = Split.HELD_OUT.seed(trial)
        settled(simulator, seed)
        solver = expert(simulator, seed)
        actions = (solver.act() for _ in range(simulator.task.horizon))
        solved.append(any(simulator.step(action).success for action in actions))
    assert sum(solved) >= 3


def test_what_is_narrow_is_taken_across_its_middle_and_what_is_wide_at_its_rim(opened: Open) -> None:
    from ipvla.sim.standard.geometry import SceneGeometry
    from ipvla.sim.standard.grasp import plan_grasp

    def offset(suite: str, task: str, name: str) -> float:
        simulator = opened(suite, task)
        settled(simulator, Split.HELD_OUT.seed(0))
        return float(np.linalg.norm(plan_grasp(SceneGeometry(simulator.problem), name).offset[:2]))  # type: ignore[arg-type]

    assert offset("libero_object", SOUP, "alphabet_soup_1") < 0.01
    assert 0.03 < offset("libero_spatial", RAMEKIN, "akita_black_bowl_1") < 0.07


def test_heights_are_those_of_what_stands_there(opened: Open) -> None:
    from ipvla.sim.standard.geometry import SceneGeometry

    simulator = opened("libero_object", SOUP)
    settled(simulator, Split.HELD_OUT.seed(0))
    scene = SceneGeometry(simulator.problem)  # type: ignore[arg-type]
    can, nowhere = scene.place("alphabet_soup_1"), np.array([0.35, 0.35])
    points = np.array([can[:2], nowhere])
    tall, floor = scene.height(points)
    assert tall == pytest.approx(scene.corners("alphabet_soup_1")[:, 2].max(), abs=4e-3)
    without = scene.height(points, without="alphabet_soup_1")
    np.testing.assert_array_equal(without, [floor, floor])


def test_a_hand_that_would_hit_a_drawer_turns(opened: Open) -> None:
    """In the drawer there is room for the fingers only along its length."""
    from ipvla.sim.standard.geometry import SceneGeometry
    from ipvla.sim.standard.grasp import plan_grasp, turn

    simulator = opened("libero_spatial", DRAWER)
    settled(simulator, Split.HELD_OUT.seed(0))
    scene = SceneGeometry(simulator.problem)  # type: ignore[arg-type]
    grasp = plan_grasp(scene, "akita_black_bowl_1")
    assert abs(turn(scene.opening(), grasp.axis)) > np.radians(20)


def test_demonstrations_of_training_layouts_are_reproducible_and_end_in_success(opened: Open) -> None:
    from ipvla.sim.standard.expert import demonstrate

    simulator = opened("libero_object", SOUP)
    shown = [demonstrate(simulator, seed) for seed in (3, 4, 3)]
    assert shown[0] is not None
    assert shown[2] is not None
    np.testing.assert_array_equal(shown[0].action, shown[2].action)
    np.testing.assert_array_equal(shown[0].images["agentview"], shown[2].images["agentview"])
    assert shown[0].images["agentview"].shape == (len(shown[0].action), 32, 32, 3)
    assert np.abs(shown[0].action).max() <= 1
    assert (shown[0].task, shown[0].family, shown[0].seed) == (SOUP, "libero_object", 3)
    assert shown[0].instruction == "pick up the alphabet soup and place it in the basket"
    assert shown[1] is not None
    pictures = [one.images["agentview"][0] for one in (shown[0], shown[1])]
    assert not np.array_equal(*pictures), "another layout"


def test_what_it_cannot_do_is_refused(opened: Open, standard_cache: Path, tmp_path: Path) -> None:
    from ipvla.sim.standard.expert import expert

    def suite(name: str) -> Suite:
        return load_suite(name, standard_cache)

    assert suite("libero_spatial").expert is not None
    assert suite("libero_goal").expert is suite("libero_goal").demonstrate is None
    recall = load_suite("recall", tmp_path).simulator("ground_red")
    with pytest.raises(ValueError, match="ground_red is no task of LIBERO's own suites"):
        expert(recall, 0)
    recall.close()
    stove = suite("libero_goal").simulator("turn_on_the_stove")
    with pytest.raises(ValueError, match=r"no expert for the goal .*; choose a task that puts one object"):
        expert(stove, 0)
    stove.close()


def test_pictures_are_drawn_as_seldom_as_asked_and_hands_begin_elsewhere(opened: Open) -> None:
    from ipvla.sim.demonstration import Showing
    from ipvla.sim.standard.expert import demonstrate

    simulator = opened("libero_object", SOUP)
    usual, seldom = demonstrate(simulator, 3), demonstrate(simulator, 3, Showing(pictures_every=4))
    assert usual is not None
    assert seldom is not None
    np.testing.assert_array_equal(usual.action, seldom.action)
    np.testing.assert_array_equal(usual.state, seldom.state)
    for t in range(len(usual)):
        np.testing.assert_array_equal(seldom.images["agentview"][t], usual.images["agentview"][t - t % 4])

    starts = [demonstrate(simulator, seed, Showing(8, start_offset_m=0.08)) for seed in (3, 4)]
    moved = [shown.state[0, :3] - usual.state[0, :3] for shown in starts if shown is not None]
    assert len(moved) == 2, "it is solved from there too"
    assert all(0.005 < np.abs(by).max() < 0.09 for by in moved)
    assert not np.allclose(*moved, atol=0.005)
