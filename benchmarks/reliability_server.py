"""A policy's server in a process of its own: what an honest client waits beside an attack, and how it grows."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil
from websockets.sync.client import ClientConnection, connect

from benchmarks.damage import hostile_message
from benchmarks.rollout_speed import save_untrained_policy
from ipvla.rollout.openpi.messages import pack
from ipvla.storage import SOURCE_TREE
from studies.record import Figures

_MB: Final = 2**20
#: Share of a soak that counts as warm-up: allocators and caches fill.
_WARM_UP: Final = 0.25


def observation(rng: np.random.Generator, prompt: str = "press the red button") -> dict[str, Any]:
    """A good message for an untrained policy."""
    images = {
        f"observation/{name}": rng.integers(0, 255, (96, 96, 3), np.uint8) for name in ("image", "wrist_image")
    }
    return {**images, "observation/state": rng.normal(size=8).astype(np.float32), "prompt": prompt}


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    process: psutil.Process

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http{self.url.removeprefix('ws')}/healthz", timeout=60) as answer:
            told: dict[str, Any] = json.load(answer)
        return told


@contextmanager
def serving(*settings: str) -> Iterator[Served]:
    """A server of an untrained policy, as `ray_jobs.serve` starts it with these settings."""
    with TemporaryDirectory() as place:
        save_untrained_policy(Path(place) / "policy")
        command = ("ray_jobs.serve", "--policy", f"{place}/policy", "--storage_root", place, "--server.port", "0")
        with subprocess.Popen(
            [sys.executable, "-m", *command, *settings],
            cwd=SOURCE_TREE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it logs every refusal of a policy
            text=True,
            env=os.environ,
        ) as process:
            assert process.stdout is not None
            found = re.search(r"ws://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found, "the server says where it is"
            try:
                yield Served(found[0], psutil.Process(process.pid))
            finally:
                process.terminate()


def measure_delay(seconds: float, seed: int) -> Figures:
    """An honest client's answers, alone and beside one that sends hostile messages as fast as they are refused."""
    with serving() as server:
        quiet = _latencies(server.url, seconds)
        spawn = multiprocessing.get_context("spawn")
        ready, end = spawn.Event(), spawn.Event()
        attacker = spawn.Process(target=attack, args=(server.url, seed, ready, end))
        attacker.start()
        try:
            ready.wait(60)
            attacked = _latencies(server.url, seconds)
        finally:
            end.set()
            attacker.join(60)
    median_s = float(np.median(quiet))
    return {
        "answer_ms_median": 1e3 * median_s,
        "canary_answers": len(attacked),
        "quiet_delay_ms_p999": 1e3 * (float(np.quantile(quiet, 0.999)) - median_s),
        "canary_delay_ms_p999": 1e3 * (float(np.quantile(attacked, 0.999)) - median_s),
        "canary_delay_ms_most": 1e3 * (float(attacked.max()) - median_s),
    }


def attack(url: str, seed: int, ready: Event, end: Event) -> None:
    """Sends hostile messages until `end`, in a process of its own."""
    rng = np.random.default_rng(seed)
    messages = [hostile_message(observation(rng), rng, heavy=0.5) for _ in range(40)]
    with connect(url, compression=None, max_size=None, open_timeout=30) as connection:
        connection.recv()
        ready.set()
        while not end.is_set():
            connection.send(messages[int(rng.integers(len(messages)))])
            connection.recv(timeout=60)


def _latencies(url: str, seconds: float) -> npt.NDArray[np.float64]:
    """Seconds of each answer."""
    message = pack(observation(np.random.default_rng(0)))
    taken, end = [], time.monotonic() + seconds
    with connect(url, compression=None, max_size=None) as connection:
        connection.recv()
        for _ in range(5):  # a model's first ones are slow
            connection.send(message)
            connection.recv()
        while time.monotonic() < end:
            began = time.perf_counter()
            connection.send(message)
            assert isinstance(connection.recv(timeout=60), bytes), "an honest client is never refused"
            taken.append(time.perf_counter() - began)
    return np.array(taken)


