"""Points from depth: against public code's outputs (`geometry.safetensors`), and what any camera must obey.

The file holds a MuJoCo scene's z-buffer (bottom row first, planes at 5.5 mm and 27.5 m) with its point maps and
the centres of two spheres and a box; and LLaVA-3D's un-projection (ZCMax/LLaVA-3D 91d979d), whose pixels have
their centres at whole numbers.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ipvla.contract import HAND, SIMULATED_HAND, ContractError, Pictures, fitted
from ipvla.geometry import DEPTH_UNIT_M, CameraGeometry, packed, pinhole, unpacked
from ipvla.sim.suites import SUITES

REFERENCE = load_file(Path(__file__).parent / "geometry.safetensors")
NEAR_M, FAR_M = 0.0054999998770654205, 27.5
RADIUS_M = 0.05


@pytest.fixture(scope="module")
def scene() -> CameraGeometry:
    z = REFERENCE["mujoco/depth_buffer_raw"][::-1].astype(np.float64)
    depth = (NEAR_M / (1 - z * (1 - NEAR_M / FAR_M))).astype(np.float32)
    return CameraGeometry(depth, REFERENCE["mujoco/K"], REFERENCE["mujoco/cam2world"])


def sphere_centre(points: np.ndarray) -> np.ndarray:
    """Least squares: |p|^2 = 2 c p + (r^2 - |c|^2) is linear in the centre c."""
    system = np.concatenate([2 * points, np.ones((len(points), 1))], 1).astype(np.float64)
    return np.linalg.lstsq(system, (points.astype(np.float64) ** 2).sum(1), rcond=None)[0][:3]


def test_points_are_those_of_the_reference(scene):
    points = scene.points()
    np.testing.assert_allclose(points, REFERENCE["mujoco/points_upright"], atol=1e-4)
    mirrored = scene.shown(Pictures("mirrored"))
    rotated = REFERENCE["mujoco/points_for_image_rotated_180"]
    np.testing.assert_allclose(mirrored.points()[::-1], rotated, atol=1e-4)
    assert np.array_equal(mirrored.intrinsics, scene.intrinsics)


def test_spheres_are_where_the_scene_has_them(scene):
    points = scene.points().reshape(-1, 3)
    for centre in REFERENCE["mujoco/objects"][:2]:
        of_it = points[np.linalg.norm(points - centre, axis=1) < RADIUS_M + 1e-3]
        assert np.linalg.norm(sphere_centre(of_it) - centre) < 2e-3


def test_points_are_llava_3ds():
    for view in range(2):
        intrinsics = REFERENCE["llava3d/K"][0, view, :3, :3].astype(np.float64)
        intrinsics[:2, 2] += 0.5
        pose = REFERENCE["llava3d/cam2world"][0, view].astype(np.float64)
        seen = CameraGeometry(REFERENCE["llava3d/depth"][0, view], intrinsics, pose)
        np.testing.assert_allclose(seen.points(), REFERENCE["llava3d/xyz_full"][0, view], atol=1e-6)


def projected(points: np.ndarray, seen: CameraGeometry) -> np.ndarray:
    """Where a camera shows points [..., 3]: column and row in pixels of the upright picture."""
    rotation, place = seen.pose[:3, :3], seen.pose[:3, 3]
    x, y, z = np.moveaxis((points - place) @ rotation @ seen.intrinsics.T, -1, 0)
    return np.stack([x / z, y / z], -1)


@st.composite
def cameras(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation * np.linalg.det(rotation), rng.normal(size=3)
    depth = rng.uniform(0.2, 3, (height, width)).astype(np.float32)
    return CameraGeometry(depth, pinhole(draw(st.floats(20, 100)), height, width), pose)


@settings(max_examples=30)
@given(cameras(), st.integers(1, 30), st.floats(0.3, 1), st.sampled_from(["upright", "mirrored", "upside_down"]))
def test_delivered_intrinsics_show_each_point_in_its_own_pixel(seen, size, area, orientation):
    delivered = seen.shown(Pictures(orientation, size=size, crop_area=area))
    points = delivered.points()
    upright = {"upright": points, "mirrored": points[:, ::-1], "upside_down": points[::-1]}[orientation]
    at = projected(upright.astype(np.float64), delivered)
    row, column = np.mgrid[:size, :size]
    assert np.abs(at - np.stack([column, row], -1) - 0.5).max() < 1e-3
    # the depth is that of the old pixel that the new one's middle lies in
    old = projected(upright.astype(np.float64), seen)
    inside = np.abs(old - np.rint(old)).min(-1) > 1e-3
    c, r = np.floor(old[inside]).astype(int).T
    assert np.array_equal(seen.depth[r, c], delivered.depth[inside])


@settings(max_examples=30)
@given(cameras(), st.integers(1, 8))
def test_a_patch_has_the_point_of_a_pixel_in_its_middle(seen, side):
    patches, every = seen.points(side), seen.points()
    height, width = seen.depth.shape
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in (height, width))
    assert np.array_equal(patches, every[np.ix_(rows, columns)])


def test_what_is_unknown_has_no_point(scene):
    depth = scene.depth.copy()
    depth[3, 5] = 0
    points = CameraGeometry(depth, scene.intrinsics, scene.pose).points()
    assert np.argwhere(np.isnan(points).any(-1)).tolist() == [[3, 5]]
    with pytest.raises(ValueError, match=r"recording\.json"):
        scene.shown(Pictures("unknown")).points()
    with pytest.raises(ValueError, match=r"pose is \(3, 3\)"):
        CameraGeometry(depth, scene.intrinsics, scene.intrinsics)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=20))
def test_sixteen_bits_keep_depth_to_half_a_unit_or_say_that_it_is_unknown(metres):
    depth = np.array(metres, np.float32)
    kept = unpacked(packed(depth))
    known = kept > 0
    assert np.abs(kept - depth)[known].max(initial=0) <= DEPTH_UNIT_M * 0.51
    assert (depth[~known] > 6.55).sum() + (depth[~known] < DEPTH_UNIT_M).sum() == (~known).sum()


def test_whoever_reads_geometry_plays_where_it_is_given():
    reads = SIMULATED_HAND
    assert fitted(reads, SUITES["recall"].facts.contract).geometry
    assert not fitted(HAND, SIMULATED_HAND).geometry
    with pytest.raises(ContractError, match="the policy reads depth, which gym does not give"):
        fitted(reads, HAND, world="gym")


def test_terms_without_geometry_are_written_as_they_were():
    assert "geometry" not in HAND.to_dict()
    assert fitted(HAND, SIMULATED_HAND).changes(SIMULATED_HAND) == {}, "results of pictures alone stay theirs"
    assert type(HAND).from_dict(SIMULATED_HAND.to_dict()) == SIMULATED_HAND
