"""What the state machine decides is what the camera shows and the arm obeys, in the very next frame."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])
FORWARD = np.array([1.0, 0, 0, 0, 0, 0, 1.0])


def yellow_pixels(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red > 150) & (green > 150) & (blue < 100)).sum())


def cyan_pixels(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return int(((red < 80) & (green > 120) & (blue > 120)).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cue_shows_on_the_first_frames_and_never_again(simulator_of, seed):
    simulator = simulator_of("recall")
    simulator.reset(seed)
    lit, lamp = [], []
    for _ in range(20):
        picture = simulator.observe().images["agentview"]
        lit.append(yellow_pixels(picture) > 10)
        lamp.append(cyan_pixels(picture) > 10)
        simulator.step(STILL)
    assert lit == [True] * 5 + [False] * 15
    assert lamp == [False] * 15 + [True] * 5


def test_without_the_cue_nothing_tells_the_buttons_apart(simulator_of):
    """The same layout with another cue looks the same once the cue is over: the policy has to remember."""
    simulator = simulator_of("recall")
    pictures = []
    for cue in range(3):
        simulator.reset(0)
        simulator.problem.machine.cue = cue
        for _ in range(15):
            simulator.step(STILL)
        pictures.append(simulator.frame(64))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_the_arm_is_locked_until_the_lamp(simulator_of):
    simulator = simulator_of("recall")
    simulator.reset(0)
    start = simulator.observe().proprio[:3]
    for _ in range(15):
        simulator.step(FORWARD)
    np.testing.assert_allclose(simulator.observe().proprio[:3], start, atol=1e-3)
    for _ in range(10):
        simulator.step(FORWARD)
    assert simulator.observe().proprio[0] > start[0] + 0.02


def test_instruction_and_details_tell_the_episode(simulator_of):
    simulator = simulator_of("recall")
    instructions = set()
    for seed in range(12):
        simulator.reset(seed)
        instructions.add(simulator.observe().instruction)
        assert simulator.details()["cue"] in simulator.task.names
        assert simulator.details()["pressed"] == []
    assert len(instructions) > 1
    assert instructions <= set(simulator.task.phrasings)
