"""What is asked, what lights up and when, without physics."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from ipvla.sim.kitchen_recall.machine import KitchenMachine, draw_cues, draw_instruction
from ipvla.sim.kitchen_recall.tasks import TASKS, KitchenTask, bddl_text, unlisted_task
from ipvla.sim.suites import SUITES, load_suite

BY_NAME = {task.name: task for task in TASKS}
TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
SEEDS = range(600)


def lights(task: KitchenTask, cues: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What is lit at each control step until the arm is free, and a little later."""
    machine = KitchenMachine(task, cues=cues)
    seen = []
    for _ in range(task.locked_steps + 20):
        seen.append(machine.lit)
        machine.advance()
    return seen


@TASK
def test_when_the_arm_comes_free_nothing_tells_what_was_shown(task: KitchenTask) -> None:
    shown = {cues: lights(task, cues) for cues in {draw_cues(task, seed) for seed in SEEDS}}
    assert len(shown) > 2
    after = {tuple(seen[task.shown_steps :]) for seen in shown.values()}
    if task.lasting:
        assert len(after) == len(shown)
    else:
        assert after == {((),) * (task.locked_steps + 20 - task.shown_steps)}
        assert len({tuple(seen) for seen in shown.values()}) == len(shown)
        assert task.shown_steps < task.locked_steps


@TASK
def test_what_is_wanted_is_drawn_uniformly(task: KitchenTask) -> None:
    wanted = Counter(KitchenMachine(task, cues=draw_cues(task, seed)).wanted for seed in SEEDS)
    assert len(wanted) == 3
    assert all(150 < count < 250 for count in wanted.values()), wanted


@TASK
def test_the_first_object_on_a_plate_decides(task: KitchenTask) -> None:
    cues = draw_cues(task, 0)
    right = KitchenMachine(task, cues=cues).program[0]
    for placed in range(3):
        machine = KitchenMachine(task, cues=cues)
        machine.advance(placed)
        assert machine.success == (placed == right)
        assert machine.failure == (placed != right)
        machine.advance(None, raised=True)
        machine.advance(right)
        assert machine.success == (placed == right), "there is no second try"


def test_the_bowl_lights_up_as_often_as_its_plate_says() -> None:
    task = BY_NAME["count_bowl"]
    for plate in range(3):
        seen = lights(task, (plate,))
        rises = sum(bool(now) and not before for before, now in zip([(), *seen], seen, strict=False))
        assert rises == plate + 1
        assert KitchenMachine(task, cues=(plate,)).wanted == (0, plate)


def test_order_asks_for_the_one_at_its_place() -> None:
    for asked, word in enumerate(("first", "second", "last")):
        task = BY_NAME[f"order_{word}"]
        seen = lights(task, (2, 0, 1))
        assert [lit for lit in dict.fromkeys(seen) if lit] == [(2,), (0,), (1,)]
        assert KitchenMachine(task, cues=(2, 0, 1)).wanted == ((2, 0, 1)[asked], 0)


def test_the_control_task_wants_what_recall_wants() -> None:
    shown, recall = BY_NAME["shown_bowl"], BY_NAME["recall_bowl"]
    assert all(draw_cues(shown, seed) == draw_cues(recall, seed) for seed in SEEDS)
    scene = [bddl_text(task).split("(:regions")[1] for task in (shown, recall)]
    assert scene[0] == scene[1]


@TASK
def test_every_phrasing_is_used(task: KitchenTask) -> None:
    assert {draw_instruction(task, seed) for seed in range(60)} == set(task.phrasings)


@TASK
def test_chance_is_a_third_where_something_must_be_remembered(task: KitchenTask) -> None:
    assert task.chance == (0 if task.family == "shown" else 1 / 3)


def test_any_delay_is_to_be_had_and_others_are_refused(standard_cache: Path) -> None:
    suite = load_suite("kitchen_recall", standard_cache)
    task = suite.task("recall_bowl_delay_35")
    assert isinstance(task, KitchenTask)
    assert (task.family, task.delay_steps) == ("delay", 35)
    assert task.horizon - task.locked_steps == BY_NAME["recall_bowl"].horizon - BY_NAME["recall_bowl"].locked_steps
    for steps in (9, 201):
        with pytest.raises(ValueError, match=f"'recall_bowl_delay_{steps}' has a delay of {steps} .* 10 to 200"):
            unlisted_task(f"recall_bowl_delay_{steps}")
    with pytest.raises(ValueError, match=r"no task of suite kitchen_recall\. Did you mean 'recall_bowl'"):
        suite.task("recall_bowls")


def test_a_saved_episode_goes_on(standard_cache: Path) -> None:
    for task, t in product(TASKS, (0, 11, 40)):
        machine, loaded = (KitchenMachine(task, cues=draw_cues(task, 3)) for _ in range(2))
        for _ in range(t):
            machine.advance()
        loaded.load_array(machine.to_array())
        assert (loaded.lit, loaded.locked, loaded.t) == (machine.lit, machine.locked, machine.t)


@pytest.mark.parametrize("name", ["libero_mem", "kitchen_recall"])
def test_the_suites_are_listed_without_assets(name: str) -> None:
    entry = SUITES[name]
    assert entry.tasks()
    assert entry.facts.has_expert
