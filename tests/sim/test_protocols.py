"""Protocols are data: named, versioned, compared field by field, and results of different ones are kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from evaluators.paired import compare
from evaluators.success import SuccessConfig
from evaluators.success_table import SuccessTable, tabulate
from ipvla.sim.protocol_simulator import preprocess
from ipvla.sim.protocols import PROTOCOLS, EvaluationProtocol, ProtocolError, diff, load_protocol
from ipvla.sim.simulator import Task
from ipvla.types import EpisodeResult, EpisodeSpec

SIZE = 32


def gradient() -> npt.NDArray[np.uint8]:
    """uint8 [32, 32, 3]: red grows to the right, green downwards."""
    ramp = np.linspace(0, 248, SIZE)
    red, green = np.meshgrid(ramp, ramp)
    return np.stack([red, green, np.full_like(red, 90)], -1).astype(np.uint8)


def test_a_protocol_is_told_apart_from_what_was_changed_in_it() -> None:
    assert len({str(protocol) for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    openvla = load_protocol("openvla")
    assert str(openvla) == f"openvla-1+{openvla.fingerprint}"
    assert replace(openvla, crop_area=0.8).fingerprint != openvla.fingerprint
    assert replace(openvla, world_seed=7).fingerprint != openvla.fingerprint
    assert replace(openvla).fingerprint == openvla.fingerprint


def test_a_diff_names_what_differs_and_nothing_else() -> None:
    openvla, oft = load_protocol("openvla"), load_protocol("oft")
    assert diff(openvla, openvla) == {}
    assert diff(openvla, oft) == {
        "name": ("openvla", "oft"),
        "cameras": (("agentview",), ("agentview", "robot0_eye_in_hand")),
        "execute": (1, 8),
    }


def test_horizons_settling_and_seeds_are_those_of_the_published_evaluations() -> None:
    assert load_protocol("openvla").horizon("libero_10", 0) == 520
    assert load_protocol("lerobot").horizon("libero_spatial", 0) == 280
    assert load_protocol("libero_native").horizon("libero_goal", 0) == 600
    assert load_protocol("recall").horizon("recall", 77) == 77
    assert load_protocol("openvla").settle_action == (0, 0, 0, 0, 0, 0, -1)
    seeds = {name: protocol.world_seed for name, protocol in PROTOCOLS.items() if protocol.world_seed}
    assert seeds == {"openpi": 7, "lerobot": 1000}


def test_what_does_not_exist_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'openpie' is no protocol; did you mean 'openpi'"):
        load_protocol("openpie")
    with pytest.raises(ProtocolError, match="openvla says nothing of suite recall; it covers libero_spatial"):
        SuccessConfig(protocol="openvla")
    for wrong, message in (
        ({"crop_area": 0.0}, "crop_area is 0.0"),
        ({"orientation": "tilted"}, "orientation is 'tilted'; choose among"),
        ({"execute": 0}, "execute is 0"),
        ({"settle_steps": -1}, "settle_steps is -1"),
        ({"world_seed": -1}, "world_seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationProtocol("mine", 1, **wrong)  # type: ignore[arg-type]


def test_every_suite_has_a_protocol_of_its_own() -> None:
    assert SuccessConfig().played_by.name == "recall"
    assert SuccessConfig(suite="libero_goal").played_by.name == "openvla"
    assert SuccessConfig(suite="libero_goal", protocol="oft").played_by.execute == 8


def test_results_of_different_protocols_are_compared_only_if_asked_for() -> None:
    task = Task("press", "ground", ("press it",), horizon=10, chance=0.0)
    result = EpisodeResult(EpisodeSpec("s", "press", 1, 0), "success", 3, 1, 0.1, 0.0)

    def table(policy: str, protocol: str) -> SuccessTable:
        return tabulate(policy, [task], [result], {"protocol": protocol})

    one, other = table("a", "openvla-1"), table("b", "openpi-1")
    with pytest.raises(ProtocolError, match="a was played by protocol openvla-1, b by openpi-1"):
        compare(one, other, [task])
    assert compare(one, other, [task], across_protocols=True)[0].pairs == 1
    assert compare(one, table("b", "openvla-1"), [task])[0].pairs == 1


class TestPictures:
    def test_the_embedded_suites_are_left_as_they_are(self) -> None:
        np.testing.assert_array_equal(preprocess(gradient(), load_protocol("recall").pictures), gradient())

    def test_they_are_turned_as_the_public_scripts_turn_opengls(self) -> None:
        upright = gradient()
        opengl = upright[::-1]
        mirrored = preprocess(upright, EvaluationProtocol("mine", 1, orientation="mirrored").pictures)
        np.testing.assert_array_equal(mirrored, opengl[::-1, ::-1])
        upside_down = preprocess(upright, load_protocol("libero_native").pictures)
        np.testing.assert_array_equal(upside_down, opengl)

    @pytest.mark.parametrize("method", ["lanczos", "bilinear"])
    def test_they_are_resized_without_a_shift(self, method: str) -> None:
        small = preprocess(gradient(), EvaluationProtocol("mine", 1, size=16, resize=method).pictures)
        assert small.shape == (16, 16, 3)
        np.testing.assert_allclose(small[4:-4, 4:-4, 0], gradient()[8:-8:2, 8:-8:2, 0] + 4.0, atol=3)

    def test_a_crop_keeps_the_centre_and_cuts_the_margins_in_proportion(self) -> None:
        cropped = preprocess(gradient(), EvaluationProtocol("mine", 1, crop_area=0.25).pictures).astype(int)
        assert cropped.shape == (SIZE, SIZE, 3)
        assert cropped[16, 16, 0] == pytest.approx(gradient()[16, 16, 0], abs=4)
        assert cropped[0, 0, 0] == pytest.approx(248 * 0.25, abs=2), "half the side is left around the centre"
        assert cropped[-1, -1, 1] == pytest.approx(248 * 0.75, abs=2)

    def test_jpeg_leaves_its_traces_and_no_more(self) -> None:
        through = preprocess(gradient(), EvaluationProtocol("mine", 1, jpeg=True).pictures).astype(int)
        error = np.abs(through - gradient())
        assert 0 < error.max() < 25
        assert error.mean() < 4
