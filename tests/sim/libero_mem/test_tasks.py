"""LIBERO-Mem's tasks as its files have them, in LIBERO's language."""

from __future__ import annotations

from pathlib import Path

import pytest
from bddl.parsing import scan_tokens

from ipvla.sim.libero_mem.tasks import HORIZON, TASKS, SequenceTask, bddl_text
from ipvla.sim.protocols import load_protocol

TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name.split("_")[2])


def test_names_instructions_and_lengths_are_the_published_ones() -> None:
    assert [len(task.sequences[0]) for task in TASKS] == [1, 1, 3, 3, 5, 7, 3, 4, 2, 2]
    assert [len(task.sequences) for task in TASKS] == [1] * 6 + [2, 1, 2, 2]
    for number, task in enumerate(TASKS, start=1):
        assert task.name == f"KITCHEN_SCENE1_{number}_{task.phrasings[0].replace(' ', '_')}"
        assert task.horizon == HORIZON == load_protocol("libero_mem").horizon("libero_mem", 1)


def test_chance_is_what_lifting_on_with_the_best_fixed_probability_reaches() -> None:
    for task in TASKS[:6]:
        lifts = len(task.sequences[0])
        best = max((p / 1000) ** lifts * (1 - p / 1000) for p in range(1001))
        assert task.chance == pytest.approx(best, rel=1e-3)
    assert all(task.chance == 0 for task in TASKS[6:])


@TASK
def test_every_name_in_a_goal_or_a_beginning_exists(task: SequenceTask) -> None:
    things = {name for _, names in task.objects for name in names}
    regions = {name for name, _ in task.regions}
    assert {thing for thing, _ in task.initial} == things
    assert {where for _, where in task.initial} <= things | regions
    for sequence in task.sequences:
        for relation, thing, where in sequence:
            assert relation in ("on", "in")
            assert thing in things
            assert where.removeprefix("kitchen_table_").removesuffix("_contain_region") in things | regions


@TASK
def test_liberos_parser_reads_the_file(task: SequenceTask, tmp_path: Path) -> None:
    file = tmp_path / "task.bddl"
    file.write_text(bddl_text(task))
    _, *groups = scan_tokens(filename=str(file))
    parsed = {group[0]: group[1:] for group in groups}
    assert " ".join(parsed[":language"]) == task.phrasings[0]
    ranges = {region[0]: region[2][1][0] for region in parsed[":regions"] if len(region) > 2}
    assert {name: tuple(map(float, ranges[name])) for name, _ in task.regions} == dict(task.regions)
    begin = [f"{thing} {where.removeprefix('kitchen_table_')}" for _, thing, where in parsed[":init"]]
    cabinet = ["wooden_cabinet_1 cabinet_region"] if task.cabinet else []
    assert begin == [*cabinet, *map(" ".join, task.initial)]
    things = [word for word in parsed[":objects"] if word[-1].isdigit()]
    assert things == [name for _, names in task.objects for name in names]
