"""A line every half minute from a job that has nothing else to say, where no terminal shows a bar."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

#: The longest silence in seconds.
EVERY_S: Final = 25.0


class _Watched:
    """A stream that knows when it was last written to; all else is the stream's own."""

    def __init__(self, stream: TextIO, wrote: Any) -> None:
        self._stream, self._wrote = stream, wrote

    def write(self, text: str) -> int:
        self._wrote()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def heartbeat(program: str, every_s: float = EVERY_S) -> Iterator[None]:
    """Within, stderr gets a line whenever neither it nor stdout has got anything for `every_s` seconds.

    Nothing happens where stderr is a terminal.
    """
    out, err = sys.stdout, sys.stderr
    if err.isatty():
        yield
        return
    began = last = time.monotonic()
    over = threading.Event()

    def wrote() -> None:
        nonlocal last
        last = time.monotonic()

    def beat() -> None:
        while not over.wait(max(0.0, last + every_s - time.monotonic())):
            if time.monotonic() - last >= every_s:
                since = time.monotonic() - began
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} {program}: at work since {since:.0f} s\n")
                sys.stderr.flush()

    sys.stdout, sys.stderr = _Watched(out, wrote), _Watched(err, wrote)
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sys.stdout, sys.stderr = out, err
