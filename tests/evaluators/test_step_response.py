"""The step response changes nothing but the data, and what each arm did with them is read off its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluators.step_response import (
    CLOSED,
    OPEN,
    StepConfig,
    joined_responses,
    plot_response,
    respond,
    response,
    response_figures,
    write_conflicting,
)
from ipvla.data.dataset import open_dataset
from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import HSWConfig
from ipvla.forgetting.thermostat import Line, ThermostatConfig, trace
from tests.training.fine_tuning import SENSITIVE, protected

THERMOSTAT = ThermostatConfig(every=5, calibration=2)
PLAN = StepConfig("yellow", "yellow_mirrored", steps=(30, 30, 30), constants=(0.5, 1.0), log_every=5)


def closed_loop(config: ExperimentConfig) -> ExperimentConfig:
    return protected(config, HSWConfig(), thermostat=SENSITIVE)


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

    def test_the_controls_play_what_the_closed_loop_found_and_keep_how_it_began(
        self, tuned: ExperimentConfig
    ) -> None:
        began = replace(SENSITIVE, every=5, start=0.25)
        config = protected(tuned, HSWConfig(), thermostat=began)
        lines = stepped(rise=0.3, loss=0.2)
        arms = PLAN.controls(config, lines, seed=0)
        mean, shuffled = (arms[f"its {kind} strengths"].forgetting.thermostat for kind in ("mean", "shuffled"))  # type: ignore[union-attr]
        strengths = trace(lines, began, 90)
        assert mean.strengths == pytest.approx([np.mean(strengths)])  # type: ignore[union-attr]
        assert mean.start == shuffled.start == 0.25  # type: ignore[union-attr]
        assert sorted(shuffled.strengths) == sorted(strengths)  # type: ignore[union-attr]

    def test_what_is_no_closed_loop_or_does_not_fit_it_is_refused(self, tuned: ExperimentConfig) -> None:
        config = closed_loop(tuned)
        with pytest.raises(ValueError, match=r"needs an experiment with forgetting\.thermostat"):
            PLAN.arms(tuned)
        with pytest.raises(ValueError, match="in a closed loop"):
            PLAN.arms(PLAN.arms(config)[OPEN])
        slow = protected(tuned, HSWConfig(), thermostat=replace(SENSITIVE, every=7))
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

    def test_seeds_of_two_sessions_join(self) -> None:
        def session(seed: int, rise: float, arms: Sequence[str] = (OPEN, CLOSED)) -> dict[str, object]:
            seen = response(stepped(rise, 0.2), PLAN, THERMOSTAT)
            return response_figures("two_sided_thermostat", {seed: dict.fromkeys(arms, seen)})

        both = joined_responses(session(0, 0.3), session(1, 0.4))
        assert {arm: list(seeds) for arm, seeds in both["arms"].items()} == {OPEN: ["0", "1"], CLOSED: ["0", "1"]}
        again = joined_responses(both, session(0, 0.7))
        assert again["arms"][OPEN]["0"]["conflict_d"] == pytest.approx(0.8), "the later one counts"
        with pytest.raises(ValueError, match="only responses of the same method and arms"):
            joined_responses(both, session(2, 0.1, arms=(OPEN,)))

    def test_it_is_plotted(self, tmp_path: Path) -> None:
        lines = stepped(0.3, 0.2)
        plot_response({OPEN: lines, "constant 0.5": lines, CLOSED: lines}, PLAN, tmp_path / "step.png")
        assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


class TestRun:
    PLAN = StepConfig(new="cue", conflicting="cue_mirrored", steps=(4, 3, 3), constants=(1.0,), log_every=1)

    def test_the_conflicting_data_are_the_new_tasks_with_the_hand_going_the_other_way(
        self,
        tuned: ExperimentConfig,
    ) -> None:
        directory = write_conflicting(tuned.datasets, self.PLAN)
        assert write_conflicting(tuned.datasets, self.PLAN) == directory, "written once"
        one, other = replace(tuned.data, dataset="cue").build(tuned.datasets), open_dataset(directory)
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
