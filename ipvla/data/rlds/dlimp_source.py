"""RLDS through dlimp and tf.data, as OpenVLA reads it: the same trajectories, by TensorFlow's own code.

Needs `requirements-oxe.txt`. tf.data only knows streams, so all episodes are read once and stay, encoded, in
memory: for datasets that fit, and to compare with. `RldsSource` needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures
from ipvla.data.rlds.format import SPLIT, dataset_name, flat, task_and_family
from ipvla.data.source import DatasetError, EpisodeSource, Steps, Trajectory, feature_of


class DlimpSource(EpisodeSource):
    """The episodes of one split, in the order of the shards.

    Args:
        location: the version directory.
        split: name of it.

    Raises:
        DatasetError: TensorFlow or dlimp is not installed.
    """

    format = "RLDS"

    def __init__(self, location: str | Path, split: str = SPLIT) -> None:
        dlimp, tf, tfds = _packages()
        tf.config.set_visible_devices([], "GPU")
        builder = tfds.builder_from_directory(str(location))
        self.location = str(location).rstrip("/")
        self.inner_name = str(builder.name)
        self.name = dataset_name(self.location, builder)
        stream = dlimp.DLataset.from_rlds(builder, split=split, shuffle=False, num_parallel_reads=1)
        # dlimp lets tf.data give trajectories in whatever order they are ready.
        options = tf.data.Options()
        options.deterministic = True
        read = [flat(record) for record in stream.with_options(options).as_numpy_iterator()]
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
        self.features = {path: feature_of(values) for path, values in self._trajectories[0].steps.items()}
        self.lengths = np.array([len(t) for t in self._trajectories], np.int64)
        labels = [task_and_family(t) for t in self._trajectories]
        self.tasks, self.families = (tuple(label[which] for label in labels) for which in (0, 1))

    def _trajectory(self, index: int) -> Trajectory:
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


def _steps(values: npt.NDArray[Any]) -> Steps:
    if values.dtype != np.object_:
        return values
    encoded = tuple(map(bytes, values.tolist()))
    pictures = all(one[:2] == b"\xff\xd8" or one[:4] == b"\x89PNG" for one in encoded)
    return EncodedPictures(encoded) if pictures else tuple(one.decode() for one in encoded)


def _first(values: npt.NDArray[Any]) -> Any:
    return values[0].decode() if isinstance(values[0], bytes) else values[0].item()
