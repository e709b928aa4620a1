"""pi0 and pi0.5 from LeRobot's layout, and from openpi's PyTorch layout, as policies of this project."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import torch

from ipvla.contract import Contract, Pictures
from ipvla.data.conventions import Conventions
from ipvla.data.normalisation import FeatureStatistics, Normalisation
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import PaliGemmaSizes, Pi0BackboneConfig
from ipvla.models.backbones.imported import ImportedBackbone
from ipvla.models.backbones.openvla_files import mapped, read_json, require_same
from ipvla.models.heads import Pi0HeadConfig
from ipvla.models.memory import MemoryConfig, NoMemoryConfig
from ipvla.models.vla import IPVLAConfig, adopt
from ipvla.policy import Policy
from ray_jobs.importing.lerobot import LeRobotFiles

#: The prompt of each model; the state is in pi0.5's.
_PROMPTS: Final = {"pi0": "{instruction}\n", "pi05": "Task: {instruction}, State: {state};\nAction: "}
_OPENPI_CAMERAS: Final = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
#: What openpi adds to a standard deviation, and to the distance of two quantiles.
_OPENPI_EPSILON: Final = 1e-6
#: What a normalisation reads of the statistics.
_ROWS: Final = {"normal": ("mean", "std"), "quantiles": ("q01", "q99"), "min_max": ("min", "max")}
#: At most so many ids has an embedding or a tokenizer that the other has not: `<image>`, padding.
_UNUSED_IDS: Final = 64
PALIGEMMA: Final = "paligemma_with_expert.paligemma."
EXPERT: Final = "paligemma_with_expert.gemma_expert."
#: The words' embedding, which published files have as `lm_head` alone.
WORDS: Final = f"{PALIGEMMA}model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class PiConfig:
    """What the files of pi0, pi0-FAST, pi0.5 and SmolVLA do not tell.

    Attributes:
        tokenizer: of PaliGemma or SmolVLM2, a directory or a hub name, by default that of the published models:
            their checkpoints have none.
        execute: actions of a chunk that are played before the next policy step; None for what the checkpoint says,
            or half a chunk.
        state_in_prompt: pi0.5's only: False for openpi's pi05_libero, which was trained without the state.
        vision_heads: of the vision tower; by default those of the published models.
        head_size: of SmolVLA's attention.
        chunk: actions per answer of openpi's JAX layout, which no file tells: 50 for pi0_base, 10 for pi05_libero.
        action_tokenizer: pi0-FAST's only: of its FAST tokens, a directory or a hub name; by default the one that
            the checkpoint names, or physical-intelligence/fast.
        bos: pi0-FAST's only: where its second `<bos>` stands: "prompt", whose tokens all read it, as LeRobot acts;
            "behind" it, as LeRobot trains.
        state_numbers: of the state in the prompt, filled up with zeros: 32 for pi0.5 and pi0-FAST that LeRobot 0.4
            trained, which no file tells; 0 for the state's own.
        relative_actions: of openpi's layouts only: true for each of the first numbers of an action that is
            predicted relative to the state (DeltaActions), which no file tells: six times true for pi0_libero and
            pi0_fast_libero. `norm_stats.json` is then of relative actions.
    """

    tokenizer: str | None = None
    execute: int | None = None
    state_in_prompt: bool = True
    vision_heads: int | None = None
    head_size: int = 64
    chunk: int | None = None
    action_tokenizer: str | None = None
    bos: Literal["prompt", "behind"] = "prompt"
    state_numbers: int = 0
    relative_actions: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.bos not in ("prompt", "behind"):
            raise ValueError(f'pi.bos is {self.bos!r}; choose "prompt" or "behind"')


@dataclass(frozen=True)
class Added:
    """What a policy gets besides its checkpoint.

    Attributes:
        dtype: of the backbone, "float32" or "bfloat16"; the expert runs in float32.
        cameras: what the checkpoint's are called in the world, in its order; "" for one that is missing, as those
            at the end are that have no name here: the model was trained to do without some. () for its own names.
        terms: see `ImportConfig`.
        memory: with what it is to remember.
    """

    dtype: str = "bfloat16"
    cameras: tuple[str, ...] = ()
    terms: Mapping[str, Any] = field(default_factory=dict)
    memory: MemoryConfig = field(default_factory=NoMemoryConfig)


def from_lerobot(directory: Path, settings: PiConfig, added: Added) -> Policy:
    """A policy of type pi0 or pi05.

    Raises:
        ValueError: in one line, for another policy, or files or weights that are missing.
    """
    files = LeRobotFiles.read(directory, ("pi0", "pi05"))
    variant, config = files.config["type"], files.config
    weights = PublishedWeights.read(directory)
    size = paligemma_sizes(weights, settings.vision_heads or 16).image_size
    files.refuse(use_relative_actions=False, image_resolution=[size, size])
    return _policy(
        weights, settings, added, variant, files.statistics,
        normalisation=files.normalisation,
        cameras=files.cameras,
        chunk=config["chunk_size"],
        execute=config["n_action_steps"],
        cleaned=variant == "pi05",
        steps=config["num_inference_steps"],
        prompt_tokens=config["tokenizer_max_length"],
        times=files.times(),
        files=files.beside_weights(),
    )  # fmt: skip


def from_openpi(directory: Path, settings: PiConfig, added: Added, statistics: Path | None = None) -> Policy:
    """A checkpoint of openpi's PyTorch trainer, or of its converter.

    Args:
        statistics: `norm_stats.json`; None for the only one below `assets/`.

    Raises:
        ValueError: in one line, for another checkpoint, or files or weights that are missing.
    """
    config = read_json(directory / "config.json")
    if "action_horizon" not in config:
        raise ValueError(f"{directory / 'config.json'} has no action_horizon; give a directory in openpi's layout")
    weights, chunk = PublishedWeights.read(directory), config["action_horizon"]
    return openpi_policy(weights, openpi_statistics(directory, statistics), chunk, settings, added)


def openpi_statistics(directory: Path, given: Path | None) -> Statistics:
    """Of `given`, or of the only `norm_stats.json` below `assets/`, with openpi's small number in them."""
    found = [given] if given else sorted(directory.glob("assets/**/norm_stats.json"))
    if len(found) != 1:
        raise ValueError(
            f"{directory} has {len(found)} norm_stats.json below assets/; name the robot's with --statistics "
            "(openpi's converter leaves them in the directory above)"
        )
    return _with_openpi_epsilon(Statistics.load(found[0]))


