"""LIBERO-Mem's scenes: drawn by the seed alone, and solved by the scripted expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.libero_mem.tasks import TASKS
from ipvla.sim.simulator import Split
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.suites import load_suite

pytestmark = pytest.mark.slow

Open = Callable[[int], LiberoSimulator]


@pytest.fixture(scope="module")
def opened(standard_cache: Path) -> Iterator[Open]:
    """Number of a task -> a simulator, loaded once."""
    configure(standard_cache, find_assets(standard_cache))
    suite = load_suite("libero_mem", standard_cache)
    loaded: dict[int, LiberoSimulator] = {}

    def open_simulator(number: int) -> LiberoSimulator:
        if number not in loaded:
            made = suite.simulator(TASKS[number - 1].name, 32, profile="fast")
            assert isinstance(made, LiberoSimulator)
            loaded[number] = made
        return loaded[number]

    yield open_simulator
    for simulator in loaded.values():
        simulator.close()


def settled(simulator: LiberoSimulator, seed: int) -> None:
    from ipvla.sim.standard.premises import settle

    simulator.reset(seed)
    settle(simulator)


def play(simulator: LiberoSimulator, seed: int) -> tuple[str, list[int]]:
    """The expert's verdict, and the control steps at which it reached sub-goals."""
    from ipvla.sim.libero_mem.expert import expert

    settled(simulator, seed)
    solver, reached = expert(simulator, seed), [0]
    times = []
    for t in range(simulator.task.horizon):
        outcome = simulator.step(solver.act())
        now = simulator.details()["subgoals_reached"]
        if now > reached[-1]:
            reached.append(now)
            times.append(t)
        if outcome.done:
            break
    return outcome.verdict, times


@pytest.mark.parametrize("number", [2, 7, 8, 9], ids=["lift", "swap", "rotate", "basket"])
def test_the_expert_solves_one_of_each_kind(opened: Open, number: int) -> None:
    simulator = opened(number)
    verdict, times = play(simulator, Split.HELD_OUT.seed(1))
    assert verdict == "success"
    assert len(times) == len(TASKS[number - 1].sequences[0])


def test_who_lifts_on_goes_too_far(opened: Open) -> None:
    """A policy that lifts for ever, as one without memory might, is never right."""
    from ipvla.sim.libero_mem.expert import expert_rng
    from ipvla.sim.libero_mem.problem import SequenceProblem
    from ipvla.sim.standard.geometry import SceneGeometry
    from ipvla.sim.standard.motion import PickAndPlace

    simulator = opened(2)
    settled(simulator, 4)
    problem = simulator.problem
    assert isinstance(problem, SequenceProblem)
    scene = SceneGeometry(problem)
    hand = PickAndPlace(scene, expert_rng(simulator, 4), scene.opening())
    lifts = (hand.put("on", "wine_bottle_1", "plate_2", steps_away=12) for _ in count())
    outcome = simulator.step(hand.rest())
    for action in islice(chain.from_iterable(lifts), 600):
        outcome = simulator.step(action)
        if outcome.done:
            break
    assert outcome.failure
    assert simulator.details()["subgoals_reached"] == 1


def test_layouts_are_the_seeds_and_of_no_other(opened: Open) -> None:
    simulator = opened(2)
    seen = []
    for seed in (5, Split.HELD_OUT.seed(5), 6, 5):
        simulator.reset(seed)
        seen.append(simulator.frame(64))
    np.testing.assert_array_equal(seen[0], seen[3])
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


def test_a_saved_episode_goes_on(opened: Open) -> None:
    from ipvla.sim.libero_mem.expert import expert

    simulator = opened(2)
    settled(simulator, 7)
    solver = expert(simulator, 7)
    for _ in range(40):
        simulator.step(solver.act())
    saved = {name: array.copy() for name, array in simulator.state().items()}
    ahead = [solver.act()] * 25
    first = [simulator.step(action) for action in ahead], simulator.frame(48), simulator.state()["episode"]
    simulator.reset(8)
    simulator.restore(saved)
    again = [simulator.step(action) for action in ahead], simulator.frame(48), simulator.state()["episode"]
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(first[2], again[2])


def test_other_suites_are_refused(opened: Open, tmp_path: Path) -> None:
    from ipvla.sim.libero_mem.expert import expert

    recall = load_suite("recall", tmp_path).simulator("ground_red")
    with pytest.raises(ValueError, match="ground_red is no task of LIBERO's own suites"):
        expert(recall, 0)
    recall.close()
