"""The service on LIBERO's own suites, played by a published protocol: from pictures to records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluators.success import SuccessConfig
from ipvla.contract import HAND
from ipvla.rollout.episode import run_episode
from ipvla.rollout.policy_actor import PolicySource
from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.protocols import PROTOCOLS, load_protocol
from ipvla.sim.simulator import Split, StepOutcome
from ipvla.types import EpisodeSpec, Observation

pytestmark = pytest.mark.slow

SUITE, TASK = "libero_object", "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def load_reaching(directory: Path) -> Any:
    """Goes where the mean colours of both pictures say, eight actions at a time, the hand closed."""

    class Reaching:
        execute = 8

        def initial_memory(self, batch: int) -> dict[str, Any]:
            return {}

        def act(self, observations: list[Observation], memory: Any) -> tuple[Any, dict[str, Any]]:
            moves = []
            for o in observations:
                assert {name: image.shape for name, image in o.images.items()} == dict.fromkeys(
                    ("agentview", "robot0_eye_in_hand"), (224, 224, 3)
                )
                colours = [o.images[name].mean((0, 1)) / 128 - 1 for name in o.images]
                moves.append(np.concatenate([*colours, [1.0]]))
            return np.repeat(np.array(moves, np.float32)[:, None], 8, axis=1), {}

    return Reaching()


@pytest.mark.usefixtures("ray_cluster")
def test_an_evaluation_by_a_published_protocol_records_what_it_was(standard_cache: Path, tmp_path: Path) -> None:
    config = SuccessConfig(suite=SUITE, protocol="oft", episodes={TASK: 2}, num_simulators=1)
    (tmp_path / "policy").mkdir()
    source, journal = PolicySource(load_reaching, tmp_path / "policy"), tmp_path / "episodes.sqlite"
    with config.build(standard_cache) as evaluation:
        played: list[int] = []
        table = evaluation.run("reaching", source, journal, on_status=lambda status: played.append(status.new))
        again = evaluation.run("reaching", source, journal, on_status=lambda status: played.append(status.new))
    assert played == [0, 1, 2, 0], "what is recorded is not played again"
    assert again.results == table.results
    assert table.fingerprint["protocol"] == str(load_protocol("oft"))
    assert table.fingerprint["suite_version"].startswith("0.1.4+")
    for result in table.results:
        assert result.outcome == "timeout"
        assert (result.steps, result.policy_steps) == (280, 35)
        assert result.spec.seed == Split.HELD_OUT.seed(result.spec.trial)


def test_an_episode_settles_before_the_policys_first_step_and_is_moved_in_its_conventions(
    standard_cache: Path,
) -> None:
    short = replace(load_protocol("openvla"), horizons={SUITE: 3})
    simulator = SuiteSimulators(standard_cache, protocol=short)(SUITE, TASK)
    simulator.show(short.contract(HAND))  # a client of the protocol's own language
    seen: list[Observation] = []
    commands: list[float] = []
    step = simulator._simulator.step  # type: ignore[attr-defined]

    def watched(action: Any) -> StepOutcome:
        commands.append(float(action[-1]))
        outcome: StepOutcome = step(action)
        return outcome

    simulator._simulator.step = watched  # type: ignore[attr-defined]

    def act(observation: Observation, policy_step: int) -> Any:
        seen.append(observation)
        return np.array([[0, 0, 0, 0, 0, 0, 1.0 if policy_step else 0.0]], np.float32)

    result = run_episode(simulator, EpisodeSpec(SUITE, TASK, Split.HELD_OUT.seed(0), 0), act)
    assert result.steps == result.policy_steps == 3
    assert [o.t for o in seen] == [0, 1, 2], "settling does not count"
    assert commands == [-1.0] * 10 + [1.0, -1.0, -1.0], "1 opens; the simulator opens at -1"
    assert seen[0].images["agentview"].shape == (224, 224, 3)
    assert seen[0].instruction == "pick up the alphabet soup and place it in the basket"
    simulator.close()


def test_liberos_own_protocol_gives_joints_instead_of_the_hands_pose(standard_cache: Path) -> None:
    simulator = SuiteSimulators(standard_cache, protocol=PROTOCOLS["libero_native"])(SUITE, TASK)
    simulator.reset(Split.HELD_OUT.seed(0))
    proprio = simulator.observe().proprio
    assert proprio.shape == (9,)
    np.testing.assert_allclose(proprio[:7], [0, -0.161, 0, -2.44, 0, 2.23, 0.785], atol=0.1)
    simulator.close()
