"""Geometry that is recorded is read again: from RLDS, and from what becomes of it in LeRobot's format and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ipvla.contract import Pictures
from ipvla.data.conversion import ConversionConfig
from ipvla.data.conversion.work import Conversion, convert_part, tasks_of_part
from ipvla.data.dataset import EpisodeDataset, open_dataset
from ipvla.data.geometry import GeometryConfig, PointTerms
from ipvla.data.lerobot import VideoSettings
from ipvla.data.rlds import write_rlds
from ipvla.data.source import BrokenEpisodeError, DatasetError
from ipvla.geometry import DEPTH_UNIT_M, CameraGeometry, RecordedGeometry, pinhole
from ipvla.types import Episode

SIZE, LENGTH = 8, 4
CAMERAS = ("agentview", "robot0_eye_in_hand")


def looks(seed: int) -> list[CameraGeometry]:
    """Of a camera that moves."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (LENGTH, 1, 1))
    poses[:, :3, 3] = rng.normal(size=(LENGTH, 3))
    depth = rng.uniform(0.3, 2, (LENGTH, SIZE, SIZE)).astype(np.float32)
    depth[:, 0, 0] = 0
    return [CameraGeometry(d, pinhole(50 + seed, SIZE, SIZE), p) for d, p in zip(depth, poses, strict=True)]


def recorded(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        *("put", "place", "put it there", seed),
        {camera: rng.integers(0, 255, (LENGTH, SIZE, SIZE, 3)).astype(np.uint8) for camera in CAMERAS},
        rng.normal(size=(LENGTH, 8)).astype(np.float32),
        rng.uniform(-1, 1, (LENGTH, 7)).astype(np.float32),
        geometry={camera: RecordedGeometry.of(looks(seed + i)) for i, camera in enumerate(CAMERAS)},
    )


@pytest.fixture(scope="module")
def rlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rlds(tmp_path_factory.mktemp("geometry"), "deep", [recorded(0), recorded(7)], SIZE)


def converted(source: Path, target: Path, to: str, **settings: object) -> Path:
    config = ConversionConfig(str(source), target, to, fps=20, name="again", **settings)  # type: ignore[arg-type]
    with Conversion.begin(config) as conversion:
        if conversion.needs_tasks:
            conversion.number_tasks([tasks_of_part(conversion.plan, part) for part in conversion.plan.parts])
        for part in conversion.pending():
            convert_part(conversion.plan, part)
        conversion.publish()
    return target


def points(dataset: EpisodeDataset, index: int, camera: str, name: str) -> list[npt.NDArray[np.float32]]:
    seen = [dataset.observation(index, t, (name,), PointTerms()).geometry for t in range(LENGTH)]
    assert all(one is not None for one in seen)
    return [one[name].points() for one in seen if one is not None]


def assert_kept(dataset: EpisodeDataset, names: tuple[str, ...] = CAMERAS) -> None:
    assert dataset.without_geometry(dataset.cameras) == ((), ())
    assert dataset.contract.geometry
    for index, seed in enumerate((0, 7)):
        for place, (camera, name) in enumerate(zip(CAMERAS, names, strict=True)):
            for found, look in zip(points(dataset, index, camera, name), looks(seed + place), strict=True):
                np.testing.assert_allclose(found, look.points(), atol=2 * DEPTH_UNIT_M)
                assert np.isnan(found[0, 0]).all()


def test_rlds_keeps_it(rlds: Path) -> None:
    dataset = open_dataset(rlds)
    assert dataset.cameras == CAMERAS, "depth is no camera"
    assert_kept(dataset)
    assert dataset.observation(0, 0, CAMERAS).geometry is None, "nobody has asked"


@pytest.mark.parametrize("video", [False, True])
def test_lerobot_and_the_way_back_keep_it(rlds: Path, tmp_path: Path, video: bool) -> None:
    encoding = {"video": VideoSettings(crf=10), "max_mean_difference": 255.0} if video else {}
    lerobot = converted(rlds, tmp_path / "lerobot", "lerobot", **encoding)
    assert_kept(open_dataset(lerobot), ("image", "wrist_image"))
    if not video:
        back = converted(lerobot, tmp_path / "again" / "1.0.0", "rlds")
        assert_kept(open_dataset(back))


def test_episodes_without_or_with_other_geometry_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has geometry of cameras \[\], the first one of"):
        write_rlds(tmp_path, "some", [recorded(0), replace(recorded(1), geometry={})], SIZE)
    cut = {camera: replace(one, depth=one.depth[:, 1:]) for camera, one in recorded(1).geometry.items()}
    with pytest.raises(DatasetError, match=r"depth \(4, 7, 8\)"):
        write_rlds(tmp_path, "cut", [recorded(0), replace(recorded(1), geometry=cut)], SIZE)


def test_a_dataset_without_it_is_written_as_before(tmp_path: Path) -> None:
    directory = write_rlds(tmp_path, "flat", [replace(recorded(0), geometry={})], SIZE)
    assert "depth" not in (directory / "features.json").read_text()
    assert "depth" not in (directory / "recording.json").read_text()
    dataset = open_dataset(directory)
    assert dataset.without_geometry(("agentview",)) == (("agentview",), ("agentview",))
    assert not dataset.contract.geometry
    with pytest.raises(BrokenEpisodeError, match="camera 'agentview' has no depth"):
        dataset.observation(0, 0, ("agentview",), PointTerms())


def test_a_fallback_takes_every_cameras_place() -> None:
    look = looks(3)[1].shown(Pictures("mirrored"))
    assumed = PointTerms(60.0).applied(look)
    assert np.array_equal(assumed.pose, np.eye(4))
    assert assumed.orientation == "mirrored"
    width = 2 * np.tan(np.radians(30))
    assert assumed.intrinsics[0, 0] == pytest.approx(SIZE / width)
    assert PointTerms().applied(look) is look
    for terms in (PointTerms(), PointTerms(60.0)):
        assert PointTerms.from_dict(terms.to_dict()) == terms
    with pytest.raises(ValueError, match="fallback_fov_deg is 0; give degrees"):
        GeometryConfig(fallback_fov_deg=0)
