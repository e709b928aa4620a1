"""How a dataset was recorded goes with it: written, converted, mixed and kept by policies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.dataset import open_dataset
from ipvla.data.lerobot import LeRobotSource
from ipvla.data.recording import RECORDING_FILE, Recording
from ipvla.data.rlds import write_rlds
from ipvla.data.rlds.source import RldsSource
from ipvla.data.source import DatasetError
from ipvla.data.standards import STANDARDS, StandardConfig, standard_for
from ipvla.types import Episode
from tests.data.standards import trajectories
from tests.data.test_conversion import ConversionConfig, convert, hdf5  # noqa: F401
from tests.synthetic import SIZE, cue_episode


def test_this_projects_datasets_are_upright_at_twenty_hertz(tmp_path: Path) -> None:
    written = write_rlds(tmp_path, "cue", [cue_episode(0), cue_episode(1)], SIZE)
    contract = open_dataset(written).contract
    assert (contract.pictures.orientation, contract.control_hz) == ("upright", 20)
    assert (contract.gripper, contract.action, contract.state) == ("environment", "hand", "hand")
    assert contract.cameras == ("agentview",)
    (written / RECORDING_FILE).unlink()
    assert open_dataset(written).contract == contract, "those that were written before there was a file, too"
    Recording("mirrored", 10.0).save(written)
    assert open_dataset(written).contract.pictures.orientation == "mirrored"
    (written / RECORDING_FILE).write_text('{"orientation": "tilted"}')
    with pytest.raises(DatasetError, match=r"recording\.json: orientation is 'tilted'; write one of upright"):
        _ = open_dataset(written).contract


def test_liberos_own_files_stay_mirrored_under_any_name_and_format(hdf5: Path, tmp_path: Path) -> None:  # noqa: F811
    rlds, lerobot = tmp_path / "mine" / "1.0.0", tmp_path / "again"
    convert(ConversionConfig(str(hdf5), rlds, "rlds", name="mine"))
    assert Recording.of(RldsSource(rlds)) == Recording("mirrored", 20.0)
    assert open_dataset(rlds).contract.pictures.orientation == "mirrored"
    convert(ConversionConfig(str(rlds), lerobot, "lerobot", fps=20))
    assert Recording.of(LeRobotSource(lerobot)) == Recording("mirrored", 20.0)


def test_standards_declare_what_is_known_of_their_datasets() -> None:
    known = {name: STANDARDS[name](name).contract(8) for name in ("libero_10_no_noops", "bridge_orig", "droid")}
    assert known["libero_10_no_noops"].pictures.orientation == "mirrored"
    assert known["libero_10_no_noops"].gripper == "open_is_one"
    assert [contract.control_hz for contract in known.values()] == [20, 5, 15]
    assert [contract.action for contract in known.values()] == ["hand", "other", "other"]


@pytest.mark.parametrize("size", [8, 14])
def test_actions_of_another_size_are_not_taken_for_liberos_hand(size: int) -> None:
    made = trajectories.recorded(6)
    made.steps["action"] = np.zeros((6, size), np.float32)  # type: ignore[index]
    with pytest.raises(DatasetError, match="Configure its standard"):
        standard_for("aloha", trajectories.features(made))
    standard = StandardConfig(gripper="none").build("aloha", trajectories.features(made))
    assert (standard.gripper, standard.normalised) == ("none", (True,) * size)
    contract = standard.contract(8)
    assert (contract.clipped, contract.action, contract.action_size) == (False, "unknown", size)


def test_joints_beyond_one_are_kept_from_dataset_to_action(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def aloha(seed: int) -> Episode:
        images = {"agentview": np.zeros((30, SIZE, SIZE, 3), np.uint8)}
        joints = rng.uniform(-2, 2, (30, 14)).astype(np.float32)
        return Episode("fold", "", "fold the towel", seed, images, joints, joints)

    directory = write_rlds(tmp_path, "aloha", [aloha(seed) for seed in range(3)], SIZE)
    dataset = open_dataset(directory, standard=StandardConfig(gripper="none"))
    action = dataset.episode(0).action
    statistics = dataset.statistics().action
    assert statistics.mask.all()
    assert np.abs(action).max() > 1.5
    np.testing.assert_allclose(
        statistics.denormalise(statistics.normalise(action, "bounds"), "bounds"), action, atol=1e-5
    )
    assert len(np.unique(action[:, -1])) > 2


def test_a_configured_standard_says_how_pictures_are_turned() -> None:
    config = StandardConfig({"front": "observation/image"}, orientation="mirrored", control_hz=10.0)
    made = trajectories.recorded(6)
    contract = config.build("mine", trajectories.features(made)).contract(8)
    assert (contract.pictures.orientation, contract.control_hz, contract.clipped) == ("mirrored", 10, True)
    with pytest.raises(ValueError, match="orientation is 'left'; choose one of upright"):
        StandardConfig({"front": "observation/image"}, orientation="left")  # type: ignore[arg-type]
    assert json.dumps(contract.to_dict())


@pytest.mark.parametrize("every", [0, "four"])
def test_pictures_that_come_never_are_refused(tmp_path: Path, every: object) -> None:
    values = {"orientation": "upright", "pictures_every": every}
    with pytest.raises(DatasetError, match=r"pictures_every is .*; write control steps, 1 or more"):
        Recording._read("recording.json", json.dumps(values).encode())
