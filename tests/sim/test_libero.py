"""The simulator is a function of the seed and the actions, and renders only what it is asked for."""

import gc
import hashlib
import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

pytestmark = pytest.mark.slow

SEED = 12


def watch(simulator, actions, seed=SEED):
    """Frames uint8 [T, 64, 64, 3] and proprio float32 [T, 8] of an episode, its reset included."""
    simulator.reset(seed)
    frames, proprio = [], []
    for action in actions:
        observation = simulator.observe()
        frames.append(observation.images["agentview"])
        proprio.append(observation.proprio)
        simulator.step(action)
    return np.stack(frames), np.stack(proprio)


def digest(frames, proprio):
    return hashlib.sha256(frames.tobytes() + proprio.tobytes()).hexdigest()


@pytest.mark.parametrize("task", ["ground_red", "recall", "count_red2_blue1", "place"])
def test_a_seed_gives_the_same_episode_whatever_ran_before(simulator_of, actions, task):
    simulator = simulator_of(task)
    first = watch(simulator, actions)
    watch(simulator, actions[::-1][:33], seed=3)
    simulator.frame(300)
    np.random.seed(99)
    second = watch(simulator, actions)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert len(np.unique(first[1][:, 2])) > 40, "the arm must have moved"


def test_another_process_gives_the_same_episode_and_says_nothing(simulator_of, actions, tmp_path):
    np.save(tmp_path / "actions.npy", actions)
    code = f"""
import numpy as np
from pathlib import Path
from ipvla.sim.suites import load_suite
from tests.sim.test_libero import digest, watch
simulator = load_suite("recall", Path({str(tmp_path / "cache")!r})).simulator("count_red2_blue1")
print(digest(*watch(simulator, np.load({str(tmp_path / "actions.npy")!r}))))
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "LIBERO_CONFIG_PATH"} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.split() == [digest(*watch(simulator_of("count_red2_blue1"), actions))]
    assert not (home / ".libero").exists()


def test_looking_does_not_change_the_world(simulator_of, actions):
    simulator = simulator_of("ground_red")
    watch(simulator, actions)
    seen = simulator.state()
    simulator.reset(SEED)
    for action in actions:
        simulator.step(action)
    unseen = simulator.state()
    for name, values in seen.items():
        np.testing.assert_array_equal(values, unseen[name])


@pytest.mark.parametrize(
    ("task", "at"),
    [
        ("recall", 0),
        ("recall", 3),
        ("ground_red", 0),
        ("count_red2_blue1", 30),
        ("place", 40),
        ("order_3", 10),
        ("cups", 3),
        ("cups", 34),
        ("cups", 56),
        ("chase", 30),
        ("shuffle", 30),
    ],
)
def test_a_restored_state_has_the_same_future(simulator_of, suite, actions, task, at):
    simulator = simulator_of(task)
    frames, proprio = watch(simulator, actions)
    simulator.reset(SEED)
    for action in actions[:at]:
        simulator.step(action)
    saved = simulator.state()
    assert all(values.dtype == np.float64 for values in saved.values())
    other = suite.simulator(task)
    simulator.reset(4)
    for world in (simulator, other):
        world.restore(saved)
        for t in range(at, len(actions)):
            observation = world.observe()
            assert observation.t == t
            np.testing.assert_array_equal(observation.images["agentview"], frames[t])
            np.testing.assert_array_equal(observation.proprio, proprio[t])
            world.step(actions[t])
    other.close()


def test_a_state_of_another_task_is_refused(simulator_of):
    with pytest.raises(ValueError, match=r"does not fit task place"):
        simulator_of("place").restore(simulator_of("ground_red").state())


def test_pictures_are_rendered_only_when_asked_for(simulator_of, actions, monkeypatch):
    rendered = []
    render = mujoco.mjr_render
    monkeypatch.setattr(
        mujoco, "mjr_render", lambda *args, **kwargs: (rendered.append(1), render(*args, **kwargs))
    )
    simulator = simulator_of("ground_red")
    simulator.reset(SEED)
    for action in actions[:10]:
        simulator.step(action)
    simulator.restore(simulator.state())
    assert len(rendered) == 0
    simulator.observe()
    assert len(rendered) == 1
    simulator.frame(128)
    assert len(rendered) == 2


def test_a_picture_is_what_robosuites_camera_gives_turned_upright(simulator_of, actions):
    simulator = simulator_of("ground_red")
    simulator.reset(SEED)
    for action in actions[:20]:
        simulator.step(action)
    seen = simulator.observe().images["agentview"]
    simulator.problem.sim.forward()
    (camera,), _ = simulator.problem._create_camera_sensors("agentview", 64, 64, cam_d=False, cam_segs=None)
    np.testing.assert_array_equal(seen, camera({})[::-1])
    assert seen.flags.c_contiguous
    # Upright: the arm hangs into the picture from above.
    background = np.median(simulator.frame(64), axis=(0, 1))
    assert np.abs(seen[:20] - background).sum() > 0
    assert simulator.frame(128).shape == (128, 128, 3)


def test_proprioception_is_liberos(simulator_of, actions):
    simulator = simulator_of("ground_red")
    simulator.reset(SEED)
    for action in actions[:20]:
        simulator.step(action)
    import robosuite.utils.transform_utils as transforms

    problem = simulator.problem
    sensors = {name: o._sensor for name, o in problem.robots[0].setup_observables().items()}
    axis_angle = transforms.quat2axisangle(sensors["robot0_eef_quat"]({}))
    expected = np.concatenate([sensors["robot0_eef_pos"]({}), axis_angle, sensors["robot0_gripper_qpos"]({})])
    proprio = simulator.observe().proprio
    assert proprio.dtype == np.float32
    np.testing.assert_allclose(proprio, expected, atol=1e-6)


def test_simulators_in_one_process_do_not_draw_into_each_other(simulator_of, suite):
    first = simulator_of("ground_red")
    first.reset(SEED)
    picture = first.frame(64)
    second = suite.simulator("place")
    assert not np.array_equal(second.frame(64), picture)
    np.testing.assert_array_equal(first.frame(64), picture)
    # Left to the garbage collector in a cycle, while the first one's context is current.
    second.itself = second
    del second
    gc.collect()
    np.testing.assert_array_equal(first.frame(64), picture)


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_a_malformed_action_is_refused(simulator_of, action):
    simulator = simulator_of("ground_red")
    simulator.reset(SEED)
    with pytest.raises(ValueError, match="7 finite numbers"):
        simulator.step(action)
    assert simulator.observe().t == 0


def test_a_camera_size_must_be_positive(suite):
    with pytest.raises(ValueError, match="camera_size 0"):
        suite.simulator("ground_red", camera_size=0)


@pytest.mark.skipif(os.environ.get("MUJOCO_GL", "osmesa") != "osmesa", reason="asks OSMesa what is current")
def test_a_closed_simulator_leaves_no_context_behind(suite):
    """A freed context that stayed current would be flushed by the next one: memory is corrupted."""
    from OpenGL import osmesa

    simulator = suite.simulator("ground_red")
    simulator.observe()
    assert osmesa.OSMesaGetCurrentContext()
    simulator.close()
    assert not osmesa.OSMesaGetCurrentContext()
