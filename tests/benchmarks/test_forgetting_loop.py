"""The Thermostat's controls spend what the closed loop spent; the step response changes nothing but the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.forgetting_loop import (
    CLOSED,
    OPEN,
    Line,
    Response,
    StepConfig,
    best_constant,
    controls,
    plot_response,
    respond,
    response,
    trace,
    write_conflicting,
)
from ipvla.data.rlds import EpisodeDataset
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting.thermostat import ThermostatConfig, ThermostatState
from ipvla.training.surgery import HSWSurgeryConfig
from tests.training.fine_tuning import SENSITIVE, protected

THERMOSTAT = ThermostatConfig(every=5, calibration=2)
PLAN = StepConfig(steps=(30, 30, 30), constants=(0.5, 1.0), log_every=5)
strengths = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(tuple)


def run(strengths: Sequence[float], every: int = 5, calibration: int = 2) -> list[Line]:
    """Metrics of a run whose readings after calibration set these strengths; one more comes at its last step."""
    lines: list[Line] = []
    for reading, strength in enumerate([*[0.0] * calibration, *strengths, 0.123], start=1):
        lines.append({"step": reading * every, "probe/d": 0.1, "gain/strength": strength})
        lines.append({"step": reading * every, "train/loss": 1.0})
    return lines


@settings(max_examples=30, deadline=None)
@given(strengths)
def test_a_trace_is_what_was_in_force_after_calibration(of_loop: tuple[float, ...]) -> None:
    assert trace(run(of_loop), THERMOSTAT, steps=5 * (3 + len(of_loop))) == of_loop


@settings(max_examples=30, deadline=None)
@given(strengths, st.integers(0, 1000))
def test_controls_spend_what_the_loop_spent(of_loop: tuple[float, ...], seed: int) -> None:
    made = controls(of_loop, THERMOSTAT, seed)
    assert made == controls(of_loop, THERMOSTAT, seed)
    played = {}
    for name, settings_ in made.items():
        thermostat, state, played[name] = settings_.build(), ThermostatState(), []
        for reading in range(2 + len(of_loop)):
            state, _ = thermostat.step(state, 7.0 * reading, 0.1)
            played[name].append(state.strength)
    assert played["mean"][:2] == played["shuffled"][:2] == [0, 0], "calibration is left as it was"
    assert sorted(played["shuffled"][2:]) == sorted(of_loop)
    assert played["mean"][2:] == pytest.approx([np.mean(of_loop)] * len(of_loop))


def test_controls_differ_from_the_loop_in_nothing_else() -> None:
    of_loop = tuple(np.linspace(0, 1, 20).tolist())
    one, other = (controls(of_loop, THERMOSTAT, seed)["shuffled"] for seed in (0, 1))
    assert len({of_loop, one.strengths, other.strengths}) == 3
    assert replace(one, mode="proportional", strengths=()) == THERMOSTAT


def test_a_trace_that_cannot_be_replayed_fairly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps is 31, not a multiple of thermostat\.every 5"):
        trace(run([0.5]), THERMOSTAT, steps=31)
    with pytest.raises(ValueError, match=r"no reading at steps \[25\]"):
        trace(run([0.5]), THERMOSTAT, steps=30)
    with pytest.raises(ValueError, match="no reading acted: 2 before step 15, of which calibration takes 2"):
        trace(run([]), THERMOSTAT, steps=15)
    with pytest.raises(ValueError, match="no strengths"):
        controls((), THERMOSTAT, seed=0)


def closed_loop(config: ExperimentConfig) -> ExperimentConfig:
    return protected(config, HSWSurgeryConfig(), thermostat=SENSITIVE)


class TestPlan:
    def test_phases_are_new_conflicting_new(self) -> None:
        assert PLAN.phases == (("yellow", 1, 30), ("yellow_mirrored", 31, 60), ("yellow", 61, 90))

    def test_arms_differ_in_the_thermostat_alone_and_keep_the_learning_rate(self, tuned: ExperimentConfig) -> None:
        arms = PLAN.arms(closed_loop(tuned))
        assert list(arms) == [OPEN, "constant 0.5", "constant 1", CLOSED]
        found = {name: arm.forgetting.thermostat for name, arm in arms.items()}  # type: ignore[union-attr]
        assert found[CLOSED] == SENSITIVE
        assert found[OPEN] == replace(SENSITIVE, mode="replay", strengths=(0.0,))
        assert found["constant 0.5"] == replace(SENSITIVE, mode="replay", strengths=(0.5,))
        assert len({str(replace(arm, forgetting=None)) for arm in arms.values()}) == 1
        optimizer = arms[OPEN].optimizer
        assert optimizer.learning_rate(89, 90) == optimizer.learning_rate(30, 31) == optimizer.lr

    def test_what_is_no_closed_loop_or_does_not_fit_it_is_refused(self, tuned: ExperimentConfig) -> None:
        config = closed_loop(tuned)
        with pytest.raises(ValueError, match=r"needs an experiment with forgetting\.thermostat"):
            PLAN.arms(tuned)
        with pytest.raises(ValueError, match="in a closed loop"):
            PLAN.arms(PLAN.arms(config)[OPEN])
        slow = protected(tuned, HSWSurgeryConfig(), thermostat=replace(SENSITIVE, every=7))
        with pytest.raises(ValueError, match=r"\[30, 30, 30\]; make each a multiple of thermostat\.every 7"):
            PLAN.arms(slow)
        with pytest.raises(ValueError, match="calibration ends at step 2, the first phase at 2"):
            replace(PLAN, steps=(2, 30, 30)).arms(config)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"steps": (0, 1, 1)}, "every phase must take at least 1"),
            ({"constants": (0.0,)}, r"all in \(0, 1\]"),
            ({"constants": ()}, "at least one"),
            ({"log_every": 0}, "log_every is 0"),
        ],
    )
    def test_bad_plans_are_refused(self, wrong: Mapping[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StepConfig(**wrong)  # type: ignore[arg-type]


def stepped(rise: float, loss: float, strength: float = 0.5) -> list[Line]:
    """Metrics over PLAN's phases: drift 0.1, then up by `rise`, at first by 0.05 more, then 0.1 again."""
    lines: list[Line] = []
    for step in range(5, 91, 5):
        conflicting = 30 < step <= 60
        d = 0.1 + (rise + 0.05 * (step == 35) if conflicting else 0.0)
        gains = {"gain/strength": strength * (step > 10), "gain/beta": 0.9, "gain/gamma": 1 - strength}
        lines.append({"step": step, "probe/d": d, **gains})
        lines.append({"step": step, "train/loss": 2 * loss if conflicting else loss, **gains})
    return lines


