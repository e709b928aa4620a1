"""Perturbations of a real world: each changes what it says and nothing else, and is undone to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.rollout.sim_worker import SuiteSimulators
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.perturbations import DIMENSIONS, CameraConfig, perturbation_config
from ipvla.sim.protocols import load_protocol
from ipvla.sim.simulator import Split
from ipvla.sim.suite import Suite
from ipvla.sim.suites import load_suite

pytestmark = pytest.mark.slow

SUITE, TASK, SIZE = "libero_object", "pick_up_the_alphabet_soup_and_place_it_in_the_basket", 64
AGENT, WRIST = "agentview", "robot0_eye_in_hand"
OWN = "pick up the alphabet soup and place it in the basket"
SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])
Seen = Mapping[str, Any]


@pytest.fixture(scope="module")
def suite(standard_cache: Path) -> Suite:
    return load_suite(SUITE, standard_cache)


@pytest.fixture(scope="module")
def simulator(suite: Suite) -> Iterator[LiberoSimulator]:
    built = suite.simulator(TASK, SIZE, (AGENT, WRIST))
    assert isinstance(built, LiberoSimulator)
    yield built
    built.close()


@pytest.fixture(scope="module")
def untouched(simulator: LiberoSimulator) -> Seen:
    """The episode before anything was perturbed; every test asks for it, so it comes first."""
    return played(simulator)


def played(simulator: LiberoSimulator, trial: int = 3, steps: int = 10) -> Seen:
    """The beginning of an episode, and what is seen once it has settled."""
    simulator.reset(Split.HELD_OUT.seed(trial))
    begun = np.array(simulator.problem.sim.get_state().flatten())
    for _ in range(steps):
        simulator.step(SETTLE)
    seen = simulator.observe()
    settled = np.array(simulator.problem.sim.get_state().flatten())
    return {"begun": begun, "settled": settled, "proprio": seen.proprio, "said": seen.instruction, **seen.images}


def perturbed(suite: Suite, simulator: LiberoSimulator, dimension: str, level: int = 5, **where: int) -> Seen:
    assert suite.perturb is not None
    suite.perturb(simulator, perturbation_config(dimension, level).build(SUITE))
    try:
        return played(simulator, **where)
    finally:
        suite.perturb(simulator, None)


def differing(one: Seen, other: Seen) -> set[str]:
    return {name for name in one if not np.array_equal(one[name], other[name])}


@pytest.mark.parametrize(
    ("dimension", "changed"),
    [
        ("camera", {AGENT}),
        ("light", {AGENT, WRIST}),
        ("noise", {AGENT}),
        ("language", {"said"}),
        ("robot", {AGENT, WRIST, "begun", "settled", "proprio"}),
    ],
)
def test_a_dimension_changes_what_it_says_and_nothing_else(
    suite: Suite, simulator: LiberoSimulator, untouched: Seen, dimension: str, changed: set[str]
) -> None:
    first = perturbed(suite, simulator, dimension)
    assert differing(first, untouched) == changed
    assert differing(played(simulator), untouched) == set(), "undone to the last bit"
    perturbed(suite, simulator, "light", trial=8)
    assert differing(perturbed(suite, simulator, dimension), first) == set(), "the same after any other"


def test_the_arm_starts_as_far_off_as_drawn_stays_there_and_leaves_the_objects_alone(
    suite: Suite, simulator: LiberoSimulator, untouched: Seen
) -> None:
    robot = simulator.problem.robots[0]
    joints = 1 + np.array(robot._ref_joint_pos_indexes)  # a flattened state begins with the time
    others = np.setdiff1d(np.arange(1, 1 + simulator.problem.sim.model.nq), joints)
    for level in (1, 5):
        seen = perturbed(suite, simulator, "robot", level)
        offset = seen["begun"][joints] - untouched["begun"][joints]
        assert np.linalg.norm(offset) == pytest.approx(0.1 * level, abs=1e-6)
        np.testing.assert_array_equal(seen["begun"][others], untouched["begun"][others])
        settled = seen["settled"][joints] - seen["begun"][joints]
        assert np.linalg.norm(settled) < 0.03, "it does not go back to where it would have been"


def test_levels_look_ever_less_like_the_unperturbed_picture(
    suite: Suite, simulator: LiberoSimulator, untouched: Seen
) -> None:
    for dimension in ("camera", "light", "noise"):
        weak, strong = (perturbed(suite, simulator, dimension, level)[AGENT].astype(float) for level in (1, 5))
        unlike = [np.abs(one - untouched[AGENT]).mean() for one in (weak, strong)]
        assert 0.5 < unlike[0] < unlike[1], dimension


def test_a_noisy_picture_is_the_same_at_the_same_step_and_another_one_at_the_next(
    suite: Suite, simulator: LiberoSimulator, untouched: Seen
) -> None:
    assert suite.perturb is not None
    noise = perturbation_config("noise", 4)
    trial = next(
        t for t in range(40) if noise.build(SUITE).change(TASK, Split.HELD_OUT.seed(t)).corruption == "fog"
    )  # type: ignore[attr-defined]
    suite.perturb(simulator, noise.build(SUITE))
    simulator.reset(Split.HELD_OUT.seed(trial))
    for _ in range(10):
        simulator.step(SETTLE)
    first, again = simulator.observe().images[AGENT], simulator.observe().images[AGENT]
    np.testing.assert_array_equal(first, again)
    simulator.step(SETTLE)
    assert np.abs(simulator.observe().images[AGENT].astype(float) - first).mean() > 1
    suite.perturb(simulator, None)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_an_episode_goes_on_perturbed_where_its_state_was_saved(
    suite: Suite, simulator: LiberoSimulator, untouched: Seen, dimension: str
) -> None:
    assert suite.perturb is not None
    suite.perturb(simulator, perturbation_config(dimension, 4).build(SUITE))
    played(simulator, trial=2, steps=3)
    saved, drawn = simulator.state(), simulator.details()
    before = simulator.observe()
    simulator.step(SETTLE)
    after = simulator.observe()
    played(simulator, trial=6, steps=2)
    assert simulator.details() != drawn
    simulator.restore(saved)
    assert simulator.details() == drawn
    for expected in (before, after):
        seen = simulator.observe()
        for camera in (AGENT, WRIST):
            np.testing.assert_array_equal(seen.images[camera], expected.images[camera])
        np.testing.assert_array_equal(seen.proprio, expected.proprio)
        assert seen.instruction == expected.instruction
        simulator.step(SETTLE)
    suite.perturb(simulator, None)


def test_it_composes_with_a_protocol_and_its_episodes_say_what_was_drawn(
    standard_cache: Path, untouched: Seen
) -> None:
    """By "openvla": pictures are turned and cut after they were perturbed, settling does not count."""
    config = CameraConfig(level=5)
    opened = SuiteSimulators(standard_cache, protocol=load_protocol("openvla"), perturbation=config)(SUITE, TASK)
    opened.reset(Split.HELD_OUT.seed(3))
    seen = opened.observe()
    assert seen.t == 0
    assert seen.images[AGENT].shape == (224, 224, 3)
    assert opened.details() == config.change(TASK, Split.HELD_OUT.seed(3)).drawn
    frame: npt.NDArray[np.uint8] = opened.frame(SIZE)
    assert np.abs(frame.astype(float) - untouched[AGENT]).mean() > 5, "videos show it too"
    opened.close()
