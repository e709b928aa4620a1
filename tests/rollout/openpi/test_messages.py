import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ipvla.rollout.openpi.messages import MessageError, pack, unpack

NUMBERS = arrays.arrays(
    st.sampled_from([np.uint8, np.int64, np.float32, np.float64, np.bool_]), arrays.array_shapes(min_dims=0)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=8) | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(VALUES)
def test_what_is_packed_comes_out_here_and_at_openpis_own_client(value):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    assert same(unpack(pack(value)), value)
    assert same(theirs.unpackb(pack(value)), value)
    assert same(unpack(theirs.packb(value)), value)


def test_numpy_numbers_travel():
    assert unpack(pack({"a": np.float32(1.5)})) == {"a": np.float32(1.5)}


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(message):
    with contextlib.suppress(MessageError):
        unpack(message)


@given(st.data())
def test_a_message_cut_short_is_an_error(data):
    message = pack({"image": np.zeros((2, 3), np.uint8), "prompt": "go"})
    with pytest.raises(MessageError):
        unpack(message[: data.draw(st.integers(0, len(message) - 1))])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        ({b"dtype": "|O", b"data": bytes(8), b"shape": [1]}, "dtype object"),
        ({b"dtype": "V8", b"data": bytes(8), b"shape": [1]}, "dtype"),
        ({b"dtype": "nonsense", b"data": bytes(8), b"shape": [1]}, "'nonsense'"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [3]}, "8 bytes"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [-1]}, r"shape \[-1\]"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [2**40, 2**40]}, "8 bytes"),
        ({b"dtype": "<f4", b"data": "text", b"shape": [1]}, "str"),
        ({b"dtype": "<f4"}, "shape None"),
    ],
)
def test_an_array_is_what_its_bytes_can_be(array, reason):
    with pytest.raises(MessageError, match=reason):
        unpack(msgpack.packb({b"__ndarray__": True, **array}))


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), np.array(["a"]), np.array([1j])])
def test_only_numbers_and_words_are_sent(value):
    with pytest.raises(MessageError, match="cannot be sent"):
        pack({"x": value})
