"""Training checkpoints: safetensors and JSON, no pickle, complete or not there.

training.json          step, plan position, world size, lanes, Thermostat, loss scale, the run's settings
policy/                the policy, ready for rollout
optimizer.safetensors  one tensor per parameter and moment
lanes-RANK.safetensors each worker's memory and random state

Weights and moments are whole, however the run shards them, so that it may go on with other workers. With another
number of lanes in all, what is left of the epoch is laid onto those: memory stays with the lane of its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ipvla.data.plan import PlanPosition
from ipvla.policy import CheckpointError, Policy, load_weights, sharded_like, whole
from ipvla.policy import state as weights_of
from ipvla.training.parallel import World
from ipvla.training.step import TrainingState
from ipvla.types import Memory

_MOST_DIFFERENCES = 5


def save_checkpoint(
    directory: Path, state: TrainingState, policy: Policy, world: World, identity: dict[str, Any]
) -> None:
    """Writes this worker's part into `directory`; `training.json` comes last, so that what has it is whole.

    `identity` is what another run must share to resume from here: model, data and lane settings as JSON values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lanes = {f"memory.{name}": value.cpu().contiguous() for name, value in state.memory.items()}
    save_file({**lanes, **_random_state(world)}, directory / f"lanes-{world.rank}.safetensors")
    first = world.rank == 0
    weights = weights_of(state.model, keep=first)  # every worker takes part where these are sharded
    moments = _optimizer_tensors(state.optimizer, keep=first)
    if first:
        policy.save(directory / "policy", weights)
        save_file(moments, directory / "optimizer.safetensors")
        written = {
            "step": state.step,
            "position": asdict(state.position),
            "world": world.size,
            "identity": identity,
            **({"thermostat": state.protection.thermostat.to_dict()} if state.protection else {}),
            **({"loss_scale": state.scaler.state_dict()} if state.scaler.is_enabled() else {}),
        }
        (directory / "training.json").write_text(json.dumps(written, indent=1))


def load_checkpoint(
    directory: Path,
    state: TrainingState,
    world: World,
    identity: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Brings `state` to where `save_checkpoint` left it.

    Args:
        identity: of the run that resumes.
        complete: gives an identity that an earlier version wrote the settings that have come since.

    Raises:
        CheckpointError: it is damaged, or of a run with another model, dataset or lanes.
    """
    try:
        written = json.loads((directory / "training.json").read_text())
        optimizer = load_file(directory / "optimizer.safetensors")
        lanes = [load_file(directory / f"lanes-{rank}.safetensors") for rank in range(written["world"])]
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {directory} cannot be read ({error}); delete it to go on from the one before"
        ) from None
    if changes := differences(shared(complete(written["identity"])), shared(identity)):
        raise CheckpointError(
            f"the checkpoint {directory} has model or data settings of another run ({changes}); give the run "
            "another name, or the settings it began with"
        )
    load_weights(state.model, directory / "policy" / "model.safetensors")
    _load_optimizer(state.optimizer, optimizer)
    state.memory = _own_memory(lanes, state.memory, world)
    state.step = written["step"]
    state.position = PlanPosition.from_dict(written["position"])
    before, now = (lanes_total(i, w) for i, w in ((written["identity"], written["world"]), (identity, world.size)))
    if before != now:
        state.position = state.position.on_other_lanes(before)
    if state.protection:
        state.protection.resume(written["thermostat"])
    if state.scaler.is_enabled() and "loss_scale" in written:
        state.scaler.load_state_dict(written["loss_scale"])
    random = lanes[world.rank % len(lanes)]
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random and world.device.type == "cuda":
        torch.cuda.set_rng_state(random["random.cuda"], world.device)


def shared(identity: dict[str, Any]) -> dict[str, Any]:
    """What two parts of one run agree in: all of it, but how many lanes there are."""
    return {**identity, "lanes": {name: value for name, value in identity["lanes"].items() if name != "lanes"}}


def differences(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """`optimizer.lr 0.001, this run has 0.5` of each setting that differs; of another type, the type alone."""
    there, here = flat(recorded), flat(settings)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    other_types = tuple(name.removesuffix("type") for name in names if name.endswith(".type"))
    differing = [
        f"{name} {json.dumps(there.get(name))}, this run has {json.dumps(here.get(name))}"
        for name in names
        if name.endswith(".type") or not name.startswith(other_types)
    ]
    more = f"; and {len(differing) - _MOST_DIFFERENCES} more" if len(differing) > _MOST_DIFFERENCES else ""
    return "; ".join(differing[:_MOST_DIFFERENCES]) + more


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    named: dict[str, Any] = {}
    for name, value in tree.items():
        named |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return named


def lanes_total(identity: dict[str, Any], workers: int) -> int:
    """Lanes of all workers together."""
    return int(identity["lanes"]["lanes"]) * workers


def _own_memory(lanes: list[dict[str, torch.Tensor]], initial: Memory, world: World) -> Memory:
    """This worker's share of the memory of all lanes; a lane that is new begins as in `initial` [B, ...]."""
    own: Memory = {}
    for name, fresh in initial.items():
        saved = torch.cat([part[f"memory.{name}"] for part in lanes]).to(fresh)
        first = world.rank * len(fresh)
        own_lanes = saved[first : first + len(fresh)]
        own[name] = torch.cat([own_lanes, fresh[len(own_lanes) :]])
    return own


def _random_state(world: World) -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _optimizer_tensors(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    gathered = (
        (f"{index}.{name}", whole(value))
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    )
    return {name: value.cpu().contiguous() for name, value in gathered if keep}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        of = parameters[int(index)] if value.ndim else value  # the count of steps is not sharded
        moments.setdefault(int(index), {})[name] = sharded_like(value, of)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
