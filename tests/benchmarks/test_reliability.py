"""The measurements of reliability try what they say, and find what is broken."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.damage import Trials, damaged, hostile_message
from benchmarks.reliability import ReliabilityStudy, measure_actions, measure_messages, targets
from benchmarks.reliability_loaders import LOADERS

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
