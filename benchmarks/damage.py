"""Files as crashes and bad disks leave them, messages as hostile clients send them: drawn by a generator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import numpy as np

from ipvla.rollout.openpi.messages import pack

#: In the place of a value of a record.
_ABSURD: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    0,
    2,
    10**6,
    10**9,
    10**18,
    -(2**70),
    0.5,
    float("nan"),
    float("inf"),
    1e300,
    "",
    "x",
    "\ud7ff\u2603",
    "/dev/null",
    "evil/model",
    [],
    [[]],
    [1, "a"],
    {},
    {"type": "x"},
    {"a": {"b": {}}},
)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The file cut, with other bytes, or, if it is a JSON record, with other values; seldom what it was."""
    ways: list[Callable[[bytes, np.random.Generator], bytes]] = [_cut, _flipped, _zeroed, _foreign]
    try:
        tree = json.loads(content)
    except ValueError:
        pass
    else:
        ways += [lambda _, rng: _with_other_values(tree, rng)] * 8
    return ways[int(rng.integers(len(ways)))](content, rng)


@dataclass
class Trials:
    """What a loader made of damaged files.

    Attributes:
        count: of loads.
        refused: by the promised class, in one line.
        broken: other errors, or longer texts: what was raised.
        slowest_s: CPU time of the slowest load; what takes half a second is timed again, since the process's
            garbage collection may have fallen into it, and the shorter time counts.
    """

    promised: type[Exception]
    count: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def load(self, load: Callable[[], object]) -> None:
        """One more."""
        seconds, error = _timed(load)
        if seconds > 0.5:
            seconds = min(seconds, _timed(load)[0])
        if isinstance(error, self.promised):
            self.refused += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                self.broken.append(f"{str(error)!r:.300}")
        elif error is not None:
            self.broken.append(f"{error!r:.300}")
        self.count, self.slowest_s = self.count + 1, max(self.slowest_s, seconds)


def _timed(load: Callable[[], object]) -> tuple[float, Exception | None]:
    """CPU time in seconds, and what was raised."""
    began = time.process_time()
    try:
        load()
    except Exception as error:
        return time.process_time() - began, error
    return time.process_time() - began, None


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes, half the time all of them near the file's head."""
    changed = bytearray(content)
    end = len(content) if rng.random() < 0.5 else min(len(content), 512)
    for place in rng.integers(end, size=int(rng.integers(1, 9))):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def _zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    """Pages that never reached the disk."""
    begin = int(rng.integers(len(content))) // 512 * 512
    length = min(512 * int(rng.integers(1, 64)), len(content) - begin)
    return content[:begin] + bytes(length) + content[begin + length :]


def _foreign(content: bytes, rng: np.random.Generator) -> bytes:
    others = (
        b"",
        b"\x1f\x8b\x08\x00" + content[:100],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"[" * 200_000,
        b"[]",
        b"null",
        b"\xff\xfe" + content,
        rng.bytes(200),
        (2**62).to_bytes(8, "little") + content[8:],
    )
    return others[int(rng.integers(len(others)))]


def _with_other_values(tree: Any, rng: np.random.Generator) -> bytes:
    copy = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 3))):
        places = list(_places(copy))
        if not places:
            return b"{}"
        holder, key = places[int(rng.integers(len(places)))]
        if rng.random() < 0.3:
            del holder[key]
        elif isinstance(holder, dict) and rng.random() < 0.1:
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder[key] = _ABSURD[int(rng.integers(len(_ABSURD)))]
    return json.dumps(copy).encode()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value below; of long lists the first few."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(min(len(tree), 4)))
    return [(tree, key) for key in keys] + [place for key in keys for place in _places(tree[key])]


def hostile_message(good: Mapping[str, Any], rng: np.random.Generator, heavy: float = 0.01) -> bytes:
    """A message for a policy server that is damaged, claims what is not so, or has up to 16 MiB.

    Args:
        heavy: how often it is the last, in [0, 1].
    """
    if rng.random() < heavy:
        return _heavy(rng)
    way = int(rng.integers(4))
    if way == 0:
        return _flipped(pack(dict(good)), rng)
    if way == 1:
        return _cut(pack(dict(good)), rng)
    message: dict[Any, Any] = {name: _plain(value) for name, value in good.items()}
    names = [*good, "t", "reset", "session_id"]
    for _ in range(int(rng.integers(1, 4))):
        message[names[int(rng.integers(len(names)))]] = _claim(rng) if way == 2 else _value(rng, 4)
    packed: bytes = msgpack.packb(message)
    return packed


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _heavy(rng: np.random.Generator) -> bytes:
    """Some MiB, up to 16."""
    n = int(rng.integers(1, 16)) * 2**20
    texts: list[Callable[[], Any]] = [
        lambda: {"prompt": "red " * (n // 4)},
        lambda: {"prompt": "\U0010ffff" * (n // 4)},
        lambda: {"prompt": bytes(n)},
        lambda: {b"__ndarray__": True, b"data": b"1", b"dtype": "|u1", b"shape": [2**31] * (n // 5)},
        lambda: [["ab"] * 200] * (n // 600),
        lambda: [[{}] * 200] * (n // 200),
        lambda: [0.5] * (n // 9),
        lambda: {"k" * n: 1},
        lambda: {"observation/image": _plain(np.zeros((1, n // 3, 3), np.uint8))},
    ]
    packed: bytes = msgpack.packb(texts[int(rng.integers(len(texts)))]())
    return packed


def _claim(rng: np.random.Generator) -> dict[bytes, Any]:
    """An array that is none."""
    dtypes = ("<f4", "|u1", "|O", "V8", "f4,f4", "(2,2)f4", "<M8[s]", "", "float32", None, 3, "f4," * 1000)
    shape: Any = [int(n) for n in rng.choice([0, 1, 2, 8, -1, 2**31, 2**62], size=int(rng.integers(0, 40)))]
    kind = b"__ndarray__" if rng.random() < 0.8 else b"__npgeneric__"
    return {
        kind: True,
        b"dtype": dtypes[int(rng.integers(len(dtypes)))],
        b"data": rng.bytes(int(rng.integers(0, 64))) if rng.random() < 0.8 else _value(rng, 1),
        b"shape": shape if rng.random() < 0.9 else _value(rng, 1),
    }


def _value(rng: np.random.Generator, depth: int) -> Any:
    """Anything that msgpack can say."""
    if depth and rng.random() < 0.4:
        inner = [_value(rng, depth - 1) for _ in range(int(rng.integers(0, 5)))]
        return inner if rng.random() < 0.5 else {str(index): value for index, value in enumerate(inner)}
    text = "go" * int(rng.integers(2000))
    values = (None, True, -1, 2**63, 0.5, float("nan"), float("inf"), 1e300, "", text, b"x")
    return values[int(rng.integers(len(values)))]