class _Clients:
    """Everybody who talks to a server in a soak, a thread each, until `end`."""

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._seed = url, seed
        self.end = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        kinds = (self._robot, self._robot, self._renaming, self._visitors, self._talker, self._hostile)
        self.threads = [threading.Thread(target=self._guard, args=(kind, i)) for i, kind in enumerate(kinds)]

    def _guard(self, talk: Callable[[np.random.Generator], None], number: int) -> None:
        try:
            talk(np.random.default_rng((self._seed, number)))
        except Exception as error:
            self.failures.append(f"{talk.__name__.strip('_')}: {error!r:.200}")

    def _connected(self) -> ClientConnection:
        connection = connect(self._url, compression=None, max_size=None, open_timeout=60)
        connection.recv(timeout=60)
        return connection

    def _ask(self, connection: ClientConnection, message: dict[str, Any]) -> None:
        connection.send(pack(message))
        answer = connection.recv(timeout=120)
        self.counts["answers" if isinstance(answer, bytes) else "honest_refused"] += 1

    def _robot(self, rng: np.random.Generator) -> None:
        """One connection for all episodes of 40 messages."""
        with self._connected() as connection:
            step = 0
            while not self.end.wait(0.15):
                self._ask(connection, observation(rng) | {"reset": step % 40 == 0})
                step += 1

    def _renaming(self, rng: np.random.Generator) -> None:
        """One connection, and a new session for every three messages."""
        with self._connected() as connection:
            step = 0
            while not self.end.wait(0.2):
                self._ask(connection, observation(rng) | {"session_id": f"episode {step // 3}"})
                step += 1

    def _visitors(self, rng: np.random.Generator) -> None:
        """Connections of some messages; half of them leave a named session behind, some leave without a word."""
        number = 0
        while not self.end.wait(0.7):
            connection, number = self._connected(), number + 1
            named = {"session_id": f"visitor {number}"} if rng.random() < 0.5 else {}
            for _ in range(int(rng.integers(1, 4))):
                self._ask(connection, observation(rng) | named)
            if rng.random() < 0.3:
                connection.socket.close()
            connection.close()
            self.counts["connections"] += 1

    def _talker(self, rng: np.random.Generator) -> None:
        """A prompt of its own with every message, of up to the longest."""
        with self._connected() as connection:
            while not self.end.wait(0.3):
                words = " ".join(f"{int(n):x}" for n in rng.integers(2**32, size=int(rng.integers(1, 200))))
                connection.send(pack(observation(rng, words[:2000])))
                connection.recv(timeout=120)
                self.counts["prompts"] += 1

    def _hostile(self, rng: np.random.Generator) -> None:
        with self._connected() as connection:
            while not self.end.wait(0.5):
                connection.send(hostile_message(observation(rng), rng, heavy=0.02))
                connection.recv(timeout=120)
                self.counts["hostile"] += 1


def measure_soak(hours: float, seed: int, every_s: float = 10.0) -> Figures:
    """A server's memory while clients of all kinds use it for `hours`.

    The slope is of the least-squares line through its resident memory (MB per hour) after the first quarter.
    """
    hours_s, rss_mb, files = [], [], []
    with serving("--server.lease_s", "60") as server:
        clients = _Clients(server.url, seed)
        for thread in clients.threads:
            thread.start()
        began = time.monotonic()
        try:
            while (elapsed_s := time.monotonic() - began) < 3600 * hours and not clients.failures:
                hours_s.append(elapsed_s / 3600)
                rss_mb.append(server.process.memory_info().rss / _MB)
                files.append(server.process.num_fds())
                time.sleep(every_s)
        finally:
            clients.end.set()
            for thread in clients.threads:
                thread.join(150)
        health = server.health()
    counted = [(hour, mb) for hour, mb in zip(hours_s, rss_mb, strict=True) if hour >= _WARM_UP * hours]
    settled, settled_mb = np.array(counted).T
    return {
        "hours": hours_s[-1],
        "rss_mb": {"first": rss_mb[0], "settled": float(settled_mb[0]), "last": rss_mb[-1], "most": max(rss_mb)},
        "slope_mb_per_hour": float(np.polyfit(settled, settled_mb, 1)[0]),
        "course_mb": [round(float(part.mean()), 2) for part in np.array_split(np.array(rss_mb), 24) if len(part)],
        "files": {"first": files[0], "last": files[-1]},
        "sessions": health["sessions"],
        "clients": dict(clients.counts),
        "failures": clients.failures,
    }
