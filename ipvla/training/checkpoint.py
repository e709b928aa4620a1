"""Training checkpoints: safetensors and JSON, no pickle. One that a crash or a full disk cut is passed over.

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
from safetensors.torch import save_file

from ipvla.data.plan import PlanPosition
from ipvla.files import one_line, read_record
from ipvla.policy import (
    CheckpointError,
    Policy,
    load_weights,
    read_tensors,
    require_finite_tensors,
    require_whole_policy,
    sharded_like,
    tensor_shapes,
    whole,
)
from ipvla.policy import state as weights_of
from ipvla.training.parallel import World
from ipvla.training.step import TrainingState
from ipvla.types import Memory

_MOST_DIFFERENCES = 5
#: Of any run, and of workers.
_MOST_STEPS, _MOST_WORKERS = 2**40, 2**16


def save_checkpoint(
    directory: Path, state: TrainingState, policy: Policy, world: World, identity: dict[str, Any]
) -> None:
    """Writes this worker's part into `directory`; `training.json` comes last.

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
    written = _written(directory)
    if changes := differences(shared(complete(written["identity"])), shared(identity)):
        raise CheckpointError(
            f"the checkpoint {directory} has model or data settings of another run ({changes}); give the run "
            "another name, or the settings it began with"
        )
    optimizer = read_tensors(directory / "optimizer.safetensors")
    lanes = [read_tensors(directory / f"lanes-{rank}.safetensors") for rank in range(written["world"])]
    load_weights(state.model, directory / "policy" / "model.safetensors")
    require_finite_tensors(directory / "optimizer.safetensors", optimizer)
    try:
        _load_optimizer(state.optimizer, optimizer)
        state.memory = _own_memory(lanes, state.memory, world)
        state.step = written["step"]
        state.position = PlanPosition.from_dict(written["position"])
        before = lanes_total(written["identity"], written["world"])
        if before != lanes_total(identity, world.size):
            state.position = state.position.on_other_lanes(before)
        if state.protection:
            state.protection.resume(written["thermostat"])
        if state.scaler.is_enabled() and "loss_scale" in written:
            state.scaler.load_state_dict(written["loss_scale"])
        random = lanes[world.rank % len(lanes)]
        torch.set_rng_state(random["random.cpu"])
        if "random.cuda" in random and world.device.type == "cuda":
            torch.cuda.set_rng_state(random["random.cuda"], world.device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(directory, error) from None


def require_whole(directory: Path) -> None:
    """Looks at everything in a checkpoint but the numbers in its tensors.

    Raises:
        CheckpointError: a file is missing, cut or no record; it says which.
    """
    written = _written(directory)
    require_whole_policy(directory / "policy")
    for name in ("optimizer", *(f"lanes-{rank}" for rank in range(written["world"]))):
        tensor_shapes(directory / f"{name}.safetensors")


def newest_whole(directory: Path) -> tuple[list[Path], dict[Path, str]]:
    """The whole checkpoints in a run's `trainer`, the newest first, and why others are none."""
    whole, damaged = [], {}
    for path in sorted(directory.glob("step_*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            require_whole(path)
            whole.append(path)
        except CheckpointError as error:
            damaged[path] = str(error).partition("; ")[0]  # without the advice
    return whole, damaged


def _written(directory: Path) -> dict[str, Any]:
    """`training.json`, whose values are what `save_checkpoint` writes. CheckpointError if they are not."""
    try:
        written = read_record(directory / "training.json")
        position, identity = written["position"], written["identity"]
        counts = (written["step"], position["epoch"], position["window"])
        if any(type(count) is not int or not 0 <= count <= _MOST_STEPS for count in counts):
            raise ValueError(f"step, epoch and window are {counts}")
        if type(written["world"]) is not int or not 1 <= written["world"] <= _MOST_WORKERS:
            raise ValueError(f"world is {written['world']!r:.60}")
        lanes_total(identity, written["world"])
        PlanPosition.from_dict(position)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(directory, error, "training.json: ") from None
    return written


def _damaged(directory: Path, error: BaseException, file: str = "") -> CheckpointError:
    reason = f"{file}{one_line(error)}"
    return CheckpointError(
        f"the checkpoint {directory} cannot be read ({reason}); delete it to go on from the one before"
    )


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
        of = parameters[int(index)]
        if value.ndim and value.shape != of.shape:
            raise ValueError(f"{key} of the optimizer is {tuple(value.shape)}, its parameter {tuple(of.shape)}")
        # The count of steps is not sharded.
        moments.setdefault(int(index), {})[name] = sharded_like(value, of) if value.ndim else value
    if len(names := {frozenset(one) for one in moments.values()}) > 1:
        raise ValueError(f"moments of the optimizer are missing: {sorted(map(sorted, names))}")
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
