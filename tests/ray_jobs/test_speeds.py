"""Evaluation in a world that does not wait, as a job: from settings to journal, and what is refused before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evaluators.memory_use import InterventionConfig
from evaluators.success import SuccessConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import FlowConfig, HeadConfig, RegressionConfig
from ipvla.models.speeds import LatentSpeedsConfig, SingleSpeedConfig, SlowPace
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.chunk_player import Pace
from ipvla.rollout.chunking import ChunkingConfig, EnsembleConfig, GuidedConfig, HeadFacts, TrainedConfig
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.journal import Journal
from ipvla.rollout.latency import Latency
from ipvla.rollout.openpi.client import OpenpiError, OpenpiSource
from ipvla.rollout.openpi.messages import ahead_message, pack, unpack
from ipvla.training.parallel import World
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig, evaluate
from ray_jobs.replay import ReplayConfig, replay
from ray_jobs.serve import ServeConfig, serving
from tests.synthetic import cue_episode

HEADS: dict[str, HeadConfig] = {"flow": FlowConfig(16, prefix=2), "regression": RegressionConfig(16)}
#: Of a policy of the same sizes with the regression head.
TWO_SPEEDS = LatentSpeedsConfig(period=4, staleness=8, width=16, trunk_channels=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with an untrained policy of either head, of chunks of 8 of which 4 are played."""
    root = tmp_path_factory.mktemp("storage")
    write_rlds(root / "datasets", "cue", [cue_episode(seed) for seed in range(8)], 16)
    for name, head in [*HEADS.items(), ("latent", HEADS["regression"])]:
        config = ExperimentConfig(
            storage_root=root,
            data=DataConfig(dataset="cue", image_size=64),
            model=IPVLAConfig(
                backbone=TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8),
                head=head,
                speeds=TWO_SPEEDS if name == "latent" else SingleSpeedConfig(),
            ),
        )
        config.build(World()).policy.save(root / "runs" / "recall" / name / "policy")
    return root


