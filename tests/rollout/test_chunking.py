"""Chunks that take over from one another, from a policy's batch to an episode's actions, with random weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.contract import Contract
from ipvla.experiment import ExperimentConfig
from ipvla.models.heads import FlowConfig, HeadConfig, RegressionConfig
from ipvla.policy import Policy
from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.chunking import (
    ChunkingConfig,
    EnsembleConfig,
    GuidedConfig,
    HeadFacts,
    SwitchConfig,
    TrainedConfig,
)
from ipvla.rollout.episode import Answer, EpisodeId, InvalidActionError, run_episode
from ipvla.rollout.latency import Latency
from ipvla.rollout.policy_actor import PolicyActor, PolicySource
from ipvla.rollout.policy_server import PolicyServer, Request
from ipvla.sim.simulator import StepOutcome, Task
from ipvla.training.parallel import World
from ipvla.types import Ahead, EpisodeResult, EpisodeSpec, Observation
from tests.synthetic import SIZE

CHUNK, EXECUTE, LATENCY = 8, 4, 2
TERMS = Contract(("agentview",))
SPEC = EpisodeSpec("scenes", "any", 3, trial=0)
REST = Latency((LATENCY,), "rest")
Make = Callable[..., ExperimentConfig]


def made(make_experiment: Make, head: HeadConfig) -> Policy:
    """A policy of chunks of 8, asked after 4, with no weight at 0, as after some training."""
    experiment = make_experiment()
    experiment = replace(
        experiment,
        model=replace(experiment.model, head=head, chunk=CHUNK),
        lanes=replace(experiment.lanes, stride=EXECUTE),
    )
    policy = experiment.build(World()).policy
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    policy.model.eval()
    return policy


@pytest.fixture
def flow(make_experiment: Make) -> Policy:
    return made(make_experiment, FlowConfig(16, steps=5, prefix=LATENCY))


def seen(t: int, episode: str = "a", ahead: Ahead | None = None) -> Observation:
    picture = np.random.default_rng([t, len(episode)]).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    state = np.zeros(8, np.float32)
    return Observation({"agentview": picture}, state, "press the button", t, episode, ahead=ahead)


class Scenes:
    """A world that shows other pictures at every step and where nothing is ever decided."""

    def __init__(self, horizon: int = 40) -> None:
        self.task = Task("any", "any", ("go",), horizon, 0.5)

    def reset(self, seed: int) -> None:
        self.t = 0

    def step(self, action: npt.NDArray[np.float32]) -> StepOutcome:
        self.t += 1
        return StepOutcome(success=False, failure=False)

    def observe(self) -> Observation:
        return seen(self.t, "")

    def details(self) -> dict[str, object]:
        return {}


def play(
    policy: Policy, chunking: ChunkingConfig, latency: Latency = REST, server: PolicyServer | None = None
) -> EpisodeResult:
    server = PolicyServer(policy) if server is None else server

    def act(observation: Observation, step: int) -> npt.NDArray[np.float32] | Answer:
        (answer,) = server.forward([server.admit(EpisodeId(SPEC.key), step, observation)])
        assert not isinstance(answer, Exception)
        return answer

    return run_episode(Scenes(), SPEC, act, pace=Pace(latency, chunking), terms=TERMS)  # type: ignore[arg-type]


def motions(result: EpisodeResult) -> npt.NDArray[np.float32]:
    """What moves in the demonstrations, and so in actions: one number."""
    assert result.trace is not None
    return result.trace.actions[:, 0]


def breaks(policy: Policy, chunking: ChunkingConfig) -> float:
    """Mean square of what changes in the plan where an answer takes over: its first action that is played, less
    that of the last chunk for the same step."""
    chunks: list[npt.NDArray[np.float32]] = []

    class Watched(PolicyServer):
        def forward(
            self, requests: Sequence[Request]
        ) -> list[npt.NDArray[np.float32] | Answer | InvalidActionError]:
            (answer,) = super().forward(requests)
            assert isinstance(answer, Answer)
            chunks.append(answer.chunk[:, 0])
            return [answer]

    play(policy, chunking, server=Watched(policy))
    changes = [new[LATENCY] - old[EXECUTE + LATENCY] for old, new in pairwise(chunks)]
    return float(np.square(changes).mean())


def test_a_guided_answer_takes_over_with_less_of_a_break_than_a_switch(flow: Policy) -> None:
    assert breaks(flow, GuidedConfig()) < 0.2 * breaks(flow, SwitchConfig())


@pytest.mark.parametrize("chunking", [GuidedConfig(), TrainedConfig(), EnsembleConfig()])
def test_an_episode_repeats_itself_and_is_another_than_with_a_switch(
    flow: Policy, chunking: ChunkingConfig
) -> None:
    one, two, switch = play(flow, chunking), play(flow, chunking), play(flow, SwitchConfig())
    np.testing.assert_array_equal(motions(one), motions(two))
    assert not np.array_equal(motions(one), motions(switch))
    for result in (one, switch):
        assert result.trace is not None
        assert result.trace.asked_t.tolist() == [0, *range(EXECUTE + LATENCY, 40, EXECUTE)]


@pytest.mark.parametrize(("chunking", "most"), [(GuidedConfig(), 0.1), (TrainedConfig(), 1e-5)])
def test_an_answer_repeats_the_actions_that_are_played_before_it_is_there(
    flow: Policy, chunking: ChunkingConfig, most: float
) -> None:
    """In the simulator's units, after the way to the model's and back."""
    memory = flow.initial_memory(1)
    first, memory = flow.act([seen(0)], memory)
    left = first[0, EXECUTE:].copy()
    left[:, 0] = left[:, 0].clip(-0.7, 0.7)  # within what is normalised without clipping
    answer, _ = flow.act([seen(4, ahead=chunking.ahead(left, LATENCY))], memory)
    plain, _ = flow.act([seen(4)], memory)
    assert np.abs(answer[0, :LATENCY] - left[:LATENCY]).max() < most
    assert np.abs(plain[0, :LATENCY] - left[:LATENCY]).max() > 0.2


def test_rows_with_and_without_a_rest_in_one_batch_are_each_as_alone(flow: Policy) -> None:
    random = np.random.default_rng(0)
    left = random.uniform(-0.5, 0.5, (4, 7)).astype(np.float32)
    rows = [
        seen(4, "a", GuidedConfig().ahead(left, LATENCY)),
        seen(0, "bb"),
        seen(8, "ccc", TrainedConfig().ahead(left, LATENCY)),
        seen(0, "dddd", GuidedConfig().ahead(left[:0], LATENCY)),
        seen(12, "eeeee", SwitchConfig().ahead(left, LATENCY)),
    ]
    together, _ = flow.act(rows, flow.initial_memory(len(rows)))
    for row, chunk in zip(rows, together, strict=True):
        alone, _ = flow.act([row], flow.initial_memory(1))
        np.testing.assert_allclose(alone[0], chunk, atol=2e-5)
    unaided, _ = flow.act([replace(row, ahead=None) for row in rows], flow.initial_memory(len(rows)))
    differ = np.abs(together - unaided).max((1, 2)) > 1e-3
    assert differ.tolist() == [True, False, True, False, False]


def test_the_actor_answers_such_rows_in_one_batch_and_whole(flow: Policy) -> None:
    left = np.full((4, 7), 0.2, np.float32)
    rows = {"a": None, "b": GuidedConfig().ahead(left[:0], LATENCY), "c": SwitchConfig().ahead(left, LATENCY)}

    async def run() -> list[npt.NDArray[np.float32] | Answer]:
        actor = PolicyActor(PolicySource(lambda _: flow, Path()), threads=1)
        await actor.act(EpisodeId("warm"), 0, seen(0))
        calls = [actor.act(EpisodeId(name), 0, seen(0, name, ahead)) for name, ahead in rows.items()]
        answers = await asyncio.gather(*calls)
        assert (await actor.stats())["forwards"] == 2
        return answers

    short, whole, switched = asyncio.run(run())
    assert isinstance(short, np.ndarray)
    assert short.shape == (EXECUTE, 7)
    for answer in (whole, switched):
        assert isinstance(answer, Answer)
        assert (answer.chunk.shape, answer.execute) == ((CHUNK, 7), EXECUTE)


def test_a_policy_that_no_world_hurries_is_as_it_was(flow: Policy) -> None:
    one, two = (play(flow, SwitchConfig(), latency) for latency in (Latency(), Latency((0,), "rest")))
    np.testing.assert_array_equal(motions(one), motions(two))
    assert one.trace is not None
    assert one.trace.latency is None


class TestRefusedBeforeAnythingStarts:
    @pytest.mark.parametrize(
        ("pace", "head", "message"),
        [
            (Pace(Latency((9,))), FlowConfig(), r"latency_steps is 9, and a chunk has 8 actions.*at most 8"),
            (
                Pace(Latency((2, 5), "rest"), GuidedConfig()),
                FlowConfig(),
                r"latency_steps is 5, and of a chunk of 8 only 3 actions are left.*at most 4 for guided",
            ),
            (
                Pace(REST, GuidedConfig()),
                RegressionConfig(),
                r"pulls at a velocity, and a head of type regression has none; choose ensemble or switch",
            ),
            (
                Pace(REST, GuidedConfig()),
                FlowConfig(steps=1),
                r"weight is 5, and the head takes 1 steps: set it to at most 2, or sampling\.steps higher",
            ),
            (
                Pace(REST, TrainedConfig()),
                FlowConfig(prefix=1),
                r"learned to go on from 1 given actions.*latency_steps is 2; train it with model\.head\.prefix 2",
            ),
            (Pace(REST, TrainedConfig()), RegressionConfig(), r"learned to go on from 0 given actions"),
        ],
    )
    def test_in_one_line(self, pace: Pace, head: HeadConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            pace.require(CHUNK, EXECUTE, HeadFacts.of(head))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("chunking", [GuidedConfig(), TrainedConfig(), EnsembleConfig()])
    def test_chunks_that_do_not_overlap(self, chunking: ChunkingConfig) -> None:
        with pytest.raises(ValueError, match=r"needs chunks that overlap, and the policy plays all 8 actions"):
            Pace(Latency(), chunking).require(CHUNK, CHUNK, HeadFacts.of(FlowConfig(prefix=4)))

    def test_but_not_what_can_be_played(self) -> None:
        for pace in (Pace(), Pace(Latency((4,), "rest"), GuidedConfig()), Pace(Latency((8,)))):
            pace.require(CHUNK, EXECUTE, HeadFacts.of(FlowConfig()))
        Pace(REST, TrainedConfig()).require(CHUNK, EXECUTE, HeadFacts.of(FlowConfig(prefix=3)))
        Pace(REST, EnsembleConfig()).require(CHUNK, EXECUTE, HeadFacts.of(RegressionConfig()))

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (lambda: GuidedConfig(weight=0.0), r"chunking\.weight is 0\.0; it must be finite and above 0"),
            (lambda: GuidedConfig(weight=float("inf")), r"chunking\.weight is inf"),
            (lambda: EnsembleConfig(decay=-1.0), r"chunking\.decay is -1\.0; it must be finite and at least 0"),
            (
                lambda: Pace(Latency((2,)), TrainedConfig()),
                r"type trained goes on .*meanwhile is hold; set it to rest",
            ),
        ],
    )
    def test_settings_that_cannot_be(self, made: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message) as refused:
            made()
        assert "\n" not in str(refused.value)
