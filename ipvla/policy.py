"""Policy = transforms -> model -> denormalise: (observations, memory) -> (chunks, memory)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import draccus
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ipvla.contract import Contract
from ipvla.data.conventions import Conventions
from ipvla.data.transforms import PromptEncoder, Transforms
from ipvla.files import appearing, foreign_file, nearby, one_line, read_record
from ipvla.geometry import CameraGeometry, pinhole
from ipvla.models.adapters import merge_adapters
from ipvla.models.backbones.protocol import require_prompts
from ipvla.models.heads import Sampling
from ipvla.models.heads.protocol import Rest
from ipvla.models.nf4 import dequantise, parameter_count
from ipvla.models.saved_size import no_larger_than
from ipvla.models.speeds import SlowPace
from ipvla.models.vla import IPVLA, IPVLAConfig, adopt
from ipvla.types import Memory, Observation

FORMAT = 1
#: The entry of `policy.json` that holds `weights_sum`; earlier versions wrote none.
_WEIGHTS = "weights_sum"
#: In pixels, of a blank picture for a policy that takes pictures as they come.
_ANY_SIDE = 64


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclass(frozen=True)
class Policy:
    """A model with everything that stands between it and a simulator.

    Attributes:
        config: what `model` was built from.
        model: on the device it is to run on.
        transforms: the same that its training used.
        execute: actions of a chunk that are played before the next policy step, 1 <= execute <= C.
    """

    config: IPVLAConfig
    model: IPVLA
    transforms: Transforms
    execute: int

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.config.chunk:
            raise ValueError(f"execute is {self.execute}; it must lie in 1..chunk, here 1..{self.config.chunk}")

    @property
    def contract(self) -> Contract:
        """What it must be shown, and what its actions are: `act` gives the simulator's units."""
        return self.transforms.contract.in_environment_units

    def unnormalised_as(self, dataset: str) -> Self:
        """With the statistics of one dataset of the mixture that it was trained on (OpenVLA's `unnorm_key`).

        ValueError if it was not trained on that one.
        """
        if not self.transforms.conventions.mixed:
            raise ValueError(
                f"unnorm_key is {dataset!r}, and the policy was not trained on a mixture; leave it out, its one "
                "dataset's statistics are used"
            )
        return replace(self, transforms=self.transforms.of(dataset))

    def require_prompts(self, instructions: Collection[str]) -> None:
        """ValueError that names the longest one if prompts of these instructions are too long."""
        backbone = self.model.backbone
        lengths = {text: len(backbone.tokenize(text)) for text in instructions}
        require_prompts(lengths, backbone.max_prompt_tokens, backbone.max_text_tokens)

    def initial_memory(self, batch: int) -> Memory:
        """Memory of episodes that have not begun, [batch, ...]."""
        return self.model.initial_memory(batch)

    def act(self, observations: Sequence[Observation], memory: Memory) -> tuple[npt.NDArray[np.float32], Memory]:
        """Chunks float32 [B, C, A] in the simulator's units, and the memories [B, ...] after this step.

        A row depends on its own observation and memory alone; a head's noise is drawn from the observation's
        `episode` and `t`. What is `ahead` of an observation its chunk goes on from.

        ValueError for a head that cannot go on from it.
        """
        actions, memory = self.act_normalised(observations, memory)
        return self.transforms.denormalise(actions, self._states(observations)), memory

    def _states(self, observations: Sequence[Observation]) -> npt.NDArray[np.float32] | None:
        """[B, P], None where actions are not relative to them."""
        if not self.transforms.conventions.relative_actions:
            return None
        return np.stack([o.proprio for o in observations]).astype(np.float32)

    def act_normalised(self, observations: Sequence[Observation], memory: Memory) -> tuple[torch.Tensor, Memory]:
        """The same before any clipping, in the units of training: float32 [B, C, A] on the model's device."""
        device = self.model.action_varies.device
        inputs = self.transforms.inputs(observations).to(device)
        t = torch.tensor([o.t for o in observations], device=device)
        seeds = [_noise_seed(o) for o in observations] if self.model.head.noise_shape is not None else None
        return self.model.act(inputs, memory, t, seeds, self._rest(observations, device))

    def _rest(self, observations: Sequence[Observation], device: torch.device) -> Rest | None:
        """What the chunks go on from, None if no row has any such thing."""
        rows = [(i, o.ahead) for i, o in enumerate(observations) if o.ahead is not None and o.ahead.continued]
        if not rows:
            return None
        batch, chunk = len(observations), self.config.chunk
        actions = np.zeros((batch, chunk, self.transforms.action_dim), np.float32)
        left, frozen, given = (np.zeros(batch, np.int64) for _ in range(3))
        guidance = np.zeros(batch, np.float32)
        for i, ahead in rows:
            left[i] = count = min(len(ahead.actions), chunk)
            state = np.asarray(observations[i].proprio, np.float32)
            actions[i, :count] = self.transforms.conventions.normalise(ahead.actions[:count], state)
            frozen[i] = min(ahead.delay, count)
            given[i] = frozen[i] if ahead.given else 0
            guidance[i] = ahead.guidance
        return Rest(*(torch.from_numpy(x).to(device) for x in (actions, left, frozen, guidance, given)))

    def require_finite(self) -> Self:
        """Answers a blank observation, and returns itself. CheckpointError if the actions are not finite."""
        with torch.inference_mode():
            actions, _ = self.act([self.blank()], self.initial_memory(1))
        if not np.isfinite(actions).all():
            raise CheckpointError("the policy's first actions are not finite; use an earlier checkpoint")
        return self

    def blank(self) -> Observation:
        """An episode's first observation that shows nothing."""
        size = self.transforms.conventions.image_size or _ANY_SIDE
        cameras = self.transforms.cameras
        nowhere = CameraGeometry(np.zeros((size, size), np.float32), pinhole(60, size, size), np.eye(4))
        return Observation(
            images={camera: np.zeros((size, size, 3), np.uint8) for camera in cameras},
            proprio=np.zeros(self.transforms.statistics.proprio.dim, np.float32),
            instruction="",
            t=0,
            geometry=None if self.transforms.points is None else dict.fromkeys(cameras, nowhere),
        )

    def merged(self) -> Policy:
        """The same policy without adapters, what they have learned being in the weights, none of them in 4 bits.

        Raises:
            ValueError: its adapters are not LoRA.
        """
        if self.config.adapted is None:
            return self
        model = copy.deepcopy(self.model)
        merge_adapters(model.backbone)
        return replace(self, config=replace(self.config, lora=None, nf4=None), model=model)

    def dequantised(self) -> Policy:
        """The same policy with ordinary weights instead of 4 bits; without adapters, that is."""
        if self.config.nf4 is None:
            return self
        model = copy.deepcopy(self.model)
        dequantise(model.backbone)
        return replace(self, config=replace(self.config, nf4=None), model=model)

    def describe(self) -> dict[str, str]:
        """What a result says about the policy that made it."""
        fusion = self.config.fusion
        return {
            "backbone": self.config.backbone.get_choice_name(type(self.config.backbone)),
            "memory": self.config.memory.get_choice_name(type(self.config.memory)),
            "head": self.config.head.get_choice_name(type(self.config.head)),
            "parameters": str(parameter_count(self.model)),
            "chunk": str(self.config.chunk),
            "execute": str(self.execute),
            **({"quantised": "nf4"} if self.config.nf4 else {}),
            **({"fusion": fusion.get_choice_name(type(fusion))} if fusion.reads else {}),
            **({"speeds": self.config.speeds.kind} if self.config.speeds.two else {}),
            **self.config.head.describe(),
        }

    def save(self, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `policy.json` and `model.safetensors`; a directory that is there is replaced in one rename.

        `weights`: `state(model)`, where it was taken already.
        """
        weights = state(self.model) if weights is None else weights
        described = {
            "format": FORMAT,
            "model": self.config.to_dict(),
            "execute": self.execute,
            "transforms": self.transforms.to_dict(),
            _WEIGHTS: weights_sum(weights),
        }
        with appearing(directory) as building:
            (building / "policy.json").write_text(json.dumps(described, indent=1))
            save_file(weights, building / "model.safetensors")
            self.model.head.save_description(building)
            self.model.backbone.save_description(building)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        device: str = "cpu",
        unnorm_key: str | None = None,
        sampling: Sampling | None = None,
        slow: SlowPace | None = None,
    ) -> Self:
        """The policy that `save` wrote, in evaluation mode. Nothing is downloaded for it.

        Args:
            unnorm_key: the dataset whose statistics are used, of a policy that was trained on a mixture; None for
                the mixture's first.
            sampling: how a head that integrates a velocity does so; None for what it was trained with.
            slow: how often its slow part thinks; None for its own pace.

        Raises:
            CheckpointError: it is missing or damaged.
            ValueError: it was not trained on that dataset, its head integrates nothing, or it has no slow part.
        """
        directory = Path(directory)
        described = _described(directory)
        weights = directory / "model.safetensors"
        saved = tensor_shapes(weights)
        with _undamaged(directory):
            config: IPVLAConfig = draccus.decode(IPVLAConfig, described["model"])
            config = replace(config, head=config.head.beside(directory))
            config = replace(config, backbone=config.backbone.beside(directory))
            conventions = Conventions.from_dict(described["transforms"])
            execute = int(described["execute"])
            if not 1 <= execute <= config.chunk:
                raise ValueError(f"execute is {execute}, and model.chunk {config.chunk}")
        if sampling is not None:
            config = replace(config, head=config.head.sampled(sampling))
        if slow is not None:
            config = config.paced(slow)
        packed = 2 if config.nf4 else 1
        with _undamaged(directory), _without_network(), no_larger_than(saved, packed):
            policy = cls.build(config, conventions, execute)
        load_weights(policy.model, weights)
        policy.model.to(device).eval()
        return policy if unnorm_key is None else policy.unnormalised_as(unnorm_key)

    @classmethod
    def build(
        cls, config: IPVLAConfig, conventions: Conventions, execute: int, start: IPVLA | None = None
    ) -> Self:
        """A policy for data of these conventions, with fresh weights or those of `start`."""
        model = config.build(
            action_varies=torch.from_numpy(~conventions.statistics.constant),
            proprio_dim=conventions.proprio_dim,
            num_views=len(conventions.cameras),
            image_size=conventions.image_size,
            start=start,
        )
        backbone = model.backbone
        prompts = PromptEncoder(
            tokenize=backbone.tokenize,
            max_prompt_tokens=backbone.max_prompt_tokens,
            tokenize_plan=model.tokenize_plan,
            tokenize_text=backbone.tokenize_text,
            plan_tokens=model.plan_tokens,
            tokenize_question=backbone.question,
            question_tokens=model.question_tokens,
            answer_tokens=model.answer_tokens,
            tokenize_with_state=backbone.tokenize_with_state if backbone.state_in_prompt else None,
        )
        patches = backbone.patches(len(conventions.cameras)) if config.fusion.reads else None
        return cls(config, model, Transforms(conventions, prompts, patches[0] if patches else 0), execute)


def _noise_seed(observation: Observation) -> int:
    """In [0, 2^63), the same for the same episode and control step, whenever and wherever."""
    drawn = hashlib.sha256(f"{observation.episode}\0{observation.t}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") >> 1


def policy_contract(directory: Path) -> Contract | None:
    """`Policy.contract` of a saved policy, as `policy_conventions` finds it."""
    conventions = policy_conventions(directory)
    return None if conventions is None else conventions.contract.in_environment_units


def policy_conventions(directory: Path) -> Conventions | None:
    """Those of a saved policy's data, without its weights; None where there is no `policy.json`.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / "policy.json"
    if not path.is_file():
        return None
    described = _described(directory)
    try:
        return Conventions.from_dict(described["transforms"])
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}); use another checkpoint") from None