def settings(root: Path, policy: str, **success: Any) -> EvaluateConfig:
    played: dict[str, Any] = {"episodes": {"ground_red": 2}, "num_simulators": 2}
    return EvaluateConfig(
        storage_root=root, policies=(policy,), videos=0, label="late", success=SuccessConfig(**played, **success)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_guided_episodes_are_played_through_ray_and_journalled(root: Path) -> None:
    config = settings(root, "flow", latency_steps=(1, 2), meanwhile="rest", chunking=GuidedConfig())
    (table,) = evaluate(config, Console(quiet=True)).tables
    assert table.fingerprint["latency"] == "1 2, rest"
    assert table.fingerprint["chunking"] == '{"type": "guided", "weight": 5.0}'
    with Journal.existing(config.journal("flow")) as journal:
        for result in table.results:
            trace = journal.trace(result.spec)
            assert trace is not None
            assert trace.latency is not None
            assert trace.call is not None
            assert set(trace.latency.tolist()) == {1, 2}
            first = int(trace.latency[0])
            assert (trace.call[:first] == -1).all(), "before its first answer the robot keeps still"
            assert not trace.actions[:first, :6].any()
            assert (trace.actions[:first, 6] == -1).all(), "with its hand open"
            assert (trace.call[first:] >= 0).all(), "and later there is always something left to play"
            assert np.diff(trace.asked_t[1:]).tolist() == [4] * (len(trace.asked_t) - 2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_policy_at_two_speeds_is_played_at_another_period_and_shown_on_a_time_axis(root: Path) -> None:
    config = replace(settings(root, "latent", slow=SlowPace(period=8)), videos=1)
    evaluation = evaluate(config, Console(quiet=True))
    (table,) = evaluation.tables
    assert table.fingerprint["slow"] == "period=8"
    with Journal.existing(config.journal("latent")) as journal:
        for result in table.results:
            trace = journal.trace(result.spec)
            assert trace is not None
            assert trace.thought_t is not None
            assert trace.thought_t.tolist() == [t // 8 * 8 for t in trace.asked_t.tolist()]
    assert all(video.timeline for video in evaluation.videos)
    played = replay(
        ReplayConfig(storage_root=root, policy="latent", label="late", task="ground_red", trial=0, size=64)
    )
    assert played.timeline is not None
    assert played.timeline.read_bytes().startswith(b"\x89PNG")


def test_settings_are_those_of_the_command_line() -> None:
    late = ["--policies", "[flow]", "--success.latency_steps", "[2, 3, 3]", "--success.meanwhile", "rest"]
    guided = ["--success.chunking.type", "guided", "--success.chunking.weight", "4"]
    config = parse(EvaluateConfig, [*late, *guided])
    assert config.success.pace.latency.steps == (2, 3, 3)
    assert config.success.chunking == GuidedConfig(weight=4)
    assert (
        parse(EvaluateConfig, ["--policies", "[flow]", "--success.latency_steps", "4"]).success.latency_steps == 4
    )


@pytest.mark.parametrize(
    ("policy", "success", "message"),
    [
        ("flow", {"latency_steps": 9}, r"latency_steps is 9, and a chunk has 8 actions"),
        (
            "flow",
            {"latency_steps": 5, "meanwhile": "rest", "chunking": GuidedConfig()},
            r"latency_steps is 5, and of a chunk of 8 only 3 actions are left",
        ),
        (
            "flow",
            {"latency_steps": 3, "meanwhile": "rest", "chunking": TrainedConfig()},
            r"learned to go on from 2 given actions, and success\.latency_steps is 3",
        ),
        (
            "regression",
            {"chunking": GuidedConfig()},
            r"pulls at a velocity, and a head of type regression has none; choose ensemble or switch",
        ),
        ("latent", {"slow": SlowPace(period=9)}, r"slow\.period is 9, .* at most 8"),
        ("regression", {"slow": SlowPace(period=4)}, r"slow: period=4, and the policy has no slow part"),
    ],
)
def test_what_a_policy_cannot_do_is_refused_before_any_process_starts(
    root: Path, monkeypatch: pytest.MonkeyPatch, policy: str, success: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("ray_jobs.evaluate.connect", lambda *_: pytest.fail("a cluster was asked for"))
    with pytest.raises(ValueError, match=message) as refused:
        evaluate(settings(root, policy, **success), Console(quiet=True))
    assert "\n" not in str(refused.value)


def test_who_has_no_part_in_it_is_refused(root: Path) -> None:
    late = settings(root, "flow", latency_steps=2)
    with pytest.raises(
        ValueError, match="expert, which sees the true state of now, is evaluated in a world that waits"
    ):
        replace(late, policies=("expert",))
    with pytest.raises(
        ValueError, match=r"success\.slow: period=4 has no effect on expert, which think elsewhere"
    ):
        settings(root, "expert", slow=SlowPace(period=4))
    with pytest.raises(ValueError, match="memory is probed in a world that waits; leave them out"):
        InterventionConfig().build(late.success, root)


class TestAServer:
    @staticmethod
    def told(root: Path, name: str) -> dict[str, Any]:
        server = serving(ServeConfig(policy=root / "runs" / "recall" / name / "policy"), None)
        told: dict[str, Any] = unpack(server.greeting)
        return told

    def test_says_what_its_answers_can_go_on_from_and_an_evaluation_asks_it(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told, guided = self.told(root, "flow"), Pace(Latency((2,), "rest"), GuidedConfig())
        assert told["chunking"] == {"chunk": 8, "execute": 4, "head": "flow", "steps": 4, "prefix": 2}
        source = OpenpiSource("ws://here")
        monkeypatch.setattr(OpenpiSource, "metadata", lambda _: told)
        source.require(guided, None)
        with pytest.raises(ValueError, match=r"of a chunk of 8 only 2 actions are left"):
            source.require(replace(guided, latency=Latency((3,), "rest")), 6)
        monkeypatch.setattr(OpenpiSource, "metadata", lambda _: self.told(root, "regression"))
        with pytest.raises(ValueError, match="a head of type regression has none"):
            source.require(guided, None)

    def test_that_is_not_ours_is_played_late_but_not_guided(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OpenpiSource, "metadata", lambda _: {})
        source = OpenpiSource("ws://there")
        source.require(Pace(Latency((2,), "rest"), EnsembleConfig()), None)
        with pytest.raises(OpenpiError, match="ws://there does not go on from the last chunk's rest"):
            source.require(Pace(chunking=GuidedConfig()), None)

    @pytest.mark.parametrize("chunking", [GuidedConfig(), TrainedConfig()])
    def test_answers_as_the_policy_itself_what_is_ahead_included(
        self, root: Path, chunking: ChunkingConfig
    ) -> None:
        directory = root / "runs" / "recall" / "flow" / "policy"
        server = serving(ServeConfig(policy=directory), None)
        left = np.full((4, 7), 0.25, np.float32)
        sent = {
            "observation/image": np.full((64, 64, 3), 90, np.uint8),
            "observation/state": np.zeros(8, np.float32),
            "prompt": "press the button",
            "t": 4,
            "ahead": ahead_message(chunking.ahead(left, 2)),
        }
        observation = server._observe(unpack(pack(sent)), 0)
        answer = asyncio.run(server._policy.act(EpisodeId("a"), 0, observation))
        policy = Policy.load(directory)
        named = replace(observation, episode="a")
        expected, _ = policy.act([named], policy.initial_memory(1))
        np.testing.assert_allclose(answer.chunk, expected[0], atol=1e-5)
        assert answer.execute == 4
        unaided, _ = policy.act([replace(named, ahead=None)], policy.initial_memory(1))
        assert np.abs(unaided[0] - expected[0]).max() > 1e-3

    def test_of_a_policy_at_two_speeds_thinks_at_its_own_pace_or_at_the_one_it_is_given(self, root: Path) -> None:
        directory = root / "runs" / "recall" / "latent" / "policy"
        for slow, expected in ((SlowPace(), [0, 4, 8]), (SlowPace(period=8), [0, 0, 8])):
            server = serving(ServeConfig(policy=directory, slow=slow), None)
            sent = {
                "observation/image": np.full((64, 64, 3), 90, np.uint8),
                "observation/state": np.zeros(8, np.float32),
                "prompt": "press the button",
            }

            async def asked(server: Any = server, sent: Any = sent) -> list[Any]:
                shown = [server._observe(unpack(pack(sent | {"t": 4 * i})), 0) for i in range(3)]
                return [await server._policy.act(EpisodeId("a"), i, one) for i, one in enumerate(shown)]

            answers = asyncio.run(asked())
            assert [answer.thought_t for answer in answers] == expected
        with pytest.raises(ValueError, match=r"^slow\.period is 9, .* at most 8"):
            serving(ServeConfig(policy=directory, slow=SlowPace(period=9)), None)

    def test_refuses_what_its_head_cannot_go_on_from_before_it_is_asked(self, root: Path) -> None:
        facts = {name: HeadFacts.of(head) for name, head in HEADS.items()}
        left = np.zeros((4, 7), np.float32)
        with pytest.raises(ValueError, match="a head of type regression with 0 steps takes at most 0"):
            facts["regression"].require(GuidedConfig().ahead(left, 2))
        with pytest.raises(ValueError, match="ahead/delay is 3; a head of type flow has learned to go on from 2"):
            facts["flow"].require(TrainedConfig().ahead(left, 3))
        facts["flow"].require(GuidedConfig().ahead(left, 4))


def test_a_policy_with_a_prefix_is_saved_and_loaded_with_it(root: Path) -> None:
    assert Policy.load(root / "runs" / "recall" / "flow" / "policy").config.head.longest_prefix == 2
