"""`python -m ray_jobs.serve`: a trained policy behind a websocket, for robots and for any client of openpi's.

With `--protocol vla_eval` it is a model server of vla-evaluation-harness.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ipvla.contract import Contract, Limits
from ipvla.policy import Policy
from ipvla.rollout.chunking import HeadFacts
from ipvla.rollout.openpi.client import OURS
from ipvla.rollout.openpi.depth import geometry_keys
from ipvla.rollout.openpi.messages import (
    AHEAD,
    CHUNKING,
    CONTRACT,
    EXECUTE,
    PROMPT,
    RESET,
    SESSION,
    STATE,
    STEP,
    TOKEN_VARIABLE,
    from_message,
    image_key,
)
from ipvla.rollout.openpi.server import PolicyWebsocketServer, ServerConfig, serve_until
from ipvla.rollout.policy_actor import PolicyActor, PolicySource
from ipvla.rollout.vla_eval.server import HarnessServer
from ipvla.sim.fingerprint import commit
from ipvla.types import Observation
from ray_jobs.command_line.cli import run
from ray_jobs.running.chosen_policy import ChosenPolicy
from ray_jobs.running.policy_run import variant

PROTOCOLS: Final = ("openpi", "vla_eval")


@dataclass(frozen=True)
class ServeConfig(ChosenPolicy):
    """How the policy is served.

    Attributes:
        protocol: openpi, or vla_eval for vla-evaluation-harness, which sends no token: on this machine alone.
        server: where it listens, and its limits. The token is `$IPVLA_SERVE_TOKEN`.
        max_batch: observations of a forward pass, null for as many as wait.
        limits: what every action is clipped to, beside the policy's own units: for robots.
        default_prompt: the instruction of observations that have none, as those of openpi's ALOHA clients.
    """

    protocol: str = "openpi"
    server: ServerConfig = field(default_factory=ServerConfig)
    max_batch: int | None = None
    limits: Limits = field(default_factory=Limits)
    default_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; it must be at least 1, or null")


def serving(config: ServeConfig, token: str | None) -> PolicyWebsocketServer:
    """The policy, loaded, and its server, not started yet.

    Raises:
        CheckpointError: the policy does not exist, cannot be loaded, or answers with what is not finite.
        ClusterError: there is no GPU to use.
        ValueError: others than this machine could connect without a token, or settings do not fit the policy.
    """
    policy = config.load()
    contract = policy.require_finite().contract
    if config.limits != Limits():
        contract = replace(contract, limits=config.limits.also(contract.limits))
    chosen = variant(config.unnorm_key, config.sampling, config.slow)
    source = PolicySource(lambda _: policy, config.directory, variant=chosen)
    # The websocket's server says how long a memory lives.
    actor = PolicyActor(source, config.threads, lease_s=math.inf, max_batch=config.max_batch)
    transforms = policy.transforms
    proprio_dim, head = transforms.statistics.proprio.dim, HeadFacts.of(policy.config.head)
    if config.default_prompt is not None:
        transforms.prompts.prompt(config.default_prompt)  # ValueError if it is too long
    turned = contract.pictures.orientation if contract.geometry else None

    def observe(message: Any, t: int) -> Observation:
        observation = from_message(
            message, transforms.cameras, proprio_dim, t, config.default_prompt, transforms.action_dim, turned
        )
        if observation.ahead is not None:
            head.require(observation.ahead)
        transforms.prompts.prompt(observation.instruction)  # ValueError if it is too long
        return transforms.conventions.resized(observation)

    told = metadata(policy, contract, source.sha256())
    if config.protocol == "vla_eval":
        return HarnessServer(config.server, actor, observe, told, contract, contract.limits)
    return PolicyWebsocketServer(config.server, actor, observe, told, token, contract.limits)


def metadata(policy: Policy, contract: Contract, sha256: str) -> dict[str, Any]:
    """What a client receives when it connects: the contract of observations and actions."""
    transforms, head = policy.transforms, HeadFacts.of(policy.config.head)
    image = {"dtype": "uint8", "shape": ["H", "W", 3], "about": f"RGB, {_ABOUT[contract.pictures.orientation]}"}
    deep = transforms.cameras if contract.geometry else ()
    return {
        "server": OURS,
        "commit": commit(),
        "policy_sha256": sha256,
        **policy.describe(),
        "observation": {
            **{image_key(camera): {**image, "camera": camera} for camera in transforms.cameras},
            **{key: told for camera in deep for key, told in geometry_keys(image_key(camera)).items()},
            STATE: {"dtype": "float32", "shape": [transforms.statistics.proprio.dim]},
            PROMPT: {"dtype": "str"},
            STEP: {"dtype": "int", "about": "control steps since the reset; optional if every action is played"},
            RESET: {"dtype": "bool", "about": "optional: this observation begins an episode"},
            SESSION: {"dtype": "str", "about": "optional: the episode outlives the connection"},
            AHEAD: {"about": "optional: {actions [R, A], delay, guidance, given}, what the answer goes on from"},
        },
        "actions": {
            "dtype": "float32",
            "shape": [policy.execute, transforms.action_dim],
            **({"range": [-1, 1]} if contract.clipped else _ranges(policy)),
        },
        CONTRACT: contract.to_dict(),
        CHUNKING: {"chunk": policy.config.chunk, EXECUTE: policy.execute, **vars(head)},
    }


#: How pictures are turned, in words.
_ABOUT: Final = {
    "upright": "upright",
    "mirrored": "upright with left and right exchanged, as LIBERO's rotated by 180 degrees are",
    "upside_down": "upside down, as OpenGL gives it",
    "unknown": "turned as in the training data",
}


def _ranges(policy: Policy) -> dict[str, list[float | None]]:
    """Least, greatest, 1 % and 99 % values of each action dimension in the training data; a gripper's -1 and 1."""
    statistics, gripper = policy.transforms.statistics.action, policy.contract.gripper != "none"
    ranges = {}
    for name, end in (("min", -1.0), ("q01", -1.0), ("q99", 1.0), ("max", 1.0)):
        values = [float(value) if np.isfinite(value) else None for value in getattr(statistics, name)]
        ranges[name] = [*values[:-1], end] if gripper else values
    return ranges


async def _serve(server: PolicyWebsocketServer, on_start: Callable[[int], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve_until(stop, server, on_start)


def main(config: ServeConfig) -> None:
    """Serves until it is interrupted (SIGINT, SIGTERM)."""
    config.prepare()
    server = serving(config, os.environ.get(TOKEN_VARIABLE))

    def announce(port: int) -> None:
        print(f"{config.directory} at ws://{config.server.host}:{port} (health: http://.../healthz)", flush=True)

    asyncio.run(_serve(server, announce))


if __name__ == "__main__":
    run(ServeConfig, main, __doc__)
