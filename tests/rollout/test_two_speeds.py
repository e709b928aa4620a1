"""Policies at two speeds in rollout: what an episode's row holds, what is told of it, and how it is probed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.compute import compute
from ipvla.data.plan import PlanPosition
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.models.speeds import FastInSlowConfig, LatentSpeedsConfig, SingleSpeedConfig, SlowPace, SpeedsConfig
from ipvla.policy import Policy
from ipvla.rollout.episode import Answer, EpisodeId, run_episode
from ipvla.rollout.journal import Journal
from ipvla.rollout.memory_intervention import (
    Freeze,
    IntervenedObservation,
    IntervenedPolicy,
    MemoryIntervention,
    Reset,
    can_shuffle,
    has_part,
)
from ipvla.rollout.policy_server import PolicyServer, StaleEpisodeError
from ipvla.training.parallel import World
from ipvla.training.step import training_step
from ipvla.types import THOUGHT_T, EpisodeSpec, Memory, Observation
from tests.rollout.point import PointSimulator
from tests.synthetic import SIZE

LATENT = LatentSpeedsConfig(period=4, staleness=8, width=16, trunk_channels=8, memory="both")
Make = Callable[..., ExperimentConfig]


def experiment(make: Make, speeds: SpeedsConfig) -> ExperimentConfig:
    config = make()
    return replace(config, model=replace(config.model, memory=GRUMemoryConfig(hidden=8), speeds=speeds))


@pytest.fixture
def policy(make_experiment: Make) -> Policy:
    """Chunks of 2, both of which are played; a thought every second call."""
    policy = experiment(make_experiment, LATENT).build(World()).policy
    policy.model.eval()
    return policy


def shown(t: int, *probes: MemoryIntervention) -> Observation:
    pixels = np.random.default_rng(t).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    told = ({"agentview": pixels}, np.zeros(8, np.float32), "press the button", t, "a")
    return IntervenedObservation(*told, interventions=probes) if probes else Observation(*told)


class TestAServer:
    def test_tells_what_each_answer_rests_on(self, policy: Policy) -> None:
        server = PolicyServer(policy)
        answers = [server.forward([server.admit(EpisodeId("a"), i, shown(2 * i))])[0] for i in range(5)]
        assert all(isinstance(answer, Answer) and len(answer.chunk) == answer.execute == 2 for answer in answers)
        assert [answer.thought_t for answer in answers if isinstance(answer, Answer)] == [0, 0, 4, 4, 8]

    def test_refuses_an_episode_whose_thought_it_does_not_hold(self, policy: Policy) -> None:
        """It has moved, or the policy's process was restarted."""
        with pytest.raises(StaleEpisodeError, match="no memory here"):
            PolicyServer(policy).admit(EpisodeId("a"), 1, shown(2))


