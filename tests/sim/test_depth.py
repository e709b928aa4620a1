"""Geometry of pictures, in the real simulators: where things are, drawn only when somebody asks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipvla.contract import HAND, SIMULATED_HAND, Pictures
from ipvla.geometry import DEPTH_UNIT_M, unpacked
from ipvla.sim.demonstration import Demonstration, Showing
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import load_protocol
from ipvla.sim.suites import load_suite

SIZE = 128
CAMERAS = ("agentview", "robot0_eye_in_hand")


@pytest.fixture(scope="module")
def buttons(suite):
    simulator = suite.simulator("ground_red", SIZE, CAMERAS)
    yield simulator
    simulator.close()


def down(simulator, steps=20):
    for _ in range(steps):
        simulator.step(np.array([0.4, 0.3, -0.6, 0, 0, 0.2, -1.0]))


def test_buttons_are_where_the_world_has_them(buttons):
    """The mean of what is visible of a button's upper side; the hand is away from the table."""
    for seed in (1, 2):
        buttons.reset(seed)
        points = buttons.observe(geometry=True).geometry["agentview"].points()
        for index in range(len(buttons.task.names)):
            top = buttons.problem.top_m(index)
            level = np.abs(points[..., 2] - top[2]) < 5e-4
            of_it = points[level & (np.linalg.norm(points[..., :2] - top[:2], axis=-1) < 0.06)]
            assert len(of_it) > 50
            assert np.linalg.norm(of_it.mean(0) - top) < 2e-3


def test_the_wrist_sees_the_same_table_wherever_it_goes(buttons):
    buttons.reset(1)
    poses = []
    for _ in range(2):
        seen = buttons.observe(geometry=True).geometry["robot0_eye_in_hand"]
        heights = seen.points()[..., 2]
        table = np.abs(heights - 0.9) < 5e-3
        assert table.mean() > 0.3
        assert np.abs(heights[table] - 0.9).mean() < 2e-4
        poses.append(seen.pose)
        down(buttons)
    assert np.linalg.norm(poses[0][:3, 3] - poses[1][:3, 3]) > 0.01


def test_asking_changes_neither_pictures_nor_what_follows(buttons):
    def played(asks: bool):
        buttons.reset(5)
        seen = []
        for _ in range(3):
            seen.append(buttons.observe(geometry=asks))
            down(buttons, 5)
        return seen, buttons.state()["physics"]

    (without, after), (asked, same) = played(False), played(True)
    assert all(one.geometry is None for one in without)
    assert np.array_equal(after, same)
    for one, other in zip(without, asked, strict=True):
        assert all(np.array_equal(one.images[name], other.images[name]) for name in CAMERAS)


@pytest.mark.parametrize("protocol", ["recall", "openvla"])
def test_points_lie_under_the_pixels_that_a_protocol_delivers(buttons, protocol):
    """A red button's pixels, in a picture that may be mirrored, resized and cropped, have its points."""
    rules = load_protocol(protocol)
    world = ProtocolSimulator(buttons, replace(rules, horizons={}), "recall")
    world.show(replace(rules.contract(SIMULATED_HAND), pictures=rules.pictures))
    world.reset(1)
    seen = world.observe()
    image, geometry = seen.images["agentview"].astype(int), seen.geometry["agentview"]
    assert geometry.depth.shape == image.shape[:2]
    red = (image[..., 0] > 120) & (image[..., 1] < 70) & (image[..., 2] < 70)
    points = geometry.points()[red]
    centre = buttons.problem.top_m([name.startswith("red") for name in buttons.task.names].index(True))
    assert red.sum() > 30
    assert np.median(np.linalg.norm(points - centre, axis=1)) < 0.045, "within its radius of 4 cm"
    turned = geometry.orientation == "mirrored"
    assert turned == (protocol == "openvla")
    if turned:
        assert geometry.intrinsics[0, 0] > 0


def test_terms_without_geometry_draw_none(buttons):
    world = ProtocolSimulator(buttons, load_protocol("recall"), "recall")
    world.reset(1)
    assert world.observe().geometry is None
    world.show(replace(HAND, cameras=("agentview",), pictures=Pictures(), geometry=True))
    assert set(world.observe().geometry) == {"agentview"}


def test_a_demonstration_keeps_what_was_asked_for(suite, simulator_of, tmp_path):
    simulator = simulator_of("ground_red")
    showing = Showing(pictures_every=25, geometry=True)
    made = (suite.demonstrate(simulator, seed, showing) for seed in range(5))
    demonstration = next(one for one in made if one is not None)
    kept = demonstration.geometry["agentview"]
    assert kept.depth.shape == demonstration.images["agentview"].shape[:3]
    simulator.reset(demonstration.seed)
    depth = simulator.observe(geometry=True).geometry["agentview"].depth
    np.testing.assert_allclose(unpacked(kept.depth[0]), np.where(depth < 6.5, depth, 0), atol=DEPTH_UNIT_M)
    demonstration.save(tmp_path / "one.npz")
    again = Demonstration.load(tmp_path / "one.npz").geometry["agentview"]
    for name in ("depth", "intrinsics", "pose"):
        assert np.array_equal(getattr(again, name), getattr(kept, name))


def test_collections_without_geometry_are_recorded_as_before():
    assert Showing().to_dict() == {"pictures_every": 1, "start_offset_m": 0.0}
    assert Showing(geometry=True).to_dict()["geometry"] is True


@pytest.mark.long
def test_libero_s_pixels_are_where_rays_from_the_camera_hit(standard_cache):
    """Every object's visible centre, from the point map and from MuJoCo's own ray casting."""
    simulator = load_suite("libero_spatial", standard_cache).simulator(
        load_suite("libero_spatial", standard_cache).tasks[0].name, SIZE, CAMERAS
    )
    import mujoco

    simulator.reset(2**31)
    problem = simulator.problem
    model, data = problem.sim.model._model, problem.sim._render_context_offscreen.data._data
    shown = problem.sim._render_context_offscreen.vopt.geomgroup
    geometry = simulator.observe(geometry=True).geometry
    for camera in CAMERAS:
        points, pose = geometry[camera].points(), geometry[camera].pose
        objects: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        every, inside = points[2::4, 2::4].reshape(-1, 3).astype(np.float64), []
        for point in every:
            ray, geom = point - pose[:3, 3], np.zeros(1, np.int32)
            share = mujoco.mj_ray(model, data, pose[:3, 3], ray, shown, 1, -1, geom)
            inside.append(abs(share - 1) * np.linalg.norm(ray))
            objects.setdefault(int(model.geom_bodyid[geom[0]]), []).append((point, pose[:3, 3] + share * ray))
        assert np.median(inside) < 1e-4
        for seen in objects.values():
            if len(seen) >= 8:
                drawn, hit = np.mean(seen, axis=0)
                assert np.linalg.norm(drawn - hit) < 2e-3
    simulator.close()
