"""The kitchen's lights in the simulator: what is shown, that it is gone, and that the expert remembers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.sim.libero import LiberoSimulator, configure
from ipvla.sim.simulator import Split
from ipvla.sim.standard.assets import find_assets
from ipvla.sim.suites import load_suite

pytestmark = pytest.mark.slow

Open = Callable[[str], LiberoSimulator]
WAIT = np.array([0.0] * 6 + [-1.0])
PUSH = np.array([0.5, 0.3, -0.4, 0.0, 0.0, 0.0, -1.0])


@pytest.fixture(scope="module")
def opened(standard_cache: Path) -> Iterator[Open]:
    """Task -> a simulator, loaded once."""
    configure(standard_cache, find_assets(standard_cache))
    suite = load_suite("kitchen_recall", standard_cache)
    loaded: dict[str, LiberoSimulator] = {}

    def open_simulator(task: str) -> LiberoSimulator:
        if task not in loaded:
            made = suite.simulator(task, 48, profile="fast")
            assert isinstance(made, LiberoSimulator)
            loaded[task] = made
        return loaded[task]

    yield open_simulator
    for simulator in loaded.values():
        simulator.close()


def seen(simulator: LiberoSimulator, cues: tuple[int, ...], steps: int = 50) -> list[npt.NDArray[np.generic]]:
    """Picture and state, all that differs between a policy's observations, at each control step of an episode."""
    from ipvla.sim.kitchen_recall.problem import KitchenProblem

    simulator.reset(11)
    problem = simulator.problem
    assert isinstance(problem, KitchenProblem)
    problem.show(cues)
    given = []
    for _ in range(steps):
        observed = simulator.observe()
        given.append(np.concatenate([observed.images["agentview"].ravel(), observed.proprio]))
        simulator.step(PUSH)
    return given


@pytest.mark.parametrize("task", ["recall_bowl", "count_bowl"])
def test_episodes_that_differ_in_the_cue_are_the_same_once_it_is_gone(opened: Open, task: str) -> None:
    simulator = opened(task)
    shown_steps = simulator.task.shown_steps  # type: ignore[attr-defined]
    episodes = [seen(simulator, (cue,)) for cue in range(3)]
    for other in episodes[1:]:
        for t in range(shown_steps, 50):
            np.testing.assert_array_equal(episodes[0][t], other[t])
        assert any(not np.array_equal(episodes[0][t], other[t]) for t in range(shown_steps))


def test_a_locked_arm_does_not_move_and_a_free_one_does(opened: Open) -> None:
    simulator = opened("recall_bowl")
    simulator.reset(3)
    start = simulator.joints()
    for _ in range(simulator.task.locked_steps - 1):  # type: ignore[attr-defined]
        simulator.step(PUSH)
    locked = simulator.frame(96)
    simulator.step(PUSH)
    np.testing.assert_array_equal(simulator.joints(), start)
    for _ in range(6):
        simulator.step(WAIT)
    np.testing.assert_allclose(simulator.joints(), start, atol=2e-3)
    free = simulator.frame(96)
    assert not np.array_equal(locked[-16:], free[-16:]), "the lamp is on"
    for _ in range(6):
        simulator.step(PUSH)
    assert np.abs(simulator.joints() - start).max() > 0.02


@pytest.mark.parametrize("task", ["recall_bowl", "count_bowl"])
def test_the_expert_does_what_was_shown(opened: Open, task: str) -> None:
    from ipvla.sim.kitchen_recall.expert import demonstrate

    simulator = opened(task)
    shown = [demonstrate(simulator, seed) for seed in (0, 1, 0)]
    assert shown[0] is not None
    assert shown[2] is not None
    np.testing.assert_array_equal(shown[0].action, shown[2].action)
    np.testing.assert_array_equal(shown[0].images["agentview"], shown[2].images["agentview"])
    assert len(shown[0]) < simulator.task.horizon / 1.5
    assert shown[1] is None or not np.array_equal(shown[0].images["agentview"][0], shown[1].images["agentview"][0])


def test_another_bowl_is_a_failure(opened: Open) -> None:
    from ipvla.sim.kitchen_recall.expert import expert
    from ipvla.sim.kitchen_recall.problem import KitchenProblem

    simulator = opened("recall_bowl")
    seed = Split.HELD_OUT.seed(2)
    simulator.reset(seed)
    problem = simulator.problem
    assert isinstance(problem, KitchenProblem)
    right = problem.machine.cues
    problem.show(((right[0] + 1) % 3,))
    solver = expert(simulator, seed)
    for _ in range(30):
        simulator.step(solver.act())
    problem.machine.cues = right  # the expert goes on for the bowl that it had begun to reach for
    outcome = simulator.step(solver.act())
    while not outcome.done and simulator.t < simulator.task.horizon:
        outcome = simulator.step(solver.act())
    assert outcome.verdict == "failure"
    assert simulator.details()["placed"] == [(right[0] + 1) % 3]


def test_a_saved_episode_goes_on_with_its_cue(opened: Open) -> None:
    simulator = opened("count_bowl")
    simulator.reset(9)
    for _ in range(13):
        simulator.step(PUSH)
    saved = {name: array.copy() for name, array in simulator.state().items()}

    def ahead() -> list[npt.NDArray[np.uint8]]:
        pictures = []
        for _ in range(40):
            simulator.step(PUSH)
            pictures.append(simulator.frame(32))
        return pictures

    first = ahead()
    simulator.reset(10)
    simulator.restore(saved)
    np.testing.assert_array_equal(first, ahead())


def test_the_hand_has_one_place_to_begin_from(opened: Open) -> None:
    from ipvla.sim.demonstration import Showing
    from ipvla.sim.kitchen_recall.expert import demonstrate

    with pytest.raises(ValueError, match=r"start_offset_m is 0.1; .* give 0"):
        demonstrate(opened("recall_bowl"), 0, Showing(start_offset_m=0.1))
