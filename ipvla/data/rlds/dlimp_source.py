"""RLDS through dlimp and tf.data, as OpenVLA reads it: the same trajectories, by TensorFlow's own code.

Needs `requirements-oxe.txt`. tf.data only knows streams, so all episodes are read once and stay, encoded, in
memory: for datasets that fit, and to compare with. `RldsSource` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures
from ipvla.data.rlds.format import SPLIT, dataset_name
from ipvla.data.source import DatasetError, Feature, Steps, Trajectory


class DlimpSource:
    """The episodes of one split, in the order of the shards.

    Args:
        location: the version directory.
        split: name of it.

    Raises:
        DatasetError: TensorFlow or dlimp is not installed.
    """

    fps: float | None = None
    format = "RLDS"
    broken: tuple[str, ...] = ()

    def __init__(self, location: str | Path, split: str = SPLIT) -> None:
        dlimp, tf, tfds = _packages()
        tf.config.set_visible_devices([], "GPU")
        builder = tfds.builder_from_directory(str(location))
        self.location = str(location).rstrip("/")
        self.inner_name: str = builder.name
        self.name = dataset_name(self.location, builder)
        stream = dlimp.DLataset.from_rlds(builder, split=split, shuffle=False, num_parallel_reads=1)
        # dlimp lets tf.data give trajectories in whatever order they are ready.
        options = tf.data.Options()
        options.deterministic = True
        read = [_flat(record) for record in stream.with_options(options).as_numpy_iterator()]
        self._trajectories = [
            Trajectory(
                {path: _steps(values) for path, values in record.items() if not path.startswith(_NOT_OF_STEPS)},
                f"{self.name}: {self.location}, episode {index}",
                {
                    path.removeprefix(_METADATA): _first(values)
                    for path, values in record.items()
                    if path.startswith(_METADATA)
                },
            )
            for index, record in enumerate(read)
        ]
        if not self._trajectories:
            raise DatasetError(f"{self.location}: split {split!r} has no episodes; collect or copy it again")
        self.features: Mapping[str, Feature] = {
            path: _feature(values) for path, values in self._trajectories[0].steps.items()
        }
        self.lengths: npt.NDArray[np.int64] = np.array([len(t) for t in self._trajectories], np.int64)

    @property
    def tasks(self) -> tuple[str, ...]:
        spoken = (t.texts("language_instruction") for t in self._trajectories)
        named = zip(self._trajectories, spoken, strict=True)
        return tuple(str(t.metadata.get("task", texts[0] if texts else "")) for t, texts in named)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(str(t.metadata.get("family", "")) for t in self._trajectories)

    def trajectory(self, index: int) -> Trajectory:
        if not 0 <= index < len(self._trajectories):
            raise IndexError(
                f"episode {index} is outside the {len(self._trajectories)} episodes of {self.location}"
            )
        return self._trajectories[index]


#: dlimp adds these, and repeats the episode's metadata for every step.
_METADATA = "traj_metadata/episode_metadata/"
_NOT_OF_STEPS = ("traj_metadata/", "_len", "_traj_index", "_frame_index")


def _packages() -> tuple[Any, Any, Any]:
    try:
        import dlimp
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"rlds_backend dlimp: {error}; install what requirements-oxe.txt says, or leave rlds_backend at native"
        ) from None
    return dlimp, tf, tfds


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _steps(values: npt.NDArray[Any]) -> Steps:
    if values.dtype != np.object_:
        return values
    encoded = tuple(map(bytes, values.tolist()))
    pictures = all(one[:2] == b"\xff\xd8" or one[:4] == b"\x89PNG" for one in encoded)
    return EncodedPictures(encoded) if pictures else tuple(one.decode() for one in encoded)


def _first(values: npt.NDArray[Any]) -> Any:
    return values[0].decode() if isinstance(values[0], bytes) else values[0].item()


def _feature(values: Steps) -> Feature:
    if isinstance(values, np.ndarray):
        return Feature("number", values.shape[1:], values.dtype.name)
    if isinstance(values, tuple):
        return Feature("text", (), "str")
    return Feature("image", values.decode(0).shape, "uint8")
