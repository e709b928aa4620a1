"""A hand that is told to close closes, whoever tells it and by whatever protocol, in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.contract import Contract
from ipvla.rollout.policy_actor import PolicySource
from ipvla.sim.protocols import PROTOCOLS, load_protocol
from tests.sim.gripper_matrix import STANDARDS, Cell, gripper_matrix, gripper_right

PLAYERS = {*STANDARDS, "expert", "our server", "openpi server"}


def test_every_player_opens_and_closes_the_hand_under_every_protocol(tmp_path: Path) -> None:
    cells = gripper_matrix(tmp_path)
    assert {(cell.protocol, cell.player) for cell in cells} == {(p, name) for p in PROTOCOLS for name in PLAYERS}
    assert [cell for cell in cells if not cell.right] == []
    assert gripper_right(cells) == 1.0


def test_the_matrix_finds_policies_whose_gripper_is_converted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_the_protocol_says(source: PolicySource, offered: Contract, world: str = "") -> Contract:
        return offered

    monkeypatch.setattr(PolicySource, "view", as_the_protocol_says)
    cells = gripper_matrix(tmp_path, [load_protocol("openvla")])
    assert {cell.player for cell in cells if not cell.right} == set(STANDARDS)
    assert gripper_right(cells) == pytest.approx(3 / 7)


@pytest.mark.long
@pytest.mark.slow
def test_they_do_in_liberos_own_suites(standard_cache: Path) -> None:
    protocols = [load_protocol(name) for name in ("openvla", "openpi", "libero_native")]
    task = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    assert gripper_right(gripper_matrix(standard_cache, protocols, "libero_object", task)) == 1.0


def test_a_player_is_right_if_it_is_right_about_both_words() -> None:
    cells = [
        Cell("openvla", "gru", "open", 0.079),
        Cell("openvla", "gru", "close", 0.002),
        Cell("openvla", "other", "open", 0.079),
        Cell("openvla", "other", "close", 0.079),
    ]
    assert [cell.right for cell in cells] == [True, True, True, False]
    assert gripper_right(cells) == 0.5
