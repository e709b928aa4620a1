"""Messages of the openpi websocket protocol: observations by the keys of openpi's LIBERO or ALOHA policies.

In msgpack an array is a map of its bytes, dtype and shape. This packs what `openpi_client.msgpack_numpy` unpacks,
and the other way round. Unlike it, an array's claims are checked before its bytes are looked at as numbers: an
object array from the network would be read as pointers. A message is refused as soon as it is seen to hold more
than any observation does, so that reading it takes no longer than copying its bytes.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgpack
import numpy as np

from ipvla.contract import Orientation
from ipvla.geometry import CameraGeometry
from ipvla.rollout.openpi.depth import LONGEST_SIDE, geometry_keys, geometry_message, geometry_of
from ipvla.types import Ahead, Observation

#: Camera -> key; a camera that is not here goes by its own name.
_IMAGE_KEYS: Final = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}
STATE: Final = "observation/state"
PROMPT: Final = "prompt"
#: Of ALOHA's messages: {camera: uint8 [3, H, W]}, and the state beside it.
_IMAGES, _ALOHA_STATE = "images", "state"
#: Environment variable: the token that our server demands, if it is set, and that our client sends to servers.
TOKEN_VARIABLE: Final = "IPVLA_SERVE_TOKEN"
#: Of ours, and optional: control steps since the reset, the first observation of an episode, whose episode it is.
STEP: Final = "t"
RESET: Final = "reset"
SESSION: Final = "session_id"
#: Of ours, and optional: what the answer is to go on from, a map of the fields of `ipvla.types.Ahead`. It is
#: answered with the whole chunk, and after how many actions the policy wants to be asked again.
AHEAD: Final = "ahead"
EXECUTE: Final = "execute"
#: Of our server's metadata: `chunk`, `execute` and the `ipvla.rollout.chunking.HeadFacts` of its policy.
CHUNKING: Final = "chunking"
#: The largest `STEP`.
LAST_STEP: Final = 2**31 - 1
#: Of our server's metadata: the terms of its policy, as `ipvla.contract.Contract.to_dict` gives them.
CONTRACT: Final = "contract"
#: Kinds of dtype that may travel: booleans, integers, floats.
_KINDS: Final = "biuf"
#: `<f4`, `|u1`, `float32`. NumPy parses anything longer, records of thousands of fields among them.
_DTYPE: Final = re.compile(r"[<>=|]?[a-zA-Z?]{1,8}\d{0,3}")
#: Axes of an array, the most that every NumPy has.
_MOST_AXES: Final = 32
#: Entries of one list or map, and of all of them together: an observation has some tens.
_MOST_ENTRIES, _MOST_ENTRIES_IN_ALL = 256, 4096
#: Bytes of one text.
_LONGEST_TEXT: Final = 2**16
#: Characters of a prompt; a token has at least one, and no backbone takes as many tokens.
_LONGEST_PROMPT: Final = 2000


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""


class ObservationError(ValueError):
    """A message is no observation that the policy could use; it says what to send."""


def pack(value: Any) -> bytes:
    """Maps, lists, strings, numbers and numpy arrays as one message.

    Raises:
        MessageError: something else is in it.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_encoded)
    except TypeError as error:
        raise MessageError(
            f"{error}; a message holds maps, lists, strings, numbers and arrays of numbers"
        ) from None
    return packed


def unpack(message: bytes, decode: Callable[[dict[Any, Any]], Any] | None = None) -> Any:
    """What was packed; arrays are read-only views of the message.

    Args:
        decode: what becomes of each map, of another protocol that puts arrays otherwise; None for openpi's.

    Raises:
        MessageError: it is cut short, no msgpack, holds more than any observation, or an array's bytes do not fit
            what they are said to be.
    """
    entries = 0

    def counted(value: Any) -> Any:
        nonlocal entries
        entries += 1 + len(value)
        if entries > _MOST_ENTRIES_IN_ALL:
            raise MessageError(f"a message of more than {_MOST_ENTRIES_IN_ALL} values; send arrays as arrays")
        return (decode or _decoded)(value) if isinstance(value, dict) else value

    try:
        return msgpack.unpackb(
            message,
            object_hook=counted,
            list_hook=counted,
            max_array_len=_MOST_ENTRIES,
            max_map_len=_MOST_ENTRIES,
            max_str_len=_LONGEST_TEXT,
            max_ext_len=0,
        )
    except MessageError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(
            f"{len(message)} bytes that are no msgpack message of observations ({error!s:.100})"
        ) from None


