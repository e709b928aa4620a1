"""Step costs compare what they claim to compare: one batch, rotating turns, a reading spread over its steps."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evaluators.step_costs import Seconds, StepCostConfig, play, ratios, step_costs, variants
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import HSWConfig
from tests.training.fine_tuning import SENSITIVE, protected

FEW = StepCostConfig(rounds=6, warmup=3, draws=50)
CUT = HSWConfig(beta=0.9, gamma=0.5)


class Recorded:
    """A trainer that writes down what it is asked for; every step of it takes one second more than the last."""

    def __init__(self, name: str, calls: list[tuple[str, object]]) -> None:
        self.name, self.calls, self.steps = name, calls, 0

    def batches(self, count: int) -> list[str]:
        return [f"batch {number}" for number in range(count)]

    def step(self, batch: object) -> Seconds:
        self.calls.append((self.name, batch))
        self.steps += 1
        return {"wall": 2.0 * self.steps, "cpu": 1.0 * self.steps}

    def read(self) -> Seconds:
        self.calls.append(("reading", None))
        return {"wall": 10.0, "cpu": 5.0}


def test_a_round_is_one_step_of_each_on_the_same_batch_in_rotating_order_and_one_reading() -> None:
    calls: list[tuple[str, object]] = []
    trainers = {name: Recorded(name, calls) for name in ("baseline", "method", "thermostat")}
    seconds = play(trainers, FEW)  # type: ignore[arg-type]
    steps = [call for call in calls if call[0] != "reading"]
    rounds = [steps[i : i + 3] for i in range(0, len(steps), 3)]
    assert len(rounds) == 9
    for number, turns in enumerate(rounds):
        assert {batch for _, batch in turns} == {f"batch {number}"}
        assert {name for name, _ in turns} == set(trainers)
    firsts = [turns[0][0] for turns in rounds]
    assert {name: firsts.count(name) for name in trainers} == dict.fromkeys(trainers, 3)
    assert all(following[0] == "reading" for call, following in pairwise(calls) if call[0] == "thermostat")
    assert seconds["cpu"].tolist() == [[n, n, n, 5] for n in range(4, 10)], "the warm-up does not count"
    assert np.array_equal(seconds["wall"], 2 * seconds["cpu"])


def test_ratios_are_of_medians_and_a_reading_is_spread_over_its_steps() -> None:
    seconds = np.tile([1.0, 1.04, 1.5, 0.52], (7, 1))
    seconds[0] = 100.0  # an outlier moves no median
    hsw, thermostat = ratios(seconds, every=25, settings=FEW)
    assert hsw.value == pytest.approx(1.04)
    assert thermostat.value == pytest.approx(1 + 0.52 / 25 / 1.04)


def test_intervals_hold_the_ratio_and_narrow_with_more_rounds() -> None:
    rng = np.random.default_rng(0)
    few, many = (rng.normal([1, 1.1, 1.1, 1], 0.1, (rounds, 4)) for rounds in (20, 2000))
    (wide, _), (narrow, _) = (ratios(seconds, 25, StepCostConfig(draws=500)) for seconds in (few, many))
    assert narrow.low < 1.1 < narrow.high
    assert wide.low < wide.value < wide.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_the_runs_differ_in_protection_alone(tuned: ExperimentConfig) -> None:
    config = protected(tuned, CUT, thermostat=SENSITIVE)
    runs = variants(config)
    assert runs["baseline"] == tuned
    assert runs["thermostat"] == config
    assert runs["method"] == protected(tuned, CUT)
    assert variants(runs["method"])["thermostat"].forgetting.thermostat.every == 25  # type: ignore[union-attr]


def test_what_costs_nothing_to_leave_out_is_refused(tuned: ExperimentConfig) -> None:
    with pytest.raises(ValueError, match="forgetting is None or off; give the method"):
        variants(tuned)
    with pytest.raises(ValueError, match="is None or off"):
        variants(protected(tuned, CUT, enabled=False))
    with pytest.raises(ValueError, match="leave training as it is; lower gamma or beta"):
        variants(protected(tuned, HSWConfig()))
    with pytest.raises(ValueError, match="rounds is 1; it must be at least 2"):
        StepCostConfig(rounds=1)


def test_three_real_runs_are_trained_and_timed(tuned: ExperimentConfig) -> None:
    config = protected(tuned, CUT, thermostat=replace(SENSITIVE, every=3))
    costs = step_costs(config, FEW)
    told = json.loads(json.dumps(costs))
    assert (told["clock"], told["rounds"], told["every"]) == ("cpu", 6, 3)
    assert all(told[name] > 0 for name in told if name.endswith("_ms"))
    assert told["calibration_ms"] > told["reading_ms"], "the reading that ends calibration takes the whole probe"
    for name in ("hsw_step_ratio", "thermostat_step_ratio", "hsw_step_ratio_wall", "thermostat_step_ratio_wall"):
        assert 0 < told[name]["low"] <= told[name]["value"] <= told[name]["high"]
    assert told["thermostat_step_ratio"]["value"] == pytest.approx(
        1 + told["reading_ms"] / 3 / told["method_ms"], rel=1e-6
    )