def require_whole_policy(directory: Path) -> None:
    """Looks at all of a saved policy but the numbers in its tensors. CheckpointError if something is wrong."""
    _described(directory)
    policy_contract(directory)
    tensor_shapes(directory / "model.safetensors")


def _described(directory: Path) -> dict[str, Any]:
    path = directory / "policy.json"
    try:
        described = read_record(path)
    except (OSError, ValueError) as error:
        what = f"no policy in {directory}" if isinstance(error, OSError) else f"{path} is damaged"
        raise CheckpointError(f"{what} ({one_line(error)}); {_instead(directory)}") from None
    if described.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {described.get('format')!r:.20}; this version of the program reads {FORMAT}: use "
            "the one that wrote it"
        )
    return described


def _instead(directory: Path) -> str:
    """What to give in the place of a directory without a policy."""
    if not (directory / "policy.json").exists():
        if (found := nearby(directory, "policy.json")) is not None:
            return f"did you mean {found}?"
        if (directory / "adapter_config.json").is_file():
            return (
                "it holds an adapter of PEFT: make a policy of it and its base by "
                f"`ipvla import --source BASE --adapter {directory} --policy NEW`"
            )
        if (directory / "config.json").is_file():
            return f"it holds a published model: import it by `ipvla import --source {directory} --policy NEW`"
    return "give a directory that ray_jobs.train wrote, e.g. runs/STUDY/NAME/policy"