def image_key(camera: str) -> str:
    """`agentview` -> "observation/image"."""
    return f"observation/{_IMAGE_KEYS.get(camera, camera)}"


def to_message(observation: Observation) -> dict[str, Any]:
    """What any openpi server of LIBERO's layout understands; further keys are ours."""
    geometry = (geometry_message(image_key(camera), seen) for camera, seen in (observation.geometry or {}).items())
    return {
        **{image_key(camera): image for camera, image in observation.images.items()},
        STATE: np.asarray(observation.proprio, np.float32),
        PROMPT: observation.instruction,
        STEP: observation.t,
        **{key: value for of_camera in geometry for key, value in of_camera.items()},
    }


def ahead_message(ahead: Ahead) -> dict[str, Any]:
    """The value of `AHEAD`."""
    return {**vars(ahead), "actions": np.asarray(ahead.actions, np.float32)}


def from_message(
    message: Any,
    cameras: Sequence[str],
    proprio_dim: int,
    t: int,
    prompt: str | None = None,
    action_dim: int | None = None,
    geometry: Orientation | None = None,
) -> Observation:
    """The observation in a message of either layout.

    Args:
        cameras: that the policy looks through.
        proprio_dim: P of the state.
        t: where the message does not tell.
        prompt: where the message has none; None if it must have one.
        action_dim: A of what is `ahead`; None to leave that out.
        geometry: how the pictures are turned of a policy that reads their geometry; None to leave that out.

    Raises:
        ObservationError: a key is missing, or its value of another type, shape or range.
    """
    if not isinstance(message, Mapping):
        raise ObservationError(f"the message is a {type(message).__name__}; send a map of observations")
    message = _of_aloha(message) if _IMAGES in message else message
    if prompt is not None:
        message = {PROMPT: prompt, **message}
    keys = [*map(image_key, cameras)]
    needed = [*keys, *(key for one in keys if geometry for key in geometry_keys(one)), STATE, PROMPT]
    missing = [key for key in needed if key not in message]
    if missing:
        raise ObservationError(f"the observation lacks {', '.join(missing)}; it has {_keys(message)}")
    return Observation(
        images={camera: _image(image_key(camera), message[image_key(camera)]) for camera in cameras},
        proprio=_state(message[STATE], proprio_dim),
        instruction=_prompt(message[PROMPT]),
        t=_step(message.get(STEP, t)),
        ahead=None if action_dim is None or AHEAD not in message else _ahead(message[AHEAD], action_dim),
        geometry=None if geometry is None else _geometry(message, cameras, geometry),
    )


def _geometry(
    message: Mapping[Any, Any], cameras: Sequence[str], orientation: Orientation
) -> dict[str, CameraGeometry]:
    try:
        return {camera: geometry_of(image_key(camera), message, orientation) for camera in cameras}
    except ValueError as error:
        raise ObservationError(str(error)) from None


def _of_aloha(message: Mapping[Any, Any]) -> dict[Any, Any]:
    """A message of openpi's ALOHA clients by the keys of LIBERO's; pictures may also be [H, W, 3]."""
    images = message[_IMAGES]
    if not isinstance(images, Mapping):
        raise ObservationError(f"{_IMAGES} is {_kind(images)}; send a map from cameras to uint8 [3, H, W]")
    rest = {key: value for key, value in message.items() if key not in (_IMAGES, _ALOHA_STATE)}
    if _ALOHA_STATE in message:
        rest[STATE] = message[_ALOHA_STATE]
    return rest | {image_key(str(camera)): _channels_last(image) for camera, image in images.items()}