def test_a_trace_says_when_the_slow_part_thought_and_a_journal_keeps_it(tmp_path: Path) -> None:
    def act(observation: Observation, policy_step: int) -> Answer:
        return Answer(np.zeros((2, 1), np.float32), 2, policy_step // 2 * 4)

    spec = EpisodeSpec("point", "recall_go", 1, 1)
    result = run_episode(PointSimulator("recall_go"), spec, act)
    with Journal(tmp_path / "episodes.sqlite", {}) as journal:
        journal.record(result)
        trace = journal.trace(spec)
    assert trace is not None
    assert trace.thought_t is not None
    assert trace.thought_t.tolist() == [0, 0, 4, 4, 8, 8]
    assert trace.call is None


class TestASavedPolicy:
    def test_is_played_at_another_pace(self, policy: Policy, tmp_path: Path) -> None:
        policy.save(tmp_path / "policy")
        for period, expected in ((None, [0, 0, 4, 4]), (2, [0, 2, 4, 6]), (8, [0, 0, 0, 0])):
            played, times = Policy.load(tmp_path / "policy", slow=SlowPace(period=period)), []
            memory = played.initial_memory(1)
            for t in (0, 2, 4, 6):
                _, memory = played.act([shown(t)], memory)
                times.append(int(memory[THOUGHT_T]))
            assert times == expected

    def test_is_refused_a_pace_above_its_staleness_limit(self, policy: Policy, tmp_path: Path) -> None:
        policy.save(tmp_path / "policy")
        with pytest.raises(ValueError, match=r"slow\.period is 9, .* at most 8") as refused:
            Policy.load(tmp_path / "policy", slow=SlowPace(period=9))
        assert "\n" not in str(refused.value)

    def test_at_one_speed_says_nothing_of_speeds(self, make_experiment: Make, tmp_path: Path) -> None:
        experiment(make_experiment, SingleSpeedConfig()).build(World()).policy.save(tmp_path / "policy")
        assert "speeds" not in json.loads((tmp_path / "policy" / "policy.json").read_text())["model"]
        assert Policy.load(tmp_path / "policy").config.speeds == SingleSpeedConfig()


class TestAProbeOfOnePart:
    """`memory_use --probe.part`."""

    @staticmethod
    def after(policy: Policy, *probes: MemoryIntervention) -> tuple[Memory, Memory]:
        """Before and after a call at t = 2, at which the slow part does not think by itself."""
        with torch.no_grad():
            _, before = policy.act([shown(0)], policy.initial_memory(1))
            return before, IntervenedPolicy(policy).act([shown(2, *probes)], before)[1]

    def test_of_the_slow_part_makes_it_think_again_and_leaves_the_fast_one(self, policy: Policy) -> None:
        _, undisturbed = self.after(policy, Freeze(9))
        assert int(undisturbed[THOUGHT_T]) == 0
        _, changed = self.after(policy, Reset(2, part="slow"))
        assert int(changed[THOUGHT_T]) == 2, "what it had thought is forgotten too"
        fresh = policy.act([shown(2)], policy.initial_memory(1))[1]
        torch.testing.assert_close(changed["slow/hidden"], fresh["slow/hidden"])
        assert not torch.allclose(changed["fast/hidden"], fresh["fast/hidden"], atol=1e-4)

    def test_of_the_fast_part_leaves_the_slow_one(self, policy: Policy) -> None:
        _, undisturbed = self.after(policy, Freeze(9))
        _, changed = self.after(policy, Reset(2, part="fast"))
        for name, value in undisturbed.items():
            assert torch.equal(changed[name], value) == (not name.startswith("fast/"))

    def test_freezes_that_part_alone(self, policy: Policy) -> None:
        before, frozen = self.after(policy, Freeze(2, part="fast"))
        assert torch.equal(frozen["fast/hidden"], before["fast/hidden"])
        before, going_on = self.after(policy, Freeze(2, part="slow"))
        assert not torch.equal(going_on["fast/hidden"], before["fast/hidden"])

    def test_needs_such_a_part(self, make_experiment: Make, policy: Policy) -> None:
        slow = experiment(make_experiment, replace(LATENT, memory="slow")).build(World()).policy
        single = experiment(make_experiment, SingleSpeedConfig()).build(World()).policy
        parts = {name: [has_part(one, part) for part in ("slow", "fast")] for name, one in
                 {"both": policy, "slow": slow, "single": single}.items()}  # fmt: skip
        assert parts == {"both": [True, True], "slow": [True, False], "single": [False, False]}
        assert [can_shuffle(slow, part) for part in (None, "slow", "fast")] == [True, True, False]


class TestCompute:
    def test_of_a_control_step_is_that_of_its_share_of_calls(self, policy: Policy) -> None:
        counted = compute(policy, policy.blank())
        assert (counted.calls, counted.execute) == (2, 2)
        assert counted.thinking > 2 * counted.acting > 0
        assert counted.per_step == (counted.thinking + counted.acting) / 4
        assert "MFLOP per control step" in str(counted)

    def test_falls_with_the_period_and_is_that_of_any_call_at_one_speed(self, make_experiment: Make) -> None:
        def per_step(speeds: SpeedsConfig) -> float:
            one = experiment(make_experiment, speeds).build(World()).policy
            return compute(one, one.blank()).per_step

        costs = [per_step(replace(LATENT, period=period)) for period in (2, 4, 8)]
        assert costs == sorted(costs, reverse=True)
        single = experiment(make_experiment, SingleSpeedConfig()).build(World()).policy
        counted = compute(single, single.blank())
        assert counted.per_step == counted.thinking / 2
        assert costs[-1] < counted.per_step < costs[0]


@pytest.mark.parametrize("speeds", [LATENT, FastInSlowConfig(period=4, staleness=8)], ids=lambda one: one.kind)
def test_training_carries_the_row_from_window_to_window(make_experiment: Make, speeds: SpeedsConfig) -> None:
    built = experiment(make_experiment, speeds).build(World())
    state, position = built.state, PlanPosition()
    layout = {name: (value.shape, value.dtype) for name, value in state.memory.items()}
    for _ in range(3):
        training_step(state, [built.lanes.batch(position)], 3e-3, 1.0, None)
        position = built.lanes.after(position)
        assert {name: (value.shape, value.dtype) for name, value in state.memory.items()} == layout
    assert not any(value.requires_grad for value in state.memory.values())


@pytest.mark.parametrize("speeds", [LATENT, FastInSlowConfig(period=4, staleness=8)], ids=lambda one: one.kind)
def test_training_learns_what_the_slow_part_saw_steps_ago(make_experiment: Make, speeds: SpeedsConfig) -> None:
    """The cue is in an episode's first pictures alone, and every action says which it was."""
    built = experiment(make_experiment, speeds).build(World())
    window, losses = built.lanes.batch(PlanPosition()), []
    for _ in range(40):
        built.state.memory = built.state.model.initial_memory(4)
        losses.append(training_step(built.state, [window], 3e-3, 1.0, None)["loss"])
    assert losses[-1] < 0.1 * losses[0]
