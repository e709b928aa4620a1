"""The pool on the real engine: the Recall suite, rendered in the workers."""

import numpy as np
import pytest

from ipvla.rollout.evaluation import SimPool
from ipvla.rollout.policy_actor import PolicyService, PolicySource
from ipvla.rollout.sim_worker import SuiteSimulators, VideoJob
from ipvla.sim.simulator import Split
from ipvla.types import EpisodeSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def load_looking(directory):
    """Moves as the mean colour of the picture says, so that a wrong frame becomes a wrong action."""

    class Looking:
        execute = 4

        def initial_memory(self, batch):
            return {}

        def act(self, observations, memory):
            for o in observations:
                assert o.images["agentview"].shape == (64, 64, 3)
                assert o.proprio.shape == (8,)
            colour = np.stack([o.images["agentview"].mean((0, 1)) for o in observations]) / 128 - 1
            action = np.concatenate([colour, np.zeros_like(colour), -np.ones((len(colour), 1))], axis=1)
            return np.repeat(action[:, None], 4, axis=1).astype(np.float32), {}

    return Looking()


def test_an_episode_is_the_same_whatever_ran_before_it_in_its_worker(tmp_path):
    specs = [EpisodeSpec("recall", "ground_red", Split.HELD_OUT.seed(trial), trial) for trial in range(3)]
    policy = PolicyService(PolicySource(load_looking, tmp_path))
    with SimPool(SuiteSimulators(tmp_path / "cache"), 1) as pool:
        first, again = ({r.spec.key: r for r in pool.run(order, policy)} for order in (specs, specs[::-1]))
        played = [first[specs[0].key], again[specs[0].key]]
        films = pool.record([VideoJob(r, r.trace.actions, tmp_path / f"{i}.mp4") for i, r in enumerate(played)])
    policy.close()
    for key, result in first.items():
        assert (again[key].outcome, again[key].details) == (result.outcome, result.details)
        np.testing.assert_array_equal(again[key].trace.actions, result.trace.actions)
    one, other = (film.read_bytes() for film in films)
    assert len(one) > 1000
    assert one == other
