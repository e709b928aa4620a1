"""Pictures as files, without losses."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from ipvla.data.pictures import EncodedPictures, Pictures

#: On rendered frames four times as fast as the default filter.
_SETTINGS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]


def encode_png(rgb: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file's contents of uint8 [H, W, 3] RGB."""
    return bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), _SETTINGS)[1].tobytes())


def encoded(pictures: Pictures) -> Sequence[bytes]:
    """Each picture's file: as it is, PNG or JPEG, or as PNG if it is none.

    Raises:
        ValueError: a picture that is no file cannot be decoded.
    """
    if isinstance(pictures, EncodedPictures):
        return pictures.encoded
    return [encode_png(pictures.decode(t)) for t in range(len(pictures))]
