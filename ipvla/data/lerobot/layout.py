"""What a LeRobotDataset that is to be written holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipvla.data.lerobot.encoder import VideoSettings, video_info
from ipvla.data.lerobot.format import INDEX_FEATURES, TASK
from ipvla.data.source import DatasetError, Feature


@dataclass(frozen=True)
class Layout:
    """The features of every step, and how they are stored.

    Attributes:
        fps: control steps per second.
        features: by LeRobot's names, with dots; images are [H, W, 3], and no size varies. The index columns and
            `task` come by themselves.
        video: how pictures are encoded as video; None keeps each as it is, a PNG or JPEG in its row.
        robot_type: a name, or None.

    Raises:
        DatasetError: the format cannot hold a feature.
    """

    fps: int
    features: Mapping[str, Feature]
    video: VideoSettings | None = None
    robot_type: str | None = None

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise DatasetError(f"fps is {self.fps}; give the control steps per second, for example 10")
        for name, feature in self.features.items():
            if "/" in name or name in INDEX_FEATURES or name == TASK:
                raise DatasetError(f"feature {name!r} cannot have this name in a LeRobotDataset; rename it")
            if feature.kind == "image" and (len(feature.shape) != 3 or feature.shape[2] != 3):
                raise DatasetError(
                    f"feature {name!r} is {list(feature.shape)}, no [H, W, 3] picture; leave it out"
                )
            if feature.is_depth and self.video is not None:
                raise DatasetError(
                    f"feature {name!r} holds depth, which a video would cut to 8 bits; leave it out"
                )
            if 0 in feature.shape:
                raise DatasetError(f"feature {name!r} is {list(feature.shape)}: its size varies; leave it out")

    @property
    def images(self) -> tuple[str, ...]:
        """The picture features, images or videos."""
        return tuple(name for name, feature in self.features.items() if feature.kind == "image")

    def info_features(self) -> dict[str, dict[str, Any]]:
        """As in `meta/info.json`."""
        return {name: self._entry(feature) for name, feature in self.features.items()}

    def _entry(self, feature: Feature) -> dict[str, Any]:
        if feature.kind == "text":
            return {"dtype": "string", "shape": [1], "names": None}
        if feature.kind == "number":
            return {"dtype": feature.dtype, "shape": list(feature.shape) or [1], "names": None}
        entry: dict[str, Any] = {
            "dtype": "image",
            "shape": list(feature.shape),
            "names": ["height", "width", "channels"],
        }
        if feature.is_depth:
            return entry | {"info": {"is_depth_map": True}}
        if self.video is None:
            return entry
        return entry | {"dtype": "video", "info": video_info(feature.shape, self.fps, self.video)}
