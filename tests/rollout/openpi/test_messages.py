import contextlib
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ipvla.rollout.openpi.messages import MessageError, ObservationError, from_message, pack, unpack

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
        ({b"dtype": "|O", b"data": bytes(8), b"shape": [1]}, "dtype .|O"),
        ({b"dtype": "V8", b"data": bytes(8), b"shape": [1]}, "dtype"),
        ({b"dtype": "nonsense", b"data": bytes(8), b"shape": [1]}, "'nonsense'"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [3]}, "8 bytes"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [-1]}, r"shape \[-1\]"),
        ({b"dtype": "<f4", b"data": bytes(8), b"shape": [2**40, 2**40]}, "8 bytes"),
        ({b"dtype": "<f4", b"data": "text", b"shape": [1]}, "str"),
        ({b"dtype": "<f4"}, "shape None"),
        ({b"dtype": None, b"data": bytes(8), b"shape": [1]}, "dtype None"),
        ({b"dtype": "(1,2,f4", b"data": bytes(8), b"shape": [1]}, "dtype"),
        ({b"dtype": ",".join(["f4"] * 10_000), b"data": bytes(8), b"shape": [1]}, "dtype"),
        ({b"dtype": "|u1", b"data": b"1", b"shape": [True, True]}, "shape"),
        ({b"dtype": "|u1", b"data": b"1", b"shape": [1] * 33}, "at most 32 lengths"),
        ({b"dtype": "|u1", b"data": b"", b"shape": [0, 2**62, 2**62]}, "none of this shape"),
    ],
)
def test_an_array_is_what_its_bytes_can_be(array, reason):
    with pytest.raises(MessageError, match=reason):
        unpack(msgpack.packb({b"__ndarray__": True, **array}))


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), np.array(["a"]), np.array([1j])])
def test_only_numbers_and_words_are_sent(value):
    with pytest.raises(MessageError, match="cannot be sent"):
        pack({"x": value})


@pytest.mark.parametrize("number", [300, -1, 2**63, "1", [1] * 100, {}, None])
def test_a_number_is_what_its_type_can_hold(number):
    with pytest.raises(MessageError, match="a number of uint8"):
        unpack(msgpack.packb({b"__npgeneric__": True, b"dtype": "|u1", b"data": number}))


MIB = 2**20
#: What took seconds, hours or gigabytes, or what is like it.
HEAVY = {
    "shape": {b"__ndarray__": True, b"data": b"1", b"dtype": "|u1", b"shape": [2**31] * 2_000_000},
    "words": {"prompt": "red " * (4 * MIB - 100)},
    "letters outside ASCII": {"prompt": "\U0010ffff" * (4 * MIB - 100)},
    "many short texts": [["ab"] * 200] * 20_000,
    "many maps": [[{}] * 200] * 50_000,
    "numbers as a list": {"observation/state": [0.5] * 1_500_000},
    "many keys": {str(i): None for i in range(1_000_000)},
    "long key": {"k" * 15 * MIB: 1},
    "bytes for a name": {"prompt": bytes(15 * MIB)},
    "fields": {b"__ndarray__": True, b"dtype": "f4," * 5_000_000, b"data": b"", b"shape": []},
}
PICTURE = np.zeros((64, 64, 3), np.uint8)
GOOD = {"observation/image": PICTURE, "observation/state": np.zeros(2, np.float32), "prompt": "go"}


def sent_as(value):
    """Whatever it claims of arrays."""
    return msgpack.packb(
        value,
        default=lambda v: {b"__ndarray__": True, b"data": v.tobytes(), b"dtype": v.dtype.str, b"shape": v.shape},
    )


def read(message):
    """What the server does with bytes before the model sees them."""
    return from_message(unpack(message), ("agentview",), 2, 0)


def refused_in_time(message, limit_s=0.05):
    """The refusal; CPU time, since others use this machine too."""
    began = time.thread_time()
    try:
        read(message)
        refusal = ""
    except (MessageError, ObservationError) as error:
        refusal = str(error)
    assert time.thread_time() - began < limit_s
    assert len(refusal) < 1000
    return refusal


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_nonsense_is_refused_at_once(name):
    for value in (HEAVY[name], {**GOOD, "observation/state": HEAVY[name]}):
        assert refused_in_time(sent_as(value))


