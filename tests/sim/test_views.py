"""What reaches a policy is turned, treated and laid out as its training data were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from evaluators.success import SuccessConfig, recorded_view
from ipvla.contract import HAND, Gripper, Limits, Orientation
from ipvla.policy import Policy
from ipvla.rollout.expert_policy import ExpertSource
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import PROTOCOLS, load_protocol
from ipvla.sim.simulator import StepOutcome, Task
from ipvla.sim.suites import load_suite
from ipvla.types import Observation
from tests.sim.gripper_matrix import save_policy

SIDE = 256
#: Where a mark in the upper left corner of the upright picture is.
CORNERS = {"upright": (0, 0), "mirrored": (0, -1), "upside_down": (-1, 0)}


class Marked:
    """A still world whose upright pictures have a red mark in the upper left corner."""

    task = Task("look", "ground", ("look",), horizon=5, chance=0.0)

    def __init__(self) -> None:
        self.t, self.last = 0, np.zeros(7)

    def reset(self, seed: int) -> None:
        self.t = 0

    def step(self, action: npt.NDArray[np.float64]) -> StepOutcome:
        self.t, self.last = self.t + 1, action
        return StepOutcome(success=False, failure=False)

    def observe(self) -> Observation:
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        picture[: SIDE // 3, : SIDE // 3, 0] = 255
        state = np.arange(1, 9, dtype=np.float32)
        return Observation(dict.fromkeys(HAND.cameras, picture), state, "look", self.t)

    def joints(self) -> npt.NDArray[np.float32]:
        return np.arange(11, 20, dtype=np.float32)


def corner(picture: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Row and column, 0 or -1, of the corner with the mark."""
    (found,) = [(r, c) for r in (0, -1) for c in (0, -1) if picture[r, c, 0] > 128]
    return found


def shown(protocol_name: str, source: PolicySource | ExpertSource) -> Observation:
    protocol = replace(load_protocol(protocol_name), horizons={})
    simulator = ProtocolSimulator(Marked(), protocol, "marked")  # type: ignore[arg-type]
    simulator.show(source.view(protocol.contract(HAND)))
    simulator.reset(0)
    return simulator.observe()


@pytest.mark.parametrize(
    ("gripper", "orientation"),
    [("environment", "upright"), ("open_is_one", "mirrored"), ("environment", "mirrored")],
)
def test_a_mark_is_where_the_training_data_had_it(
    tmp_path: Path, gripper: Gripper, orientation: Orientation
) -> None:
    save_policy(tmp_path / "policy", gripper, orientation, "open")
    source = PolicySource(Policy.load, tmp_path / "policy")
    policy = Policy.load(tmp_path / "policy")
    for name in PROTOCOLS:
        seen = shown(name, source)
        assert corner(seen.images["agentview"]) == CORNERS[orientation], name
        model_sees = policy.transforms.conventions.images([seen])[0, 0].numpy()
        assert corner(model_sees) == CORNERS[orientation], name
        side = seen.images["agentview"].shape[0]
        treated = orientation == "mirrored" and name in ("openvla", "oft", "openpi")
        assert side == (224 if treated else SIDE), "JPEG, size and crop are for pictures like the protocol's"
        assert (seen.proprio.tolist(), seen.t) == ([1, 2, 3, 4, 5, 6, 7, 8], 0)


def test_a_policy_of_another_kind_sees_what_the_protocol_shows(tmp_path: Path) -> None:
    for name, protocol in PROTOCOLS.items():
        seen = shown(name, PolicySource(Policy.load, tmp_path))
        assert corner(seen.images["agentview"]) == CORNERS[protocol.orientation]
        assert set(seen.images) == set(protocol.cameras or HAND.cameras), "all of the suite where it names none"
        assert len(seen.proprio) == (9 if protocol.proprio == "joints" else 8)


def test_the_simulator_gives_the_state_in_the_policys_layout() -> None:
    protocol = replace(load_protocol("recall"), horizons={})
    simulator = ProtocolSimulator(Marked(), protocol, "marked")  # type: ignore[arg-type]
    offered = protocol.contract(HAND)
    for layout, expected in (
        ("hand", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("hand_padded", [1, 2, 3, 4, 5, 6, 0, 7, 8]),
        ("joints", [*range(11, 20)]),
        ("none", [0, 0, 0]),
    ):
        simulator.show(replace(offered, state=layout, state_size=len(expected)))
        state = simulator.observe().proprio
        assert (state.tolist(), state.dtype) == (expected, np.float32)


def test_the_simulator_is_moved_within_the_limits_of_the_terms() -> None:
    world, protocol = Marked(), replace(load_protocol("recall"), horizons={})
    simulator = ProtocolSimulator(world, protocol, "marked")  # type: ignore[arg-type]
    simulator.show(replace(protocol.contract(HAND), limits=Limits(high=(0.5,) * 7, change=(0.25,) * 7)))
    for episode in range(2):
        simulator.reset(episode)
        for asked, played in ((-1.0, -1.0), (1.0, -0.75), (1.0, -0.5), (-0.5, -0.5), (-0.4, -0.4)):
            simulator.step(np.full(7, asked, np.float32))
            np.testing.assert_allclose(world.last, played, rtol=1e-6)
    simulator.show(None)
    simulator.step(np.ones(7, np.float32))
    assert (world.last == 1).all()


def test_a_result_says_what_was_converted_and_a_replay_knows_it(tmp_path: Path) -> None:
    save_policy(tmp_path / "upright", "environment", "upright", "open")
    save_policy(tmp_path / "mirrored", "open_is_one", "mirrored", "open")
    recall = load_suite("recall", tmp_path)
    config = SuccessConfig(episodes={"ground_red": 1})
    played = config.build(tmp_path)
    source = PolicySource(Policy.load, tmp_path / "upright")
    assert "contract" not in played.fingerprint(source), "earlier results of the embedded suite stay comparable"
    mirrored = PolicySource(Policy.load, tmp_path / "mirrored")
    found = played.fingerprint(mirrored)
    assert '"orientation": "mirrored"' in found["contract"]
    assert played.conversions(mirrored) == "pictures mirrored (instead of upright)"
    view = recorded_view(found, config.played_by, recall)
    assert view is not None
    assert view.pictures.orientation == "mirrored"
    openvla = load_protocol("openvla")
    native = recorded_view({}, openvla, recall)
    assert native == openvla.contract(HAND), "journals that say nothing have actions in the protocol's language"
