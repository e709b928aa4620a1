"""Training checkpoints: safetensors and JSON, no pickle, complete or not there.

training.json          step, plan position, world size, lanes, Thermostat, what the run was configured as
policy/                the policy, ready for rollout
optimizer.safetensors  one tensor per parameter and moment
lanes-RANK.safetensors each worker's memory and random state
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ipvla.data.plan import PlanPosition
from ipvla.policy import CheckpointError, Policy, load_weights
from ipvla.training.parallel import World
from ipvla.training.state import TrainingState


def save_checkpoint(
    directory: Path, state: TrainingState, policy: Policy, world: World, identity: dict[str, Any]
) -> None:
    """Writes this worker's part into `directory`; `training.json` comes last, so that what has it is whole.

    `identity` is what another run must share to resume from here: model, data and lane settings as JSON values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lanes = {f"memory.{name}": value.cpu().contiguous() for name, value in state.memory.items()}
    save_file({**lanes, **_random_state(world)}, directory / f"lanes-{world.rank}.safetensors")
    if world.rank == 0:
        policy.save(directory / "policy")
        save_file(_optimizer_tensors(state.optimizer), directory / "optimizer.safetensors")
        written = {
            "step": state.step,
            "position": asdict(state.position),
            "world": world.size,
            "identity": identity,
            **({"thermostat": state.protection.thermostat.to_dict()} if state.protection else {}),
        }
        (directory / "training.json").write_text(json.dumps(written, indent=1))


def load_checkpoint(directory: Path, state: TrainingState, world: World, identity: dict[str, Any]) -> None:
    """Brings `state` to where `save_checkpoint` left it.

    Raises:
        CheckpointError: it is damaged, or of a run with another model, dataset, lanes or number of workers.
    """
    try:
        written = json.loads((directory / "training.json").read_text())
        optimizer = load_file(directory / "optimizer.safetensors")
        lanes = load_file(directory / f"lanes-{world.rank}.safetensors") if written["world"] == world.size else {}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {directory} cannot be read ({error}); delete it to go on from the one before"
        ) from None
    theirs = {"workers": written["world"], **written["identity"]}
    for name, ours in {"workers": world.size, **identity}.items():
        if theirs.get(name) != ours:
            raise CheckpointError(
                f"the checkpoint {directory} has {name} {theirs.get(name)}, this run has {ours}; "
                "give the run another name, or the settings it began with"
            )
    load_weights(state.model, directory / "policy" / "model.safetensors")
    _load_optimizer(state.optimizer, optimizer)
    prefix = "memory."
    state.memory = {n.removeprefix(prefix): v.to(world.device) for n, v in lanes.items() if n.startswith(prefix)}
    state.step = written["step"]
    state.position = PlanPosition(**written["position"])
    if state.protection:
        state.protection.resume(written["thermostat"])
    torch.set_rng_state(lanes["random.cpu"])
    if "random.cuda" in lanes:
        torch.cuda.set_rng_state(lanes["random.cuda"], world.device)


def _random_state(world: World) -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value.cpu().contiguous()
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
