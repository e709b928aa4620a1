"""A policy with fusion asks its simulator for geometry, in the real engine; one without gets none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.contract import SIMULATED_HAND
from ipvla.data.conventions import Conventions
from ipvla.data.geometry import PointTerms
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.fusion import GridFusionConfig, NoFusionConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.policy_server import PolicyServer
from ipvla.rollout.sim_worker import EpisodeJob, SimWorker, SuiteSimulators
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeResult, EpisodeSpec, Observation

pytestmark = pytest.mark.slow
CHUNK = 32
SPEC = EpisodeSpec("recall", "ground_red", Split.HELD_OUT.seed(0), 0)
OFFERED = load_protocol("recall").contract(SIMULATED_HAND)


class Here:
    """A policy in this process; keeps what it was shown."""

    def __init__(self, policy: Policy) -> None:
        self.server, self.seen = PolicyServer(policy), list[Observation]()

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> npt.NDArray[np.float32]:
        self.seen.append(observation)
        (chunk,) = self.server.forward([self.server.admit(episode_id, policy_step, observation)])
        assert isinstance(chunk, np.ndarray)
        return chunk

    def end(self, episode_id: EpisodeId) -> None:
        self.server.end(episode_id)


def saved(directory: Path, reads: bool) -> PolicySource:
    """An untrained policy that looks through one camera."""
    drawn = np.random.default_rng(0).normal(size=(2, 40, 8)).clip(-1, 1).astype(np.float32)
    conventions = Conventions(
        Statistics.compute([drawn[0, :, :7]], [drawn[1]]),
        cameras=("agentview",),
        image_size=32,
        chunk=CHUNK,
        points=PointTerms() if reads else None,
    )
    fusion = GridFusionConfig(hidden=8) if reads else NoFusionConfig()
    config = IPVLAConfig(backbone=TinyConfig(width=32, heads=2, trunk_channels=8), chunk=CHUNK, fusion=fusion)
    Policy.build(config, conventions, CHUNK).save(directory)
    return PolicySource(Policy.load, directory)


@pytest.mark.parametrize("reads", [True, False])
def test_an_episode_is_played_on_the_policys_terms(tmp_path: Path, reads: bool) -> None:
    source = saved(tmp_path / "policy", reads)
    policy = Here(Policy.load(tmp_path / "policy"))
    worker = SimWorker(SuiteSimulators(tmp_path / "cache", camera_size=32))
    result = worker.run(EpisodeJob(SPEC, policy, source.view(OFFERED)))
    assert isinstance(result, EpisodeResult)
    assert result.policy_steps == len(policy.seen) > 0
    for seen in policy.seen:
        if not reads:
            assert seen.geometry is None
            continue
        points = policy.server._policy.transforms.inputs([seen]).points
        assert points.shape == (1, 1, 8, 8, 3)
        assert points.isfinite().float().mean() > 0.9
