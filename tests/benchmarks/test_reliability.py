"""The measurements of reliability try what they say, and find what is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.damage import Trials, damaged, hostile_message
from benchmarks.reliability import ReliabilityStudy, measure_actions, measure_messages, targets
from benchmarks.reliability_loaders import LOADERS
from benchmarks.reliability_runs import killed
from benchmarks.reliability_server import measure_soak

SMALL = ReliabilityStudy(quick=True, messages=200, answers=100)


def test_damage_is_drawn_from_its_generator_alone_and_changes_the_file() -> None:
    content = b'{"a": [1, 2, {"b": null}]}'
    first, again = ([damaged(content, rng) for _ in range(50)] for rng in map(np.random.default_rng, (3, 3)))
    assert first == again
    assert sum(one != content for one in first) > 40
    good = {"prompt": "go", "observation/state": np.zeros(2, np.float32)}
    messages = [[hostile_message(good, rng) for _ in range(50)] for rng in map(np.random.default_rng, (3, 3))]
    assert messages[0] == messages[1]


def test_a_loader_that_raises_something_else_is_found() -> None:
    def broken() -> None:
        raise KeyError("model")

    def long() -> None:
        raise ValueError("two\nlines")

    trials = Trials(ValueError)
    for load in (broken, long, lambda: None, lambda: int("x")):
        trials.load(load)
    assert (trials.count, trials.refused, len(trials.broken)) == (4, 2, 2)


def test_messages_and_actions_are_counted() -> None:
    messages = measure_messages(SMALL)
    assert messages["fuzz_messages"] == 200
    assert messages["fuzz_refused"] > 150
    assert messages["fuzz_crashes"] == 0
    actions = measure_actions(SMALL)
    assert (actions["nan_actions_out"], actions["wrong_memory"]) == (0, 0)
    names = {target.name for target in targets({"messages": messages, "actions": actions})}
    assert {"fuzz_slow", "fuzz_crashes", "nan_actions_out"} <= names


def test_every_kind_of_file_is_good_before_it_is_damaged(tmp_path_factory: pytest.TempPathFactory) -> None:
    for loader in LOADERS.values():
        loader.load(loader.make(tmp_path_factory.mktemp("good")))


def test_what_is_killed_is_started_again_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "counted.txt"
    path.touch()
    counts = killed(
        ["tests.benchmarks.counted", str(path)],
        lambda: len(path.read_text().split()),
        [3, 6, 9],  # every fourth from the second on is the driver's
        np.random.default_rng(0),
        lambda driver: dict.fromkeys(driver.children(), "simulator"),
    )
    assert counts == {"driver": 1, "simulator": 2}
    assert path.read_text().split() == [str(number) for number in range(20)]


def test_a_command_that_fails_by_itself_is_told() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        killed(["tests.benchmarks.counted"], lambda: 0, [], np.random.default_rng(0), lambda driver: {})


@pytest.mark.long
@pytest.mark.slow
def test_a_soak_reads_a_server_that_all_kinds_of_clients_use() -> None:
    soak = measure_soak(0.004, 0, every_s=0.5)
    assert soak["failures"] == []
    assert soak["clients"].get("honest_refused", 0) == 0
    assert min(soak["clients"][name] for name in ("answers", "prompts", "hostile", "connections")) > 0
    assert soak["rss_mb"]["last"] > 50
    (target,) = targets({"soak": soak})
    assert target.value == soak["slope_mb_per_hour"]


def test_what_was_lost_or_open_meets_no_target() -> None:
    chaos = {"episodes": 500, "kills": {"driver": 1, "policy": 20}, "lost": 1, "doubled": 0, "different": 0}
    resume = {"steps": 60, "kills": {"worker": 2}, "resume_bitwise": 0}
    cluster = {"status": {"none": 200, "wrong": 403, "right": 200}, "open_jobs_api": 1}
    found = {one.name: one.met for one in targets({"chaos": chaos, "resume": resume, "cluster": cluster})}
    assert found == {
        **{"chaos_episodes": True, "chaos_kills": True, "chaos_lost": False, "chaos_doubled": True},
        **{"chaos_different": True, "resume_bitwise": False, "open_jobs_api": False},
    }
