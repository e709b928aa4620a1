"""Messages of vla-evaluation-harness, protocol version 1: msgpack maps of `type`, `payload`, `seq`, `timestamp`.

Source: src/vla_eval/protocol of github.com/allenai/vla-evaluation-harness, version 0.8.0 of package vla-eval. An
array is a map of bytes, dtype and shape under other keys than openpi's; a picture comes as PNG, JPEG or raw. No
pickle travels; as with openpi's messages, claims are checked before bytes are looked at as numbers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import msgpack
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ipvla.rollout.openpi.depth import LONGEST_SIDE
from ipvla.rollout.openpi.messages import (
    PROMPT,
    STATE,
    MessageError,
    ObservationError,
    checked_array,
    cut,
    image_key,
    unpack,
)

PROTOCOL_VERSION: Final = 1
HELLO, OBSERVATION, ACTION = "hello", "observation", "action"
EPISODE_START, EPISODE_END, ERROR = "episode_start", "episode_end", "error"
_TYPES: Final = (HELLO, OBSERVATION, ACTION, EPISODE_START, EPISODE_END, ERROR)
_ARRAY, _PICTURE = "__ndarray__", "__image__"
_COMPRESSED: Final = {"png": "PNG", "jpeg": "JPEG"}
#: Camera -> what the harness calls it, where that is another name.
_CAMERAS: Final = {"robot0_eye_in_hand": "wrist"}
_IMAGES, _TASK, _STATES = "images", "task_description", "states"


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        type: one of the six above.
        seq: counted by the client; an answer has that of what it answers.
    """

    type: str
    payload: Mapping[str, Any]
    seq: int = 0

    def pack(self) -> bytes:
        """With this moment's `timestamp`, seconds since 1970."""
        values = {"type": self.type, "payload": self.payload, "seq": self.seq, "timestamp": time.time()}
        packed: bytes = msgpack.packb(values, default=_encoded)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """MessageError for what is no message of this protocol."""
        values = unpack(data, _decoded)
        if not isinstance(values, dict) or not {"type", "payload", "seq", "timestamp"} <= values.keys():
            raise MessageError(f"{cut(values)} is no message; send a map of type, payload, seq and timestamp")
        kind, payload, seq = values["type"], values["payload"], values["seq"]
        if kind not in _TYPES:
            raise MessageError(f"type is {cut(kind)}; send one of {', '.join(_TYPES)}")
        if not isinstance(payload, dict) or type(seq) is not int:
            raise MessageError(f"payload is {cut(payload)} and seq {cut(seq)}; send a map and an integer")
        return cls(kind, payload, seq)


def harness_camera(camera: str) -> str:
    """What a camera is called in an observation's `images`."""
    return _CAMERAS.get(camera, camera)


def to_openpi(payload: Mapping[str, Any], cameras: tuple[str, ...], state_size: int | None) -> dict[str, Any]:
    """An observation by the keys of openpi's messages.

    Args:
        cameras: that the policy looks through.
        state_size: P of a policy that reads no state, which gets zeros; None for one that does.

    Raises:
        ObservationError: a picture, the state or the task is missing.
    """
    images = payload.get(_IMAGES)
    if not isinstance(images, dict):
        raise ObservationError(f"{_IMAGES} is {cut(images)}; send a map from cameras to uint8 [H, W, 3]")
    if lacking := [name for name in map(harness_camera, cameras) if name not in images]:
        raise ObservationError(
            f"{_IMAGES} lacks {', '.join(lacking)}; it has {cut(sorted(map(str, images)))} (send_wrist_image)"
        )
    given = {PROMPT: payload.get(_TASK), STATE: payload.get(_STATES)}
    if state_size is not None:
        given[STATE] = np.zeros(state_size, np.float32)
    if given[STATE] is None:
        raise ObservationError(f"the observation lacks {_STATES}, which the policy reads (send_state)")
    if given[PROMPT] is None:
        del given[PROMPT]  # the server may have words for those that have none
    return given | {image_key(camera): images[harness_camera(camera)] for camera in cameras}


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _decoded(value: dict[Any, Any]) -> Any:
    if _PICTURE in value and value.get("format") != "raw":
        return _picture(value.get("format"), value.get("data"))
    if _PICTURE in value or _ARRAY in value:
        return checked_array(value.get("dtype"), value.get("data"), value.get("shape"))
    return value


def _picture(kind: Any, data: Any) -> npt.NDArray[np.uint8]:
    """Uint8 [H, W, 3]; its size is read before its pixels are."""
    if kind not in _COMPRESSED or not isinstance(data, bytes):
        raise MessageError(f"a picture of format {cut(kind)}; send raw, {' or '.join(_COMPRESSED)}")
    try:
        with Image.open(io.BytesIO(data), formats=[_COMPRESSED[kind]]) as picture:
            if max(picture.size) > LONGEST_SIDE or picture.mode != "RGB":
                raise MessageError(
                    f"a picture of {picture.size[0]} x {picture.size[1]} {picture.mode}; send RGB of at most "
                    f"{LONGEST_SIDE} pixels a side"
                )
            return np.asarray(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MessageError(f"{len(data)} bytes that are no whole {kind} picture ({error!s:.100})") from None
