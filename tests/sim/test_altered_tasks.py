"""The scene of a task with another goal, or other words: one world, judged twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ipvla.sim.altered_tasks import goal_of, scene_of, swapped_name
from ipvla.sim.demonstration import Expert
from ipvla.sim.instructions.sets import instruction_set
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.recall.expert import expert
from ipvla.sim.recall.tasks import TASKS, RecallTask, unlisted_task
from ipvla.sim.simulator import Simulator, Split, StepOutcome
from ipvla.sim.standard.tasks import unlisted_task as unlisted_of_libero
from ipvla.sim.suite import Suite
from ipvla.sim.suites import load_suite

SimulatorOf = Callable[[str], LiberoSimulator]
PAIRS = [
    ("ground_blue", "ground_red"),
    ("ground_red", "ground_yellow"),
    ("count_red1_blue1", "count_red2_blue1"),
    ("count_red2_blue1", "count_red1_blue1"),
]
SEEDS = [Split.HELD_OUT.seed(trial) for trial in range(3)]


def played(simulator: Simulator, seed: int, actions: np.ndarray | None = None) -> tuple[StepOutcome, np.ndarray]:
    """The episode of this seed, by the expert, or by these actions and then the last of them again."""
    simulator.reset(seed)
    solver: Expert = expert(simulator, seed)
    outcome, done = StepOutcome(success=False, failure=False), []
    while not outcome.done and simulator.t < simulator.task.horizon:
        action = solver.act() if actions is None else actions[min(len(done), len(actions) - 1)]
        outcome = simulator.step(action)
        done.append(action)
    return outcome, np.array(done)


@pytest.mark.slow
@pytest.mark.parametrize(("goal", "scene"), PAIRS)
def test_who_hears_reaches_the_instructed_goal_and_not_the_scenes(
    simulator_of: SimulatorOf, goal: str, scene: str
) -> None:
    for seed in SEEDS:
        swapped = simulator_of(swapped_name(goal, scene))
        outcome, _ = played(swapped, seed)
        assert outcome.success
        assert swapped.details()["scene_goal"] is False


@pytest.mark.slow
@pytest.mark.parametrize(("goal", "scene"), PAIRS)
def test_who_does_not_hear_does_what_the_scene_always_wanted(
    simulator_of: SimulatorOf, goal: str, scene: str
) -> None:
    """It plays what it would play without the swap: the world is the same, so that is the same motion."""
    for seed in SEEDS:
        outcome, actions = played(simulator_of(scene), seed)
        assert outcome.success
        swapped = simulator_of(swapped_name(goal, scene))
        outcome, again = played(swapped, seed, actions)
        assert outcome.failure
        assert not outcome.success
        assert swapped.details()["scene_goal"] is True
        assert len(again) == len(actions), "it ends when the scene's goal is reached, not at the first wrong press"


@pytest.mark.slow
def test_the_same_seed_is_the_same_world_with_other_words(simulator_of: SimulatorOf) -> None:
    plain, swapped = simulator_of("ground_red"), simulator_of("ground_blue-in-ground_red")
    said = simulator_of("ground_red-said-object")
    words = instruction_set("recall").find("press the red button")
    assert words is not None
    heard = set()
    for trial in range(12):
        for simulator in (plain, swapped, said):
            simulator.reset(Split.HELD_OUT.seed(trial))
        seen = [simulator.observe() for simulator in (plain, swapped, said)]
        for other in seen[1:]:
            np.testing.assert_array_equal(other.images["agentview"], seen[0].images["agentview"])
            np.testing.assert_array_equal(other.proprio, seen[0].proprio)
        assert "red" in seen[0].instruction
        assert "blue" in seen[1].instruction
        heard.add(seen[2].instruction)
    assert heard == set(words.synonyms["object"])


@pytest.mark.slow
def test_an_episode_goes_on_elsewhere_with_both_judgements(simulator_of: SimulatorOf) -> None:
    """Saved in the middle, after a press that is right for the scene and wrong for the instruction."""
    plain, swapped = simulator_of("count_red2_blue1"), simulator_of("count_red1_blue1-in-count_red2_blue1")
    _, actions = played(plain, SEEDS[0])
    swapped.reset(SEEDS[0])
    problem = swapped.problem
    done = 0
    while not problem.machine.failure:  # type: ignore[attr-defined]
        swapped.step(actions[done])
        done += 1
    assert done < len(actions)
    saved = swapped.state()
    swapped.reset(SEEDS[1])
    swapped.restore(saved)
    for action in actions[done:]:
        outcome = swapped.step(action)
    assert outcome.failure
    assert swapped.details()["scene_goal"] is True
    assert swapped.details()["pressed"] == ["red_button_1", "red_button_1", "blue_button_1"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ground_red-in-ground_red", "is what 'ground_red' demands anyway"),
        (
            "ground_yellow-in-ground_red",
            "cannot be done in the scene of 'ground_red'.* has red_button, green_button",
        ),
        ("recall-in-ground_red", "both must say which buttons to press"),
        ("ground_rd-in-ground_red", "'ground_rd' is no task of suite recall; did you mean 'ground_red'"),
        ("ground_red-said-colour", "no paraphrases 'colour'; choose action or object"),
        ("place-said-action", r"recall\.yaml has no action synonyms of 'put the red cube in the bowl'"),
    ],
)
def test_a_goal_that_the_scene_does_not_allow_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unlisted_task(name)


def test_names_tell_scene_and_goal() -> None:
    name = swapped_name("ground_blue", "ground_red")
    assert (goal_of(name), scene_of(name)) == ("ground_blue", "ground_red")
    assert (goal_of("recall"), scene_of("recall")) == ("recall", "recall")
    assert (goal_of("recall-said-object"), scene_of("recall-said-object")) == ("recall", "recall")
    assert not [task.name for task in TASKS if "-" in task.name]
    task = unlisted_task(name)
    assert isinstance(task, RecallTask)
    assert (task.family, task.chance, task.scene_program) == ("goal_swap", 1 / 3, (0,))


PLATE, STOVE = "put_the_bowl_on_the_plate", "put_the_bowl_on_the_stove"


@pytest.mark.parametrize(
    ("suite", "name", "reason"),
    [
        ("libero_goal", f"{PLATE}-in-{PLATE}", "demands anyway"),
        ("libero_goal", f"{PLATE}-in-put_the_bowl_on_the_stov", "did you mean 'put_the_bowl_on_the_stove'"),
        (
            "libero_object",
            "pick_up_the_milk_and_place_it_in_the_basket-in-pick_up_the_butter_and_place_it_in_the_basket",
            "which has no milk_1",
        ),
    ],
)
def test_goals_that_a_scene_of_libero_does_not_allow(suite: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unlisted_of_libero(suite, name)


@pytest.mark.parametrize("suite", ["libero_goal", "libero_object"])
def test_all_opposites_of_liberos_sets_can_be_played(suite: str) -> None:
    for wording in instruction_set(suite).wordings:
        scene = wording.instruction.replace(" ", "_")
        for text in wording.opposites:
            task = unlisted_of_libero(suite, swapped_name(text.replace(" ", "_"), scene))
            assert task is not None
            assert task.phrasings == (text,)


@pytest.fixture(scope="module")
def goal_suite(standard_cache: Path) -> Suite:
    return load_suite("libero_goal", standard_cache)


@pytest.fixture(scope="module")
def swapped_plate(goal_suite: Suite) -> Iterator[LiberoSimulator]:
    """Put the bowl on the plate, in the scene that wants it on the stove."""
    simulator = goal_suite.simulator(swapped_name(PLATE, STOVE), 64, profile="fast")
    assert isinstance(simulator, LiberoSimulator)
    yield simulator
    simulator.close()


def settled_on(simulator: LiberoSimulator, target: str) -> StepOutcome:
    """The bowl, let go just above a place, a second later."""
    from ipvla.sim.standard.geometry import SceneGeometry

    problem = simulator.problem
    place = SceneGeometry(problem).place(target)  # type: ignore[arg-type]
    (joint,) = problem.env.get_object("akita_black_bowl_1").joints  # type: ignore[attr-defined]
    pose = np.array(problem.sim.data.get_joint_qpos(joint))
    pose[:3] = place + np.array([0.0, 0.0, 0.03])
    problem.sim.data.set_joint_qpos(joint, pose)
    outcome = StepOutcome(success=False, failure=False)
    for _ in range(20):
        outcome = simulator.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    return outcome


@pytest.mark.slow
def test_both_goals_of_libero_are_judged_in_one_world(swapped_plate: LiberoSimulator) -> None:
    """The world is set by hand, in a published initial state of the scene."""
    swapped_plate.reset(SEEDS[0])
    assert swapped_plate.observe().instruction == "put the bowl on the plate"
    assert swapped_plate.details() == {"scene_goal": False}
    assert not swapped_plate.step(np.zeros(7)).success

    assert settled_on(swapped_plate, "plate_1").success, "as instructed"
    assert swapped_plate.details() == {"scene_goal": False}

    swapped_plate.reset(SEEDS[0])
    assert not settled_on(swapped_plate, "flat_stove_1_cook_region").success
    assert swapped_plate.details() == {"scene_goal": True}, "what the scene always wanted"
    saved = swapped_plate.state()
    assert settled_on(swapped_plate, "plate_1").success
    assert swapped_plate.details() == {"scene_goal": True}, "it was reached, and remains so"
    swapped_plate.reset(SEEDS[1])
    assert swapped_plate.details() == {"scene_goal": False}
    swapped_plate.restore(saved)
    assert swapped_plate.details() == {"scene_goal": True}


CHEESE = "put_the_cream_cheese_in_the_bowl"


def played_in_libero(
    suite: Suite, name: str, actions: list[np.ndarray] | None = None
) -> tuple[bool, bool, list[np.ndarray]]:
    """Success, whether the scene's own goal was reached, and what was played: by the expert, or these actions."""
    from ipvla.sim.standard.expert import expert as of_libero
    from ipvla.sim.standard.premises import settle

    simulator = suite.simulator(name, 64, profile="fast")
    simulator.reset(SEEDS[0])
    settle(simulator)
    solver = of_libero(simulator, SEEDS[0])
    outcome, done = StepOutcome(success=False, failure=False), list[np.ndarray]()
    while not outcome.done and len(done) < (200 if actions is None else len(actions)):
        done.append(solver.act() if actions is None else actions[len(done)])
        outcome = simulator.step(done[-1])
    details = simulator.details()
    simulator.close()
    return outcome.success, bool(details.get("scene_goal")), done


@pytest.mark.slow
def test_in_libero_too_the_instruction_alone_tells_who_hears(goal_suite: Suite) -> None:
    """The expert reads the goal that is to be reached; who is deaf moves as it does in the plain scene."""
    success, old, _ = played_in_libero(goal_suite, swapped_name(CHEESE, PLATE))
    assert (success, old) == (True, False)
    success, _, actions = played_in_libero(goal_suite, CHEESE)
    assert success
    success, old, _ = played_in_libero(goal_suite, swapped_name(PLATE, CHEESE), actions)
    assert (success, old) == (False, True)