def _channels_last(image: Any) -> Any:
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    return image


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in _KINDS:
        raise TypeError(f"an array of {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape
        }  # fmt: skip
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _decoded(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return checked_array(value.get(b"dtype"), value.get(b"data"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        return _number(value)
    return value


def checked_array(name: Any, data: Any, shape: Any) -> Any:
    """A read-only view of `data`. MessageError unless these are a dtype's name, bytes and a shape that fit."""
    dtype = _dtype(name)
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > _MOST_AXES
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise MessageError(f"an array of shape {cut(shape)}; it must be a list of at most {_MOST_AXES} lengths")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        held = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise MessageError(f"an array of {dtype} {cut(shape)} cannot be made of {held}")
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, OverflowError):  # without a number in it, and longer than memory along the other axes
        raise MessageError(f"an array of {dtype} {cut(shape)}; NumPy has none of this shape") from None


def _number(value: dict[Any, Any]) -> Any:
    dtype, number = _dtype(value.get(b"dtype")), value.get(b"data")
    try:
        if type(number) in (bool, int, float):
            return dtype.type(number)
    except (ValueError, OverflowError):
        pass
    raise MessageError(f"a number of {dtype} cannot be made of {cut(number)}")


def _dtype(name: Any) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name) if isinstance(name, str) and _DTYPE.fullmatch(name) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in _KINDS:
        raise MessageError(f"an array of dtype {cut(name)}; send numbers")
    return dtype


def cut(value: Any) -> str:
    """What was sent, for a refusal: no longer than a line, and made in no time however much it is."""
    return f"{reprlib.repr(value[:60] if isinstance(value, bytes) else value):.60}"


def _keys(message: Mapping[Any, Any]) -> str:
    shown = sorted(f"{key!s:.40}" for key in message)
    return f"{shown[:20]}" + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _image(key: str, image: Any) -> Any:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ObservationError(f"{key} is {_kind(image)}; send uint8 [H, W, 3], RGB")
    if image.dtype != np.uint8:
        raise ObservationError(f"{key} is {_kind(image)}; send uint8 [H, W, 3] in 0..255")
    if max(image.shape) > LONGEST_SIDE:
        raise ObservationError(f"{key} is {_kind(image)}; send at most {LONGEST_SIDE} pixels a side")
    return image


def _state(state: Any, dim: int) -> Any:
    if not isinstance(state, np.ndarray) or state.shape != (dim,):
        raise ObservationError(f"{STATE} is {_kind(state)}; send float32 [{dim}]")
    with np.errstate(over="ignore"):
        single = state.astype(np.float32)
    if not np.isfinite(single).all():
        raise ObservationError(f"{STATE} is {cut(state.tolist())}; send numbers that are finite as float32")
    return single


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ObservationError(f"{PROMPT} is {_kind(prompt)}; send the task in words")
    if len(prompt) > _LONGEST_PROMPT:
        raise ObservationError(
            f"{PROMPT} has {len(prompt)} characters; send the task in at most {_LONGEST_PROMPT}"
        )
    return prompt


def _step(t: Any, name: str = STEP) -> int:
    if not isinstance(t, int | np.integer) or isinstance(t, bool) or not 0 <= int(t) <= LAST_STEP:
        raise ObservationError(f"{name} is {cut(t)}; send control steps, 0 or more, or leave it out")
    return int(t)


def _ahead(value: Any, action_dim: int) -> Ahead:
    """Of as many actions as there are, none included; [0, 0] stands for none of any size."""
    if not isinstance(value, Mapping) or not {"actions", "delay"} <= value.keys():
        raise ObservationError(f"{AHEAD} is {_kind(value)}; send a map with actions and delay")
    actions, guidance, given = value["actions"], value.get("guidance", 0.0), value.get("given", False)
    if (
        not isinstance(actions, np.ndarray)
        or actions.ndim != 2
        or (len(actions) and actions.shape[1] != action_dim)
    ):
        raise ObservationError(f"{AHEAD}/actions is {_kind(actions)}; send float32 [R, {action_dim}]")
    if not np.isfinite(actions := actions.astype(np.float32)).all():
        raise ObservationError(f"{AHEAD}/actions has numbers that are not finite; send what is left to be played")
    if not isinstance(guidance, int | float) or isinstance(guidance, bool) or not 0 <= guidance < math.inf:
        raise ObservationError(f"{AHEAD}/guidance is {cut(guidance)}; send a finite number of at least 0")
    if not isinstance(given, bool | np.bool_):
        raise ObservationError(f"{AHEAD}/given is {cut(given)}; send true or false")
    return Ahead(actions, _step(value["delay"], f"{AHEAD}/delay"), float(guidance), bool(given))


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