class TestResponse:
    def test_it_is_what_each_phase_came_to(self) -> None:
        seen = response(stepped(rise=0.3, loss=0.2), PLAN, THERMOSTAT)
        expected = {
            "before_d": 0.1, "conflict_d": 0.4, "after_d": 0.1, "peak_d": 0.45,
            "conflict_loss": 0.4, "new_loss": 0.2, "strength": 0.5,
        }  # fmt: skip
        assert vars(seen) == pytest.approx(expected)

    def test_a_run_that_did_not_finish_is_refused(self) -> None:
        unfinished = [line for line in stepped(0.3, 0.2) if line["step"] <= 60]
        with pytest.raises(ValueError, match="no probe/d at steps 81 to 90"):
            response(unfinished, PLAN, THERMOSTAT)

    def test_the_best_constant_has_learned_as_much_and_drifts_least(self) -> None:
        def arm(rise: float, loss: float) -> Response:
            return response(stepped(rise, loss), PLAN, THERMOSTAT)

        arms = {
            OPEN: arm(0.5, 0.1),
            "weak": arm(0.4, 0.1),
            "middle": arm(0.3, 0.101),
            "strong": arm(0.1, 0.2),
            CLOSED: arm(0.2, 0.1),
        }
        assert best_constant(arms) == "middle"
        assert best_constant(arms, tolerance=0.001) == "weak"
        assert best_constant({**arms, CLOSED: arm(0.2, 0.05)}) == "weak", "none as good: the one that learned best"
        with pytest.raises(ValueError, match="play constant strengths too"):
            best_constant({OPEN: arms[OPEN], CLOSED: arms[CLOSED]})

    def test_it_is_plotted(self, tmp_path: Path) -> None:
        seeds = [stepped(0.3, 0.2), stepped(0.4, 0.3)]
        plot_response({OPEN: seeds, "constant 0.5": seeds, CLOSED: seeds}, PLAN, tmp_path / "loop.png")
        assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")


class TestRun:
    PLAN = StepConfig(new="cue", conflicting="cue_mirrored", steps=(4, 3, 3), constants=(1.0,), log_every=1)

    def test_the_conflicting_data_are_the_new_tasks_with_the_hand_going_the_other_way(
        self,
        tuned: ExperimentConfig,
    ) -> None:
        directory = write_conflicting(tuned.datasets, self.PLAN)
        assert write_conflicting(tuned.datasets, self.PLAN) == directory, "written once"
        one, other = replace(tuned.data, dataset="cue").build(tuned.datasets), EpisodeDataset(directory)
        assert len(one) == len(other)
        for index in (0, len(one) - 1):
            ours, theirs = one.episode(index), other.episode(index)
            assert np.array_equal(ours.action * [-1, -1, 1, 1, 1, 1, 1], theirs.action)
            assert (ours.instruction, ours.reasoning) == (theirs.instruction, theirs.reasoning)
            assert np.array_equal(ours.state, theirs.state)
            assert np.array_equal(one.frame(index, 3, "agentview"), other.frame(index, 3, "agentview"))

    def test_all_arms_are_one_run_until_the_loop_acts(self, tuned: ExperimentConfig, tmp_path: Path) -> None:
        write_conflicting(tuned.datasets, self.PLAN)
        arms = self.PLAN.arms(closed_loop(tuned))
        ran = {name: respond(arm, self.PLAN, tmp_path / f"{name}.json") for name, arm in arms.items()}
        d = {name: [line["probe/d"] for line in lines if "probe/d" in line] for name, lines in ran.items()}
        assert [len(readings) for readings in d.values()] == [10, 10, 10]
        # The third reading is the first that acts, upon the fourth step.
        assert d[OPEN][:3] == d["constant 1"][:3] == d[CLOSED][:3]
        assert len({d[OPEN][3], d["constant 1"][3], d[CLOSED][3]}) > 1
        of_loop = trace(ran[CLOSED], SENSITIVE, steps=10)
        assert len(of_loop) == 7
        assert max(of_loop) > 0
        assert response(ran[OPEN], self.PLAN, SENSITIVE).strength == 0

    def test_an_arm_that_was_played_is_not_played_again(self, tuned: ExperimentConfig, tmp_path: Path) -> None:
        write_conflicting(tuned.datasets, self.PLAN)
        arm = self.PLAN.arms(closed_loop(tuned))[CLOSED]
        lines = respond(arm, self.PLAN, tmp_path / "arm.json")
        gone = replace(arm, start_from=arm.start_from, data_root_dir=tmp_path / "nowhere")
        assert respond(gone, self.PLAN, tmp_path / "arm.json") == lines
