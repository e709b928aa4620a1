"""Pictures that are frames of a video: found by their time, decoded forward from the key frame before them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from ipvla.data.lerobot.format import Tree
from ipvla.data.source import DatasetError, require_content
from ipvla.files import HEAD, replacing

#: Looking for a key frame takes about as long as decoding so many frames.
_SEEK_FRAMES = 2


class VideoFile:
    """One video, open from its first frame on until it is closed; safe to use from several threads.

    Going forward costs one decoded frame per frame; going back, or far forward, starts at a key frame.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._container: Any = None
        self._decoded: Iterator[Any] = iter(())
        self._current: Any = None

    def frame(self, seconds: float, tolerance_s: float) -> npt.NDArray[np.uint8]:
        """The frame that is shown at a time, uint8 [H, W, 3] RGB.

        Raises:
            ValueError: there is none within the tolerance, or the file cannot be decoded.
        """
        with self._lock:
            try:
                frame = self._find(seconds, tolerance_s)
            except (av.FFmpegError, OSError) as error:
                self._close()
                with suppress(OSError), open(self._path, "rb") as file:
                    require_content(self._path, file.read(HEAD))
                raise ValueError(f"video {self._path} cannot be decoded at {seconds:.4f} s ({error})") from error
            if frame is None or abs(frame.time - seconds) > tolerance_s:
                nearest = "the video ends before" if frame is None else f"the next one is at {frame.time:.4f} s"
                raise ValueError(f"video {self._path} has no frame at {seconds:.4f} s: {nearest}")
            return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._decoded, self._current = None, iter(()), None

    def _find(self, seconds: float, tolerance_s: float) -> Any:
        """The first frame from `seconds - tolerance_s` on, which becomes the current one; None past the end."""
        if self._container is None:
            self._container = av.open(self._path)
            # One thread decodes: frames are small, and loaders have threads of their own.
            self._container.streams.video[0].codec_context.thread_count = 1
        earliest = seconds - tolerance_s
        if self._current is None or not self._reaches(seconds, earliest):
            stream = self._container.streams.video[0]
            self._container.seek(round(seconds / stream.time_base), stream=stream)
            self._decoded = self._container.decode(stream)
            self._current = next(self._decoded, None)
        while self._current is not None and self._current.time < earliest:
            self._current = next(self._decoded, None)
        return self._current

    def _reaches(self, seconds: float, earliest: float) -> bool:
        """Is going on from the current frame right, and hardly longer than from the key frame?"""
        if self._current.time >= earliest:
            return bool(self._current.time <= seconds + (seconds - earliest))
        stream = self._container.streams.video[0]
        key = stream.index_entries.search_timestamp(round(seconds / stream.time_base))
        if key < 0:
            return True
        key_s = stream.index_entries[key].timestamp * stream.time_base
        return bool(self._current.time >= key_s - _SEEK_FRAMES / stream.average_rate)


class Downloads:
    """Videos are decoded from local files only, so those of object storage are fetched at their first use.

    Args:
        tree: where they come from.
        directory: where they are stored, shared by all processes and datasets; None if nothing may be fetched.
    """

    def __init__(self, tree: Tree, directory: Path | None) -> None:
        self._tree = tree
        self._directory = directory
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        """The local path of a file of the tree.

        Raises:
            DatasetError: the file is remote, and there is no directory to fetch it to.
            OSError: it is not there, or cannot be fetched.
        """
        if self._tree.local:
            return self._tree.path(name)
        if self._directory is None:
            raise DatasetError(
                f"{self._tree.location}/{name} is remote, and videos are decoded from local files; give a "
                "directory to keep copies in (cache_directory)"
            )
        address = f"{self._tree.location}/{name}"
        copy = self._directory / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}{Path(name).suffix}"
        with self._lock:
            if not copy.exists():
                with replacing(copy) as part:
                    self._tree.files.get_file(self._tree.path(name), str(part))
        return str(copy)


@dataclass(frozen=True)
class VideoPictures:
    """The frames of one episode within a video that it may share with others.

    Attributes:
        open_video: by its local path; gives the same one for the same path while it is in use.
        local_copy: gives the video's path for the first frame.
        name: of the video.
        seconds: float64 [T], when each picture is shown, in the video's time.
        tolerance_s: how far from that the frame's own time may be; less than half the time between frames.
    """

    open_video: Callable[[str], VideoFile]
    local_copy: Downloads
    name: str
    seconds: npt.NDArray[np.float64]
    tolerance_s: float

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def nbytes(self) -> int:
        return self.seconds.nbytes

    def decode(self, t: int) -> npt.NDArray[np.uint8]:
        return self.open_video(self.local_copy(self.name)).frame(float(self.seconds[t]), self.tolerance_s)
