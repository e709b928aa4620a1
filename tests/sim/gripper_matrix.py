"""Does "close" close the hand and "open" open it, for every protocol and kind of player, in the real engine?

    python -m tests.sim.gripper_matrix

Players are real: policies that were saved and are loaded, whose data never did anything but close (or open) the
hand; a scripted expert; our server with such a policy; a server that is not ours and speaks the language of the
protocol. Measured is how far the fingers are apart after some control steps of Recall's engine; neither Ray nor
assets are needed.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ipvla.contract import HAND, Contract, Gripper, Orientation, Pictures, from_environment
from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.rollout.endpoint import PolicyEndpoint
from ipvla.rollout.episode import EpisodeId
from ipvla.rollout.expert_policy import ExpertClient, ExpertSource
from ipvla.rollout.openpi.client import OpenpiClient, OpenpiSource
from ipvla.rollout.openpi.messages import from_message
from ipvla.rollout.openpi.server import PolicyWebsocketServer, ServerConfig, serve_until
from ipvla.rollout.policy_actor import PolicyActor, PolicySource
from ipvla.rollout.policy_server import PolicyServer
from ipvla.rollout.sim_worker import EpisodeJob, SimWorker
from ipvla.sim.demonstration import Expert
from ipvla.sim.libero import LiberoSimulator
from ipvla.sim.protocol_simulator import ProtocolSimulator
from ipvla.sim.protocols import PROTOCOLS, EvaluationProtocol
from ipvla.sim.simulator import Simulator, Split
from ipvla.sim.suite import Suite, SuiteEntry
from ipvla.sim.suites import SUITES, load_suite
from ipvla.types import EpisodeSpec, Memory, Observation
from ray_jobs.serve import ServeConfig, serving

#: What a player says -> the gripper of the simulator's action.
WORDS: Final[Mapping[str, float]] = {"open": -1.0, "close": 1.0}
#: Our own policies: what their data are like.
STANDARDS: Final[Mapping[str, tuple[Gripper, Orientation]]] = {
    "own demonstrations": ("environment", "upright"),
    "LIBERO as published": ("open_is_one", "mirrored"),
    "environment gripper, mirrored": ("environment", "mirrored"),
    "open is one, upright": ("open_is_one", "upright"),
}
#: Fingers that are closer than the one are closed, further apart than the other open, in metres.
_CLOSED_M, _OPEN_M = 0.01, 0.07
_STEPS, _CHUNK, _SIDE = 16, 8, 32
_SUITE = "gripper_matrix"


@dataclass(frozen=True)
class Cell:
    """One player under one protocol, for one word.

    Attributes:
        fingers_m: how far the fingers are apart in the end.
    """

    protocol: str
    player: str
    word: str
    fingers_m: float

    @property
    def right(self) -> bool:
        return self.fingers_m < _CLOSED_M if self.word == "close" else self.fingers_m > _OPEN_M


def gripper_right(cells: Sequence[Cell]) -> float:
    """The share of (protocol, player) that close and open the hand when they say so."""
    right: dict[tuple[str, str], bool] = {}
    for cell in cells:
        key = (cell.protocol, cell.player)
        right[key] = right.get(key, True) and cell.right
    return sum(right.values()) / len(right)


def gripper_matrix(
    scratch: Path,
    protocols: Sequence[EvaluationProtocol] = tuple(PROTOCOLS.values()),
    suite: str = "recall",
    task: str = "ground_red",
) -> list[Cell]:
    """All cells, in this process; about half a minute.

    Args:
        scratch: a directory for the policies and the suite's files.
        suite, task: whose world the hand moves in.
    """
    cells = []
    with _engine(scratch, suite, task) as engine:
        for word in WORDS:
            with ExitStack() as stack:
                stack.enter_context(_always(word))
                players = stack.enter_context(_players(scratch, word))
                for protocol in protocols:
                    short = replace(protocol, horizons={_SUITE: _STEPS}, render_size=_SIDE)
                    native = stack.enter_context(_native_player(short, word))
                    for name, player in {**players, "openpi server": native}.items():
                        cells.append(Cell(protocol.name, name, word, _played(engine, short, player)))
    return cells


def _played(engine: LiberoSimulator, protocol: EvaluationProtocol, player: _Player) -> float:
    """Metres between the fingers after an episode, played as a simulator's worker plays it."""
    view = player.endpoint.view(protocol.contract(HAND), protocol.name)
    worker = SimWorker(lambda suite, task: ProtocolSimulator(engine, protocol, suite))
    worker.run(EpisodeJob(EpisodeSpec(_SUITE, engine.task.name, Split.HELD_OUT.seed(0), 0), player.client(), view))
    fingers = engine.problem.hand().fingers
    return float(abs(fingers[0] - fingers[1]))


@dataclass(frozen=True)
class _Player:
    """An endpoint, and what a simulator's process holds of it."""

    endpoint: PolicyEndpoint
    client: Callable[[], Any]


@contextmanager
def _engine(scratch: Path, suite: str, task: str) -> Iterator[LiberoSimulator]:
    simulator = load_suite(suite, scratch).simulator(task, _SIDE, HAND.cameras)
    assert isinstance(simulator, LiberoSimulator)
    try:
        yield simulator
    finally:
        simulator.close()


