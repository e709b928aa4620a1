"""Videos as lerobot makes them: constant frame rate, and key frames so close that any frame is found quickly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import numpy.typing as npt

from ipvla.data.source import DatasetError

#: FFmpeg's encoders by the names that lerobot knows.
_ENCODERS: Final = {"h264": "libx264", "libsvtav1": "libsvtav1"}


@dataclass(frozen=True)
class VideoSettings:
    """How pictures are encoded; with losses, always.

    Attributes:
        codec: "h264" or "libsvtav1"; the second makes smaller files, and wants pictures of 64 px or more.
        crf: constant rate factor; lower keeps more. 23 is good for h264, 30 is lerobot's own for libsvtav1.
        key_frame_every: frames from one key frame to the next; with 2, lerobot's own, any frame costs at most two.
    """

    codec: str = "h264"
    crf: int = 23
    key_frame_every: int = 2

    def __post_init__(self) -> None:
        if self.codec not in _ENCODERS:
            raise ValueError(f"codec is {self.codec!r}; known are {', '.join(map(repr, _ENCODERS))}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; choose 0 (best) to 51, for example 23")
        if self.key_frame_every < 1:
            raise ValueError(f"key_frame_every is {self.key_frame_every}; set it to at least 1")


class VideoEncoder:
    """Writes one video frame by frame; whole only after `close`.

    Args:
        path: the mp4 to write.
        fps: frames per second.
        shape: [H, W, 3] of the frames; both sides even, since colours are stored at half the resolution.

    Raises:
        DatasetError: a side is odd, or the codec does not take the size.
    """

    def __init__(self, path: Path, fps: int, shape: tuple[int, ...], settings: VideoSettings) -> None:
        height, width = shape[:2]
        if height % 2 or width % 2:
            raise DatasetError(f"pictures of {width} x {height} px cannot be a video: sides are even; keep images")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._container: Any = av.open(str(path), "w", options={"movflags": "faststart"})
        options = {"g": str(settings.key_frame_every), "crf": str(settings.crf)}
        if settings.codec == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors alone; it writes to stderr on its own
            options |= {"preset": "12", "svtav1-params": "lp=1"}
        stream: Any = self._container.add_stream(_ENCODERS[settings.codec], rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._time_base = Fraction(1, fps)
        self.frames = 0

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """The next frame, uint8 [H, W, 3] RGB."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self.frames, self._time_base
        try:
            self._encode(frame)
        except av.FFmpegError as error:
            raise DatasetError(
                f"{self._path} cannot be encoded ({error}); try another codec, or images"
            ) from error
        self.frames += 1

    def close(self) -> None:
        """Writes what is left."""
        self._encode(None)
        self._container.close()

    def _encode(self, frame: Any) -> None:
        policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            self._container.mux(self._stream.encode(frame))
        finally:
            # For root SVT-AV1 makes the thread that opens it a real-time thread, and all others would wait for it.
            if os.sched_getscheduler(0) != policy:
                os.sched_setscheduler(0, policy, parameters)


def video_info(shape: tuple[int, ...], fps: int, settings: VideoSettings) -> dict[str, Any]:
    """What `meta/info.json` says of a video feature's encoding."""
    return {
        "video.height": shape[0],
        "video.width": shape[1],
        "video.codec": {"h264": "h264", "libsvtav1": "av1"}[settings.codec],
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
