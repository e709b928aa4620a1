"""A policy behind vla-evaluation-harness's websocket: one action for each observation, a memory per episode.

The client says hello, and is told what the policy reads and gives. `episode_start` empties the memory; the policy
is asked when the actions of its last chunk are played. An observation outside an episode is refused: where a
connection was lost the harness goes on in a new one, and the memory would silently be that of a beginning.
"""

from __future__ import annotations

import http
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from ipvla.contract import Contract, Limits
from ipvla.rollout.openpi.messages import RESET, MessageError, cut
from ipvla.rollout.openpi.server import AnswersEpisodes, PolicyWebsocketServer, ServerConfig
from ipvla.rollout.vla_eval.messages import (
    ACTION,
    EPISODE_END,
    EPISODE_START,
    ERROR,
    HELLO,
    OBSERVATION,
    PROTOCOL_VERSION,
    Message,
    harness_camera,
    to_openpi,
)
from ipvla.types import Observation

_HEALTH: Final = "/health"


@dataclass
class _Playing:
    """What is known of a connection.

    Attributes:
        seq: of its last message.
        running, begins: whether an episode is under way, and whether its first observation is still to come.
        left: actions of the last chunk that were not played yet, [A] each.
    """

    seq: int = 0
    running: bool = False
    begins: bool = False
    left: deque[npt.NDArray[np.float32]] = field(default_factory=deque)


class HarnessServer(PolicyWebsocketServer):
    """See the module's docstring; sessions and limits are those of the server of openpi's protocol.

    Args:
        contract: of the policy.
        observe: of a message with the keys of openpi's.

    Raises:
        ValueError: others than this machine could connect, and the harness has no token to send; or the policy
            reads depth, which it does not send either.
    """

    def __init__(
        self,
        config: ServerConfig,
        policy: AnswersEpisodes,
        observe: Callable[[Any, int], Observation],
        metadata: Mapping[str, Any],
        contract: Contract,
        limits: Limits | None = None,
    ) -> None:
        if not config.is_loopback:
            raise ValueError(
                f"server.host {config.host} lets others than this machine in, and vla-evaluation-harness sends no "
                "token; set it to 127.0.0.1, and reach it through ssh -L"
            )
        if contract.geometry:
            raise ValueError(
                "the policy reads depth (model.fusion), which vla-evaluation-harness does not send; serve it by "
                "--protocol openpi, or one with model.fusion.type none"
            )
        super().__init__(config, policy, observe, metadata, None, limits)
        self.greeting = None
        self._hello = hello(contract, metadata)
        self._cameras = contract.cameras
        self._unread_state = contract.state_size if contract.state == "none" else None
        self._playing: dict[ServerConnection, _Playing] = {}

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == _HEALTH:
            return connection.respond(http.HTTPStatus.OK, json.dumps(self.status()) + "\n")
        return super()._admit(connection, request)

    async def _reply(self, connection: ServerConnection, message: bytes) -> bytes | None:
        playing = self._playing.setdefault(connection, _Playing())
        read: Message = await self._read(Message.unpack, message)
        playing.seq = read.seq
        if read.type == HELLO:
            if (version := read.payload.get("protocol_version", PROTOCOL_VERSION)) != PROTOCOL_VERSION:
                raise MessageError(f"protocol_version is {cut(version)}; this server speaks {PROTOCOL_VERSION}")
            return Message(HELLO, self._hello, read.seq).pack()
        if read.type in (EPISODE_START, EPISODE_END):
            playing.running = playing.begins = read.type == EPISODE_START
            playing.left.clear()
        elif read.type == OBSERVATION:
            action = await self._action(connection, playing, read.payload)
            return Message(ACTION, {"actions": action}, read.seq).pack()
        return None

    def _refusal(self, connection: ServerConnection, text: str) -> bytes:
        return Message(ERROR, {"error": text}, self._playing.get(connection, _Playing()).seq).pack()

    async def _left(self, connection: ServerConnection) -> None:
        self._playing.pop(connection, None)
        await super()._left(connection)

    async def _action(
        self, connection: ServerConnection, playing: _Playing, payload: Mapping[str, Any]
    ) -> npt.NDArray[np.float32]:
        """The next action, float32 [A]."""
        if not playing.running:
            raise MessageError("an observation of no episode; send episode_start first (was the connection lost?)")
        if not playing.left:
            message = to_openpi(payload, self._cameras, self._unread_state) | {RESET: playing.begins}
            playing.left.extend((await self._act(connection, message))["actions"])
            playing.begins = False
        return playing.left.popleft()


def hello(contract: Contract, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness compares with its benchmark, and the settings that it gives the benchmark.

    `observation_params` are those of its LIBERO benchmarks. What the two have no common word for is left out.
    """
    reads = contract.state != "none"
    told: dict[str, Any] = {
        "harness_version": "ipvla",
        "protocol_version": PROTOCOL_VERSION,
        "model_server": "ipvla",
        "capabilities": {},
        "policy_sha256": metadata.get("policy_sha256"),
        "observation_params": {
            "send_wrist_image": "robot0_eye_in_hand" in contract.cameras,
            "send_state": reads,
        },
        "observation_spec": {
            **{harness_camera(camera): _spec("image", 0, "rgb_hwc_uint8") for camera in contract.cameras},
            "language": _spec("language", 0, "language"),
            **({"state": _spec("state", 8, "eef_pos3_axisangle3_gripper2")} if contract.state == "hand" else {}),
        },
    }
    if contract.action == "hand" and contract.gripper == "environment":
        told["action_spec"] = {
            "position": _spec("position", 3, "delta_xyz", (-1, 1)),
            "rotation": _spec("rotation", 3, "axis_angle", (-3.15, 3.15)),
            "gripper": _spec("gripper", 1, "binary_close_positive", (-1, 1)),
        }
    return told


def _spec(name: str, dims: int, form: str, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": form, **({"range": list(bounds)} if bounds else {})}
