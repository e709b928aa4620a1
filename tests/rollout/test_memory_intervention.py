"""A probe changes one row's memory once, at the first policy step at or after t, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import GRUMemoryConfig, MemoryConfig, NoMemoryConfig, WindowMemoryConfig
from ipvla.policy import Policy
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.memory_intervention import (
    INTERVENTIONS,
    Freeze,
    IntervenedObservation,
    IntervenedPolicy,
    InterventionClient,
    MemoryIntervention,
    RecordMemory,
    Reset,
    Shuffle,
    Swap,
    can_shuffle,
    memory_file,
)
from ipvla.rollout.policy_server import PolicyServer
from ipvla.training.parallel import World
from ipvla.types import Memory, Observation
from tests.rollout.point import PointPolicy
from tests.synthetic import SIZE

STEPS = 6
T = 4  # a policy step: `execute` is 2
MakePolicy = Callable[[MemoryConfig], Policy]


@pytest.fixture
def make_policy(make_experiment: Callable[..., ExperimentConfig]) -> MakePolicy:
    """Small policies with random weights, whose actions depend on their memory."""

    def make(memory: MemoryConfig) -> Policy:
        config = make_experiment()
        torch.manual_seed(0)
        policy = replace(config, model=replace(config.model, memory=memory)).build(World()).policy
        with torch.no_grad():
            for parameter in policy.model.memory.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        policy.model.eval()
        return policy

    return make


@pytest.fixture
def gru(make_policy: MakePolicy) -> Policy:
    return make_policy(GRUMemoryConfig(hidden=16))


def episode(name: str, *probes: MemoryIntervention, steps: int = STEPS) -> list[Observation]:
    """What one episode shows, every second control step."""
    rng = np.random.default_rng(list(name.encode()))
    return [
        IntervenedObservation(
            {"agentview": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)},
            rng.normal(size=8).astype(np.float32),
            "press the button",
            t=2 * i,
            episode=name,
            interventions=probes,
        )
        for i in range(steps)
    ]


@torch.inference_mode()
def play(policy: object, observations: Sequence[Observation], memory: Memory | None = None):
    """(actions, memory after) of each policy step, from `memory` or from the start."""
    memory = policy.initial_memory(1) if memory is None else memory
    steps = []
    for observation in observations:
        actions, memory = policy.act([observation], memory)
        steps.append((actions, memory))
    return steps


def same(one: object, other: object) -> bool:
    """Are two plays equal, bit for bit?"""
    return all(
        np.array_equal(actions, others) and all(torch.equal(memory[name], theirs[name]) for name in memory)
        for (actions, memory), (others, theirs) in zip(one, other, strict=True)
    )


def probes(policy: Policy, directory: Path) -> list[MemoryIntervention]:
    """One of each kind at T; "a" gets the memory of "b"."""
    play(IntervenedPolicy(policy), episode("b", RecordMemory(T, directory)))
    return [Reset(T), Freeze(T), Swap(T, {"a": memory_file(directory, "b", T)}), Shuffle(T)]


def test_before_t_nothing_differs_and_after_it_every_probe_is_felt(gru: Policy, tmp_path: Path) -> None:
    undisturbed, before = play(gru, episode("a")), T // 2
    for probe in probes(gru, tmp_path):
        probed = play(IntervenedPolicy(gru), episode("a", probe))
        assert same(probed[:before], undisturbed[:before])
        assert not same(probed[before + 1 :], undisturbed[before + 1 :]), probe.kind


def test_without_a_probe_the_policy_is_as_it_is(gru: Policy) -> None:
    (first,) = episode("a", steps=1)
    plain = Observation(first.images, first.proprio, first.instruction, first.t)
    assert same(play(IntervenedPolicy(gru), [plain]), play(gru, [plain]))
    assert same(play(IntervenedPolicy(gru), episode("a")), play(gru, episode("a")))


def test_reset_equals_a_policy_that_starts_at_that_step(gru: Policy) -> None:
    probed = play(IntervenedPolicy(gru), episode("a", Reset(T)))
    assert same(probed[T // 2 :], play(gru, episode("a")[T // 2 :]))


def test_freeze_reads_the_same_memory_at_every_later_step(gru: Policy) -> None:
    observations, before = episode("a"), T // 2
    _, kept = play(gru, observations[:before])[-1]
    probed = play(IntervenedPolicy(gru), episode("a", Freeze(T)))
    for (actions, memory), observation in zip(probed[before:], observations[before:], strict=True):
        assert np.array_equal(actions, play(gru, [observation], kept)[0][0])
        assert torch.equal(memory["hidden"], kept["hidden"])


def test_swap_continues_with_what_the_donor_remembered(gru: Policy, tmp_path: Path) -> None:
    recorded = play(IntervenedPolicy(gru), episode("b", RecordMemory(T, tmp_path)))
    assert same(recorded, play(gru, episode("b"))), "the donor is not disturbed"
    _, theirs = recorded[T // 2 - 1]
    swap = Swap(T, {"a": memory_file(tmp_path, "b", T)})
    probed = play(IntervenedPolicy(gru), episode("a", swap))
    assert same(probed[T // 2 :], play(gru, episode("a")[T // 2 :], theirs))
    assert same(play(IntervenedPolicy(gru), episode("c", swap)), play(gru, episode("c"))), (
        "no donor: it keeps its own"
    )
    assert swap.of("a") == swap
    assert swap.of("c") == Swap(T)


def test_shuffle_keeps_each_tensors_values_and_leaves_counters_alone(make_policy: MakePolicy) -> None:
    policy = make_policy(WindowMemoryConfig(length=3))
    _, memory = play(policy, episode("a"))[-1]
    shuffled = Shuffle(T).change(memory, policy.initial_memory(1), "a")
    for name, value in memory.items():
        moved = not torch.equal(shuffled[name], value)
        assert moved == value.is_floating_point(), name
        assert torch.equal(shuffled[name].flatten().sort().values, value.flatten().sort().values)
        assert shuffled[name].shape == value.shape
    again, other = (Shuffle(T).change(memory, policy.initial_memory(1), name) for name in "ab")
    assert torch.equal(again["entries"], shuffled["entries"]), "an episode's permutation is always the same"
    assert not torch.equal(other["entries"], shuffled["entries"]), "another episode has another one"


def test_a_policy_without_memory_loses_exactly_nothing(make_policy: MakePolicy, tmp_path: Path) -> None:
    none = make_policy(NoMemoryConfig())
    assert not can_shuffle(none)
    for probe in probes(none, tmp_path):
        assert same(play(IntervenedPolicy(none), episode("a", probe)), play(none, episode("a"))), probe.kind


def test_each_row_of_a_batch_is_changed_by_its_own_probe_at_its_own_step(gru: Policy, tmp_path: Path) -> None:
    episodes = {probe.kind: episode("a", probe) for probe in probes(gru, tmp_path)}
    alone = {name: play(IntervenedPolicy(gru), observations) for name, observations in episodes.items()}
    begins = {name: i for i, name in enumerate(episodes)}
    server = PolicyServer(IntervenedPolicy(gru))
    for now in range(STEPS + len(episodes) - 1):
        steps = {name: now - begin for name, begin in begins.items() if 0 <= now - begin < STEPS}
        chunks = server.forward(
            [server.admit(EpisodeId(name), step, episodes[name][step]) for name, step in steps.items()]
        )
        for (name, step), chunk in zip(steps.items(), chunks, strict=True):
            np.testing.assert_allclose(chunk, alone[name][step][0][0][: gru.execute], atol=1e-5)


@given(st.integers(0, 11), st.integers(1, 5))
def test_the_change_happens_exactly_once_wherever_the_policy_steps_lie(t: int, execute: int) -> None:
    class Counting(PointPolicy):
        """Its memory counts the policy steps since it was initial."""

    policy = Counting()
    policy.execute = execute
    times = range(0, 12, execute)
    observations = [IntervenedObservation({}, np.zeros(2, np.float32), "go", at, "a", (Reset(t),)) for at in times]
    counts = [int(memory["steps"]) for _, memory in play(IntervenedPolicy(policy), observations)]
    before = sum(at < t for at in times)
    assert counts == [*range(1, before + 1), *range(1, len(times) - before + 1)]


def test_the_client_sends_what_concerns_its_episode_and_all_else_of_the_observation() -> None:
    (seen,) = episode("a", steps=1)
    plain = Observation(seen.images, seen.proprio, seen.instruction, seen.t)
    client = InterventionClient(None, (Swap(T, {"a#1": Path("a"), "b": Path("b")}), Reset(2)))
    sent = client.intervened("a#1", plain)
    assert (sent.episode, sent.interventions) == ("a#1", (Swap(T, {"a#1": Path("a")}), Reset(2)))
    assert {name: getattr(sent, name) for name in vars(plain)} == {**vars(plain), "episode": "a#1"}


def test_every_probe_goes_by_its_name() -> None:
    assert {name: make(3).kind for name, make in INTERVENTIONS.items()} == {
        name: name for name in ("reset", "freeze", "swap", "shuffle")
    }