@contextmanager
def _always(word: str) -> Iterator[None]:
    """Registers a suite whose expert says nothing else."""

    class Always:
        def act(self) -> npt.NDArray[np.float64]:
            return np.array([0, 0, 0, 0, 0, 0, WORDS[word]], np.float64)

    def expert(simulator: Simulator, seed: int) -> Expert:
        return Always()

    recall = SUITES["recall"]

    def load(cache_dir: Path) -> Suite:
        return replace(recall.load(cache_dir), name=_SUITE, expert=expert)

    SUITES[_SUITE] = SuiteEntry(_SUITE, load, recall.tasks, recall.facts)
    try:
        yield
    finally:
        del SUITES[_SUITE]


@contextmanager
def _players(scratch: Path, word: str) -> Iterator[dict[str, _Player]]:
    """Those that are the same under every protocol."""
    players = {"expert": _Player(ExpertSource(scratch), lambda: ExpertClient(scratch))}
    for name, (gripper, orientation) in STANDARDS.items():
        directory = scratch / f"{name.replace(' ', '_')}_{word}"
        save_policy(directory, gripper, orientation, word)
        policy = Policy.load(directory)
        players[name] = _Player(PolicySource(Policy.load, directory), partial(_Here, policy))
    served = scratch / f"{next(iter(STANDARDS)).replace(' ', '_')}_{word}"
    with _listening(serving(ServeConfig(policy=served, server=ServerConfig(port=0)), None)) as url:
        players["our server"] = _Player(OpenpiSource(url), lambda: OpenpiClient(url))
        yield players


@contextmanager
def _native_player(protocol: EvaluationProtocol, word: str) -> Iterator[_Player]:
    """A server that is not ours: it says the word in the protocol's language."""
    spoken = protocol.contract(HAND)
    source = PolicySource(partial(_load_native, spoken, word), Path())
    server = PolicyWebsocketServer(
        ServerConfig(port=0),
        PolicyActor(source, threads=1),
        lambda message, t: from_message(message, spoken.cameras, spoken.state_size, t),
        {"model": "somebody else's"},
        None,
    )
    with _listening(server) as url:
        yield _Player(OpenpiSource(url), lambda: OpenpiClient(url))


class _Native:
    """Says one word for ever, in a protocol's language."""

    execute = _CHUNK

    def __init__(self, spoken: Contract, word: str) -> None:
        action = np.array([0, 0, 0, 0, 0, 0, WORDS[word]], np.float32)
        self._action = from_environment(action, spoken.gripper).astype(np.float32)

    def initial_memory(self, batch: int) -> Memory:
        return {}

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        return np.tile(self._action, (len(observations), _CHUNK, 1)), memory


def _load_native(spoken: Contract, word: str, directory: Path) -> _Native:
    return _Native(spoken, word)


class _Here:
    """A policy in this process, in place of its Ray actor."""

    def __init__(self, policy: Policy) -> None:
        self._server = PolicyServer(policy)

    def act(self, episode_id: EpisodeId, observation: Observation, policy_step: int) -> npt.NDArray[np.float32]:
        (chunk,) = self._server.forward([self._server.admit(episode_id, policy_step, observation)])
        assert isinstance(chunk, np.ndarray)
        return chunk

    def end(self, episode_id: EpisodeId) -> None:
        self._server.end(episode_id)


def save_policy(directory: Path, gripper: Gripper, orientation: Orientation, word: str) -> None:
    """A policy whose data were recorded on these terms, and never did anything but open or close the hand."""
    said = from_environment(np.array([0, 0, 0, 0, 0, 0, WORDS[word]]), gripper).astype(np.float32)
    proprio = np.random.default_rng(0).normal(size=(40, HAND.state_size)).astype(np.float32)
    conventions = Conventions(
        Statistics.compute([np.tile(said, (40, 1))], [proprio]),
        cameras=("agentview",),
        image_size=_SIDE,
        chunk=_CHUNK,
        gripper=gripper,
        recorded=replace(HAND, gripper=gripper, pictures=Pictures(orientation)),
    )
    config = IPVLAConfig(backbone=TinyConfig(max_prompt_tokens=64), chunk=_CHUNK)
    Policy.build(config, conventions, _CHUNK).save(directory)


@contextmanager
def _listening(server: PolicyWebsocketServer) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    loop, stop, started, ports = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), list[int]()

    def on_start(port: int) -> None:
        ports.append(port)
        started.set()

    def run() -> None:
        try:
            loop.run_until_complete(serve_until(stop, server, on_start))
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    if not ports:
        raise RuntimeError("the server did not start; its thread says why")
    try:
        yield f"ws://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def main() -> None:
    """Prints the cells that are wrong, and the share of right ones."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        cells = gripper_matrix(Path(scratch))
    for cell in cells:
        if not cell.right:
            console.print(
                f"{cell.protocol}, {cell.player}: says {cell.word}, fingers {cell.fingers_m:.3f} m apart"
            )
    console.print(f"gripper_right {gripper_right(cells):.3f} of {len(cells) // len(WORDS)} protocols x players")


if __name__ == "__main__":
    main()
