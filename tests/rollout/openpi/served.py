"""A policy server in a thread of this process, for as long as a test lasts."""

import asyncio
import contextlib
import threading
from pathlib import Path

from ipvla.rollout.openpi.messages import from_message
from ipvla.rollout.openpi.server import PolicyWebsocketServer, ServerConfig, serve_until
from ipvla.rollout.policy_actor import PolicyActor, PolicySource
from tests.rollout.point import load_point


@contextlib.contextmanager
def serving(
    config: ServerConfig | None = None, token: str | None = None, load=load_point, limits=None, action_dim=None
):
    """Yields (server, url) of the point policy: no camera, a state of two numbers."""
    started, port = threading.Event(), []
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        actor = PolicyActor(PolicySource(load, Path()), threads=1)
        server = PolicyWebsocketServer(
            config or ServerConfig(port=0),
            actor,
            lambda message, t: from_message(message, (), 2, t, None, action_dim),
            {"server": "ipvla", "policy_sha256": "abc"},
            token,
            limits,
        )
        servers.append(server)

        def told(number: int) -> None:
            port.append(number)
            started.set()

        await serve_until(stop, server, told)

    servers: list[PolicyWebsocketServer] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            loop.run_until_complete(run())
        except Exception as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(20)
    if failed:
        raise failed[0]
    try:
        yield servers[0], f"ws://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()