def test_nesting_is_refused_at_once():
    for opening in (b"\x91", b"\x81\xa1a", b"\xdc\x01\x00"):
        assert refused_in_time(opening * (15 * MIB // len(opening)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"observation/image": np.zeros((1, 5000, 3), np.uint8)}, "at most 4096 pixels a side"),
        ({"observation/image": np.zeros((5000, 1, 3), np.uint8)}, "at most 4096 pixels a side"),
        ({"prompt": "red " * 1000}, "has 4000 characters"),
        ({"observation/state": np.array([1e300, 0])}, "finite as float32"),
        ({"t": [1] * 200}, "t is"),
    ],
)
def test_an_observation_costs_no_more_than_others(changed, reason):
    assert reason in refused_in_time(pack({**GOOD, **changed}))


INTEGERS = st.integers(-(2**63), 2**64 - 1)  # of msgpack
HOSTILE_ARRAYS = st.fixed_dictionaries(
    {b"__ndarray__": st.just(True)},
    optional={
        b"data": st.binary(max_size=64) | st.text() | st.none(),
        b"dtype": st.text(max_size=12)
        | st.sampled_from(["<f4", "|u1", "|O", "V8", "f4,f4", "<M8[s]", "f16"])
        | NUMBERS,
        b"shape": st.lists(INTEGERS | st.booleans(), max_size=40) | INTEGERS | st.none(),
    },
)
HOSTILE = st.recursive(
    st.none()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | HOSTILE_ARRAYS
    | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from([*GOOD, "t", "reset", "session_id"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(HOSTILE, st.dictionaries(st.sampled_from([*GOOD, "t"]), HOSTILE, max_size=3))
def test_whatever_a_message_holds_it_is_read_or_refused_in_time(value, changes):
    for sent in (value, {**GOOD, **changes}):
        refused_in_time(sent_as(sent))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_and_lost_bytes_are_read_or_refused_in_time(data):
    message = bytearray(pack(GOOD))
    for place in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=8)):
        message[place] = data.draw(st.integers(0, 255))
    refused_in_time(bytes(message[: data.draw(st.integers(0, len(message)))]))


CAMERAS = {"high": np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3), "wrist": np.zeros((6, 5, 3), np.uint8)}


@pytest.mark.parametrize("channels_first", [True, False])
def test_an_observation_of_openpis_aloha_clients(channels_first):
    images = {name: image.transpose(2, 0, 1) if channels_first else image for name, image in CAMERAS.items()}
    sent = unpack(pack({"images": images, "state": np.arange(14.0)}))
    observation = from_message(sent, tuple(CAMERAS), 14, 3, prompt="fold the towel")
    assert all(np.array_equal(observation.images[name], image) for name, image in CAMERAS.items())
    assert observation.proprio.tolist() == list(range(14))
    assert (observation.instruction, observation.t) == ("fold the towel", 3)
    assert from_message({**sent, "prompt": "go"}, ("high",), 14, 0, prompt="fold").instruction == "go"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"images": [1], "state": np.zeros(2), "prompt": "go"}, "images is a list; send a map from cameras"),
        ({"images": {"high": PICTURE}, "state": np.zeros(2), "prompt": "go"}, "lacks observation/image"),
        ({"images": {"agentview": PICTURE}, "prompt": "go"}, "lacks observation/state"),
        ({"images": {"agentview": PICTURE}, "state": np.zeros(2)}, "lacks prompt"),
        ({"images": {"agentview": PICTURE[0]}, "state": np.zeros(2), "prompt": "go"}, "send uint8 [H, W, 3]"),
    ],
)
def test_what_is_wrong_with_an_aloha_message_is_said(sent, reason):
    with pytest.raises(ObservationError) as caught:
        from_message(sent, ("agentview",), 2, 0)
    assert reason in str(caught.value)
