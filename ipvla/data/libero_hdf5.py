"""LIBERO's own demonstrations, HDF5 files of robomimic's layout, under the names that OpenVLA's RLDS gives them.

Facts: for the files, LIBERO `scripts/create_dataset.py` and OpenVLA `regenerate_libero_dataset.py`, which replays
them; for what is made of them, the RLDS datasets that OpenVLA published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import numpy.typing as npt

from ipvla.data.recording import Recording
from ipvla.data.rlds.format import of_success
from ipvla.data.source import BrokenEpisodeError, DatasetError, EpisodeSource, Steps, Trajectory, feature_of
from ipvla.files import foreign_file, one_line

#: RLDS feature -> dataset below `data/demo_N`; the state is made of two.
_IMAGES: Final = {"observation/image": "obs/agentview_rgb", "observation/wrist_image": "obs/eye_in_hand_rgb"}
_STATE: Final = ("obs/ee_states", "obs/gripper_states")
_JOINTS: Final = "obs/joint_states"


@dataclass(frozen=True)
class TurnedPictures:
    """Pictures of an HDF5 dataset, turned by 180 degrees as OpenVLA's RLDS has them, and read one by one.

    The files have OpenGL's lowest row first; turned, pictures are upright, and mirrored left to right.

    Attributes:
        path: of the file.
        name: of the dataset, uint8 [T, H, W, 3].
        length: T.
    """

    path: Path
    name: str
    length: int

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return len(self.name)

    def decode(self, t: int) -> npt.NDArray[np.uint8]:
        try:
            with h5py.File(self.path, "r") as file:
                return np.ascontiguousarray(np.asarray(file[self.name][t], np.uint8)[::-1, ::-1])
        except (KeyError, OSError) as error:
            raise ValueError(f"{self.path} has no picture {t} in {self.name} ({error})") from error


class LiberoHdf5Source(EpisodeSource):
    """All demonstrations of a directory of LIBERO's HDF5 files, file by file in the order of their names.

    Steps have OpenVLA's features: `observation/{image, wrist_image}` (`TurnedPictures`), `observation/state`
    float32 [T, 8] (the hand's position and axis-angle, two fingers), `observation/joint_state` float32 [T, 7],
    `action` float32 [T, 7] as the environment takes it (gripper -1 open, +1 closed), `language_instruction`, and
    RLDS's flags; the reward is 1 at the end, since LIBERO recorded only successes. Steps that do nothing stay.

    Args:
        location: the directory, or one file.

    Raises:
        DatasetError: there are no such files, or one is damaged.
    """

    #: Rotated by 180 degrees they are mirrored; LIBERO controls its arm 20 times a second.
    recording = Recording("mirrored", 20.0)
    format = "LIBERO's HDF5"

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        root = Path(location)
        self.name = self.inner_name = root.stem if root.is_file() else root.name
        files = [root] if root.is_file() else sorted(root.glob("*.hdf5"))
        if not files:
            raise DatasetError(f"{root} holds no *.hdf5 files; give the directory of one of LIBERO's suites")
        self._episodes = [episode for path in files for episode in _demonstrations(path)]
        if not self._episodes:
            raise DatasetError(f"{root} holds no demonstrations; download the files again")
        self.lengths = np.array([e.length for e in self._episodes], np.int64)
        self.tasks = tuple(e.instruction for e in self._episodes)
        self.families = ("",) * len(self._episodes)
        self.features = {path: feature_of(values) for path, values in self.trajectory(0).steps.items()}

    def _trajectory(self, index: int) -> Trajectory:
        episode = self._episodes[index]
        try:
            with h5py.File(episode.path, "r") as file:
                steps = dict(_steps(file[episode.group], episode))
        except Exception as error:  # whatever HDF5 raises of a damaged file
            raise BrokenEpisodeError(
                f"{self.name}: {episode.path}, {episode.group} cannot be read ({one_line(error)}); download the "
                "file again"
            ) from error
        where = f"{self.name}: {episode.path}, {episode.group}"
        return Trajectory(steps, where, {"file_path": f"{episode.path.name}/{episode.group.rpartition('/')[2]}"})


@dataclass(frozen=True)
class _Demonstration:
    path: Path
    group: str
    length: int
    instruction: str


def _demonstrations(path: Path) -> Iterator[_Demonstration]:
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            instruction = _instruction(path, data.attrs)
            for name in sorted(data, key=lambda name: int(name.rpartition("_")[2])):
                yield _Demonstration(path, f"data/{name}", len(data[name]["actions"]), instruction)
    except Exception as error:  # whatever HDF5 raises of a damaged file
        reason = foreign_file(path) or one_line(error)
        raise DatasetError(
            f"{path} is no HDF5 file of LIBERO's, or damaged ({reason}); download it again"
        ) from None


def _instruction(path: Path, attributes: Mapping[str, Any]) -> str:
    """What the file says, or, in the files that OpenVLA's replay makes, what its name says."""
    if "problem_info" in attributes:
        instruction = json.loads(attributes["problem_info"])["language_instruction"]
        return "".join(instruction).strip()
    return re.sub(r"^.*SCENE\d+_", "", path.stem.removesuffix("_demo")).replace("_", " ")


def _steps(group: Any, episode: _Demonstration) -> Iterator[tuple[str, Steps]]:
    length = episode.length
    for path, name in _IMAGES.items():
        if len(group[name]) != length:
            raise ValueError(f"{len(group[name])} pictures in {name} for {length} actions")
        yield path, TurnedPictures(episode.path, f"{episode.group}/{name}", length)
    yield "observation/state", np.concatenate([np.asarray(group[name], np.float32) for name in _STATE], axis=1)
    yield "observation/joint_state", np.asarray(group[_JOINTS], np.float32)
    yield "action", np.asarray(group["actions"], np.float32)
    yield "language_instruction", (episode.instruction,) * length
    yield from of_success(length).items()
