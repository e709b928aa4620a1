"""Pictures that stay encoded until one of them is looked at, and files of pictures without losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG"
#: Where a PNG says how many bits a channel has.
_PNG_BITS = 24
#: On rendered frames four times as fast as the default filter.
_PNG_SETTINGS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]


class Pictures(Protocol):
    """The pictures of one camera in one episode, one per control step."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes that they take in memory as they are."""
        ...

    def decode(self, t: int) -> npt.NDArray[np.uint8]:
        """Picture `t`, uint8 [H, W, 3] RGB. ValueError if it cannot be decoded."""
        ...


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures as they were encoded one by one.

    Attributes:
        encoded: T files' contents, PNG or JPEG.
    """

    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.encoded))

    def bits(self, t: int) -> int:
        """Of one channel of picture `t`: 16 for most recordings of depth."""
        encoded = self.encoded[t]
        return encoded[_PNG_BITS] if encoded[:4] == _PNG and len(encoded) > _PNG_BITS else 8

    def decode(self, t: int) -> npt.NDArray[np.uint8]:
        """JPEG gives the same pixels as TensorFlow's decoder with its default (fast) transform."""
        encoded = self.encoded[t]
        if encoded[:2] == _JPEG:
            return np.asarray(simplejpeg.decode_jpeg(encoded, "RGB", fastdct=True), np.uint8)
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
        if pixels is None:
            raise ValueError(f"{len(encoded)} bytes that are neither PNG nor JPEG")
        return np.asarray(pixels, np.uint8)

    def depth(self, t: int) -> npt.NDArray[np.uint16]:
        """Picture `t` of one channel in 16 bits, uint16 [H, W]. ValueError if it is another kind of picture."""
        encoded = self.encoded[t]
        units = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED) if encoded else None
        if units is None or units.ndim != 2 or units.dtype != np.uint16:
            raise ValueError(f"{len(encoded)} bytes that are no depth, a PNG of one channel in 16 bits")
        return np.asarray(units, np.uint16)


def encode_depth(depth: npt.NDArray[np.uint16]) -> bytes:
    """A PNG file's contents of uint16 [H, W]."""
    return bytes(cv2.imencode(".png", depth, _PNG_SETTINGS)[1].tobytes())


def encode_png(rgb: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file's contents of uint8 [H, W, 3] RGB."""
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), _PNG_SETTINGS)[1].tobytes())


def encoded(pictures: Pictures) -> Sequence[bytes]:
    """Each picture's file: as it is, PNG or JPEG, or as PNG if it is none.

    Raises:
        ValueError: a picture that is no file cannot be decoded.
    """
    if isinstance(pictures, EncodedPictures):
        return pictures.encoded
    return [encode_png(pictures.decode(t)) for t in range(len(pictures))]