@contextmanager
def _undamaged(directory: Path) -> Iterator[None]:
    """CheckpointError if the block fails."""
    try:
        yield
    except Exception as error:  # whatever draccus, the parts' own checks and torch raise
        raise CheckpointError(
            f"{directory / 'policy.json'} is damaged, or of another version of this program "
            f"({one_line(error)}); copy the policy again, or use an earlier checkpoint"
        ) from None


@contextmanager
def _without_network() -> Iterator[None]:
    """Hugging Face's libraries look at files of this machine alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_sharded(tensor: torch.Tensor) -> bool:
    """Does this worker hold some rows of it alone (FSDP2)? It is a DTensor then, whose import takes seconds."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every worker; every worker must ask. A tensor that is not sharded is returned itself."""
    if not is_sharded(tensor):
        return tensor
    gathered: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def sharded_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value`, which every worker has in full, sharded as `parameter` is; itself where that is not sharded."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def state(model: torch.nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The state dict as safetensors wants it: whole, contiguous, and a shared tensor under its first name only.

    Where weights are sharded, every worker must ask; `keep` is False for those that have no use for the answer.
    """
    gathered = ((name, whole(value.detach())) for name, value in _named(model).items())
    return {name: value.cpu().contiguous() for name, value in gathered if keep}


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    named = {}
    for name, value in model.state_dict(keep_vars=True).items():
        key = id(value) if is_sharded(value) or value.is_meta else value.data_ptr()
        if key not in seen or value.numel() == 0:
            seen.add(key)
            named[name] = value
    return named


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads what `state` saved.

    CheckpointError names the first tensor that is missing, of another shape, or not finite, or says that the file
    is not the one that was saved with the `policy.json` beside it.
    """
    shapes, wanted = tensor_shapes(path), _named(model)
    wrong = [
        f"{name} is {shape_of(shapes, name)} in the checkpoint and {shape_of(wanted, name)} in the model"
        for name in sorted(wanted.keys() | shapes.keys())
        if shape_of(shapes, name) != shape_of(wanted, name)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} belongs to another model: {wrong[0]} ({len(wrong)} tensors differ); "
            "use the configuration it was trained with, or another checkpoint"
        )
    saved = read_tensors(path)
    weights = {name for name, value in wanted.items() if isinstance(value, torch.nn.Parameter)}
    require_finite_tensors(path, {name: value for name, value in saved.items() if name in weights})
    written = _described(path.parent).get(_WEIGHTS)
    if written is not None and written != weights_sum(saved):
        raise CheckpointError(
            f"{path} is damaged, or not the one that was saved with policy.json: its bytes sum up to something "
            "else; copy the policy again, or use an earlier checkpoint"
        )
    adopt(model, {name: sharded_like(value, wanted[name]) for name, value in saved.items()})


def weights_sum(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change with any byte: a hash of each tensor's name and sum of 64-bit words.

    It takes a fiftieth of the time of loading, where a hash of all bytes takes a third.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        words = len(flat) // 8 * 8
        total = flat[:words].view(np.uint64).sum(dtype=np.uint64)
        digest.update(f"{name}\0{total}\0".encode() + flat[words:].tobytes())
    return digest.hexdigest()[:16]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. CheckpointError if it is missing or damaged."""
    tensor_shapes(path)
    return load_file(path)


def require_finite_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """CheckpointError names the first of the file's tensors that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} is damaged: {name} is not finite; use an earlier checkpoint")


def tensor_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Tensors without numbers in them, by name. CheckpointError if the file is missing, or cut anywhere."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with safe_open(path, "pt") as file:
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = foreign_file(path) or one_line(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); use an earlier checkpoint") from None


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    """For errors: `(2, 3)`, or `absent`."""
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def policy_sha256(directory: Path) -> str:
    """One hash of every file's name and content below the directory."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