def openpi_policy(
    weights: PublishedWeights, statistics: Statistics, chunk: int, settings: PiConfig, added: Added
) -> Policy:
    """pi0 or pi0.5 as openpi serves it."""
    timed = "time_mlp_in.weight" in weights.tensors
    return _policy(
        weights, settings, added, "pi05" if timed else "pi0", statistics,
        normalisation="quantiles" if timed else "normal",
        cameras=_OPENPI_CAMERAS,
        chunk=chunk,
        execute=None,
        cleaned=True,
        steps=10,
        prompt_tokens=200 if timed else 48,
        times={},
        files={},
    )  # fmt: skip


def _policy(
    weights: PublishedWeights,
    settings: PiConfig,
    added: Added,
    variant: Any,
    statistics: Statistics,
    *,
    normalisation: Normalisation,
    cameras: tuple[str, ...],
    chunk: int,
    execute: int | None,
    cleaned: bool,
    steps: int,
    prompt_tokens: int,
    times: Mapping[str, float],
    files: Mapping[str, bytes],
) -> Policy:
    names = camera_names(added, cameras)
    sizes = paligemma_sizes(weights, settings.vision_heads or 16)
    in_words = variant == "pi05" and settings.state_in_prompt
    backbone = Pi0BackboneConfig(
        sizes=sizes,
        pretrained=settings.tokenizer or Pi0BackboneConfig.pretrained,
        dtype=added.dtype,
        prompt=_PROMPTS["pi05" if in_words else "pi0"],
        cleaned=cleaned,
        state_numbers=settings.state_numbers,
        max_prompt_tokens=sizes.image_tokens * len(names) + prompt_tokens,
    )
    gate = weights.shape(f"{EXPERT}model.layers.0.mlp.gate_proj.weight")
    head = Pi0HeadConfig(
        variant=variant, width=gate[1], layers=sizes.layers, mlp=gate[0], heads=sizes.heads,
        key_heads=sizes.key_heads, head_size=sizes.head_size, steps=steps,
        dims=weights.shape("action_out_proj.weight")[0], **times,  # type: ignore[arg-type]
    )  # fmt: skip
    tensors = {name: x for name, x in weights.tensors.items() if name != f"{EXPERT}lm_head.weight"}  # never used
    return assembled(
        IPVLAConfig(backbone, added.memory, head, chunk=chunk),
        imported_conventions(statistics, normalisation, names, chunk, added.terms, settings.relative_actions),
        settings.execute or execute or max(1, chunk // 2),
        replace(weights, tensors=tensors).with_words(),
        published,
        files,
    )


def camera_names(added: Added, cameras: tuple[str, ...]) -> tuple[str, ...]:
    """What the views are called. ValueError if there are none, or more than the checkpoint has."""
    names = tuple(name for name in added.cameras or cameras if name)
    if len(added.cameras) > len(cameras) or not names:
        raise ValueError(f"cameras are {added.cameras}; name one to {len(cameras)}, for {', '.join(cameras)}")
    return names


def imported_conventions(
    statistics: Statistics,
    normalisation: Normalisation,
    cameras: tuple[str, ...],
    chunk: int,
    terms: Mapping[str, Any],
    relative_actions: tuple[bool, ...] = (),
) -> Conventions:
    """Of data of which nothing is known but sizes and `terms`; pictures go to the backbone as they come.

    Raises:
        ValueError: the statistics lack a number that this normalisation needs, or actions or states have fewer
            numbers than are relative.
    """
    for name, feature in (("action", statistics.action), ("state", statistics.proprio)):
        for row in _ROWS[normalisation]:
            if np.isnan(getattr(feature, row)[feature.mask]).any():
                raise ValueError(
                    f"the checkpoint's statistics have no {row} of the {name}, which is normalised by "
                    f"{' and '.join(_ROWS[normalisation])}; copy its files again, or give the robot's own"
                )
    contract = Contract(
        cameras, Pictures("unknown"), gripper="none", action="unknown", action_size=statistics.action.dim,
        clipped=False, state="unknown", state_size=statistics.proprio.dim, control_hz=None,
    ).changed(terms)  # fmt: skip
    return Conventions(
        statistics=statistics,
        cameras=cameras,
        image_size=0,
        chunk=chunk,
        normalisation=normalisation,
        gripper=contract.gripper,
        recorded=contract,
        relative_actions=relative_actions,
    )


@dataclass(frozen=True)
class PublishedWeights:
    """Mapped, and without the prefix that LeRobot's `save_pretrained` puts before the names."""

    tensors: Mapping[str, torch.Tensor]
    where: str

    @classmethod
    def read(cls, directory: Path) -> Self:
        """ValueError if there are none, or they are damaged."""
        path = directory / "model.safetensors"
        return cls({name.removeprefix("model."): x for name, x in mapped(path).items()}, str(path))

    def shape(self, name: str) -> tuple[int, ...]:
        """ValueError if there is no such weight."""
        if name not in self.tensors:
            raise ValueError(f"{self.where} lacks weight {name}; it is of another model")
        return tuple(self.tensors[name].shape)

    def with_words(self) -> Self:
        """With PaliGemma's embedding under its two names; files have it once."""
        one = f"{PALIGEMMA}lm_head.weight"
        return replace(self, tensors={WORDS: self.tensors[one], **self.tensors}) if one in self.tensors else self

    def layers(self, prefix: str) -> int:
        """How many numbers stand behind `prefix` in the names."""
        return len({n.removeprefix(prefix).partition(".")[0] for n in self.tensors if n.startswith(prefix)})


def assembled(
    config: IPVLAConfig,
    conventions: Conventions,
    execute: int,
    weights: PublishedWeights,
    published: Callable[[str], str | None],
    published_files: Mapping[str, bytes],
) -> Policy:
    """The policy with the published weights.

    Args:
        published: what a weight of this project's model is called there; None for one that is not there.
        published_files: what lies beside the weights, for an export.

    Raises:
        ValueError: one is missing, unknown, or of another shape.
    """
    policy = Policy.build(config, conventions, execute)
    backbone = policy.model.backbone
    assert isinstance(backbone, ImportedBackbone)
    backbone.published = published_files
    if abs(len(backbone.tokenizer) - backbone.vocabulary) > _UNUSED_IDS:
        raise ValueError(
            f"the tokenizer {backbone.config.pretrained!r} has {len(backbone.tokenizer)} tokens, and "
            f"{weights.where} has embeddings of {backbone.vocabulary}; set --pi.tokenizer to its own"
        )
    state = policy.model.state_dict()
    names = {there: name for name in state if (there := published(name)) is not None}
    require_same({there: state[name] for there, name in names.items()}, weights.tensors, weights.where)
    adopt(policy.model, {name: weights.tensors[there] for there, name in names.items()})
    policy.model.eval()
    return policy


def published(name: str) -> str | None:
    """See `assembled`."""
    part, _, inside = name.partition(".")
    if part == "backbone":
        inside = inside.removeprefix("vlm.")
        return PALIGEMMA + inside.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if part != "head" or inside in ("cognition_proj.weight", "fingerprint"):
        return None
    return inside.replace("expert.", f"{EXPERT}model.", 1) if inside.startswith("expert.") else inside


def paligemma_sizes(weights: PublishedWeights, vision_heads: int) -> PaliGemmaSizes:
    """From the shapes; every published model has one key head."""
    text, vision = f"{PALIGEMMA}model.language_model.layers", f"{PALIGEMMA}model.vision_tower.vision_model"
    vocabulary, width = weights.shape(f"{PALIGEMMA}lm_head.weight")
    head_size = weights.shape(f"{text}.0.self_attn.k_proj.weight")[0]
    patches = weights.shape(f"{vision}.embeddings.patch_embedding.weight")
    return PaliGemmaSizes(
        width=width,
        layers=weights.layers(f"{text}."),
        mlp=weights.shape(f"{text}.0.mlp.gate_proj.weight")[0],
        heads=weights.shape(f"{text}.0.self_attn.q_proj.weight")[0] // head_size,
        key_heads=1,
        head_size=head_size,
        vocabulary=vocabulary,
        vision_width=patches[0],
        vision_layers=weights.layers(f"{vision}.encoder.layers."),
        vision_mlp=weights.shape(f"{vision}.encoder.layers.0.mlp.fc1.weight")[0],
        vision_heads=vision_heads,
        patch=patches[-1],
        image_size=math.isqrt(weights.shape(f"{vision}.embeddings.position_embedding.weight")[0]) * patches[-1],
    )


def _with_openpi_epsilon(statistics: Statistics) -> Statistics:
    """With openpi's small number in the rows, so that the plain formulas give its values."""

    def wider(feature: FeatureStatistics) -> FeatureStatistics:
        epsilon = np.float32(_OPENPI_EPSILON)
        return replace(feature, std=feature.std + epsilon, q99=feature.q99 + epsilon)

    return replace(statistics, action=wider(statistics.action), proprio=wider(statistics.proprio))
