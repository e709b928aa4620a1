"""Messages of the openpi websocket protocol: msgpack, in which an array is a map of its bytes, dtype and shape.

Packs what `openpi_client.msgpack_numpy` unpacks, and the other way round. Unlike it, an array's claims are checked
before its bytes are looked at as numbers: an object array from the network would be read as pointers.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack
import numpy as np

#: Kinds of dtype that may travel: booleans, integers, floats.
_KINDS: Final = "biuf"


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""


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


def unpack(message: bytes) -> Any:
    """What was packed; arrays are read-only views of the message.

    Raises:
        MessageError: it is cut short, no msgpack, or an array's bytes do not fit what they are said to be.
    """
    try:
        return msgpack.unpackb(message, object_hook=_decoded)
    except MessageError:
        raise
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"{len(message)} bytes that are no msgpack message ({error})") from None


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
        return _array(value)
    if b"__npgeneric__" in value:
        return _dtype(value).type(value.get(b"data"))
    return value


def _array(value: dict[Any, Any]) -> Any:
    dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise MessageError(f"an array of shape {shape!r:.60}; it must be a list of lengths")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        held = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise MessageError(f"an array of {dtype} {list(shape)} cannot be made of {held}")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(value: dict[Any, Any]) -> np.dtype[Any]:
    dtype_name = value.get(b"dtype")
    try:
        dtype = np.dtype(dtype_name)
    except TypeError:
        raise MessageError(f"an array of dtype {dtype_name!r:.60}; send numbers") from None
    if dtype.kind not in _KINDS:
        raise MessageError(f"an array of dtype {dtype}; send numbers")
    return dtype
