"""Two sides' terms are compared in one place: what differs is converted, or refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ipvla.contract import (
    HAND,
    Contract,
    ContractError,
    Limits,
    Pictures,
    common,
    fitted,
    from_environment,
    readable_changes,
    to_environment,
)
from ipvla.sim.protocols import PROTOCOLS, load_protocol

AGENT = replace(HAND, cameras=("agentview",))


def test_it_survives_json() -> None:
    contract = Contract(
        ("a", "b"),
        Pictures("mirrored", True, 224, "bilinear", 0.9),
        "open_is_one",
        "joints",
        14,
        False,
        "other",
        3,
    )
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract
    changes = contract.changes(HAND)
    assert HAND.changed(json.loads(json.dumps(changes))) == contract
    assert HAND.changes(HAND) == {}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cameras": ["a"]}, "is no contract"),
        ({**HAND.to_dict(), "gripper": "open"}, "gripper is 'open'; choose one of environment"),
        ({**HAND.to_dict(), "force": 1}, "is no contract"),
        ({**HAND.to_dict(), "pictures": {"orientation": "tilted"}}, "orientation is 'tilted'"),
        ({**HAND.to_dict(), "action_size": 0}, "action_size is 0"),
        ({**HAND.to_dict(), "control_hz": 0}, "control_hz is 0"),
    ],
)
def test_what_is_no_contract_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Contract.from_dict(values)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("orientation", ["upright", "mirrored", "unknown"])
def test_pictures_are_turned_as_the_policys_data(name: str, orientation: str) -> None:
    """JPEG, size and crop are the protocol's, for policies whose pictures are turned as the protocol's."""
    offered = load_protocol(name).contract(HAND)
    view = fitted(replace(AGENT, pictures=Pictures(orientation)), offered)  # type: ignore[arg-type]
    if orientation in ("unknown", offered.pictures.orientation):
        assert view.pictures == offered.pictures
    else:
        assert view.pictures == Pictures(orientation)  # type: ignore[arg-type]
    assert view.cameras == ("agentview",)
    assert view.gripper == "environment"


def test_what_is_converted_is_told() -> None:
    offered = load_protocol("openvla").contract(HAND)
    assert readable_changes(fitted(AGENT, offered), offered) == (
        "pictures upright (instead of mirrored, JPEG, 224 px, crop 0.9)"
    )
    native = load_protocol("libero_native").contract(HAND)
    view = fitted(replace(AGENT, pictures=Pictures("unknown")), native)
    assert readable_changes(view, native) == "state hand (instead of joints)"
    assert readable_changes(native, native) == ""


@pytest.mark.parametrize(
    ("state", "size", "given"),
    [("hand", 8, "hand"), ("hand_padded", 9, "hand_padded"), ("joints", 9, "joints"), ("none", 3, "none")],
)
@pytest.mark.parametrize("name", ["openvla", "libero_native"])
def test_the_simulator_gives_every_layout_of_its_state(name: str, state: str, size: int, given: str) -> None:
    client = replace(AGENT, state=state, state_size=size)
    view = fitted(client, load_protocol(name).contract(HAND))
    assert (view.state, view.state_size) == (given, size)


def test_a_state_of_unknown_layout_is_the_one_offered_if_its_size_is() -> None:
    client = replace(AGENT, state="unknown")
    assert fitted(client, load_protocol("openvla").contract(HAND)).state == "hand"
    with pytest.raises(ContractError, match="layout 'unknown' with 8 numbers, the world gives 'joints' with 9"):
        fitted(client, load_protocol("libero_native").contract(HAND))


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        ({"action_size": 14, "action": "unknown"}, "gru gives 14 numbers per action, recall takes 7"),
        ({"action": "joints"}, "gru gives actions of kind 'joints', recall takes 'hand'"),
        ({"cameras": ("wrist",)}, "gru looks through wrist, recall shows agentview and lacks wrist"),
        ({"state": "other"}, "gru reads a state of layout 'other' with 8 numbers, recall gives 'hand' with 8"),
        ({"state": "hand", "state_size": 7}, "layout 'hand' with 7 numbers, recall gives 'hand' with 8"),
        ({"control_hz": 5.0}, "gru acts at 5 Hz, recall runs at 20 Hz"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_line_that_names_both(
    client: dict[str, object], reason: str
) -> None:
    with pytest.raises(ContractError, match=reason) as refused:
        fitted(replace(AGENT, **client), load_protocol("recall").contract(HAND), "gru", "recall")  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_an_unknown_rate_or_kind_of_action_is_taken_for_the_worlds() -> None:
    offered = load_protocol("recall").contract(HAND)
    assert fitted(replace(AGENT, action="unknown", control_hz=None), offered).control_hz == 20


def test_grippers_are_converted_there_and_back() -> None:
    played = np.array([[0.1] * 6 + [-1.0], [0.2] * 6 + [1.0]])
    spoken = from_environment(played, "open_is_one")
    assert spoken[:, -1].tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(to_environment(spoken, "open_is_one"), played)
    for same in ("environment", "none"):
        assert to_environment(played, same) is played  # type: ignore[arg-type]


def test_a_mixture_knows_what_its_parts_agree_in() -> None:
    mirrored = replace(HAND, pictures=Pictures("mirrored"), control_hz=5.0)
    assert common([HAND, HAND]) == HAND
    assert common([HAND, mirrored]) == replace(HAND, pictures=Pictures("unknown"), control_hz=None)


@given(
    arrays(np.float32, (5, 2), elements=st.floats(-4, 4, width=32)),
    arrays(np.float32, 2, elements=st.floats(-1, 1, width=32)),
)
def test_limits_hold_and_change_nothing_within_them(
    actions: npt.NDArray[np.float32], before: npt.NDArray[np.float32]
) -> None:
    limits = Limits(low=(-1.0, -1.0), high=(1.0, 1.0), change=(0.5, 10.0))
    kept = limits.kept(actions, before)
    assert kept.dtype == np.float32
    assert (np.abs(kept) <= 1).all()
    assert (np.abs(np.diff([before, *kept], axis=0))[:, 0] <= 0.5 + 1e-6).all()
    assert np.array_equal(limits.kept(kept, before), kept)
    assert np.array_equal(kept[:, 1], actions[:, 1].clip(-1, 1)), "its change is wide enough"
    assert np.array_equal(Limits().kept(actions, before), actions)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"low": (1.0,), "high": (0.0,)}, "low must be below"),
        ({"change": (-1.0,)}, "at least 0"),
        ({"high": (float("nan"),)}, "give numbers"),
    ],
)
def test_limits_that_cannot_be(values: dict[str, tuple[float, ...]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Limits(**values)


def test_limits_are_of_the_contracts_actions() -> None:
    with pytest.raises(ValueError, match=r"limits.high has 2 numbers; actions have 7"):
        replace(HAND, limits=Limits(high=(1.0, 1.0)))
    limited = replace(HAND, limits=Limits(high=(1.0,) * 7))
    assert Contract.from_dict(json.loads(json.dumps(limited.to_dict()))) == limited
    assert "limits" not in HAND.to_dict(), "policies that have none stay as they were saved"
    assert HAND.changed(limited.changes(HAND)) == limited
    assert limited.changed(HAND.changes(limited)) == HAND


def test_the_limits_of_both_sides_hold() -> None:
    low, high = (-1.0,) * 7, (1.0,) * 7
    robot = replace(HAND, limits=Limits(low=(-0.5,) * 7, high=(2.0,) * 7))
    world = replace(HAND, limits=Limits(low=low, high=high, change=(0.1,) * 7))
    assert fitted(robot, HAND).limits == robot.limits
    assert fitted(HAND, world).limits == world.limits
    assert fitted(robot, world).limits == Limits((-0.5,) * 7, high, (0.1,) * 7)
    assert fitted(HAND, HAND).limits is None
    openvla = fitted(replace(HAND, gripper="open_is_one"), world)
    assert openvla.limits == Limits((-1.0,) * 6 + (-np.inf,), (1.0,) * 6 + (np.inf,), (0.1,) * 6 + (np.inf,))
    with pytest.raises(ContractError, match="limits that exclude each other"):
        fitted(robot, replace(HAND, limits=Limits(high=(-0.6,) * 7)))
