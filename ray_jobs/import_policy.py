"""`python -m ray_jobs.import_policy`: a published checkpoint as a policy, with a memory if one is wanted.

    ipvla import --source ~/openvla-7b --unnorm_key bridge_orig --policy ~/policies/openvla
    ipvla import --source ~/openvla-7b --unnorm_key bridge_orig --policy ~/policies/bank --model.memory.type bank
    ipvla import --source ~/openvla-7b --adapter ~/adapter --unnorm_key libero_spatial --policy ~/policies/spatial
    ipvla import --source ~/openvla-7b-oft-finetuned-libero-spatial --policy ~/policies/oft
    ipvla import --source ~/pi05_libero --policy ~/policies/pi05 --pi.tokenizer ~/paligemma-3b-pt-224 \
        --cameras "[agentview, robot0_eye_in_hand]" --terms "{gripper: environment, state: hand}"

Takes OpenVLA's Hugging Face layout (two vision towers, or SigLIP alone as openvla-v01 and ECoT), LoRA adapters of
PEFT, which are merged, and OpenVLA-OFT's action head, proprioception and FiLM, which lie beside the model. Weights
are mapped, not copied; nothing is unpickled but tensors, and no code of the checkpoint runs.

Takes pi0, pi0-FAST, pi0.5 and SmolVLA in LeRobot's layout, with its processors' statistics, and pi0, pi0-FAST and
pi0.5 in openpi's own, JAX's with `params` and (but for pi0-FAST) PyTorch's, with `assets/.../norm_stats.json`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import draccus
import torch
import yaml

from ipvla.choices import did_you_mean
from ipvla.data.conventions import Conventions
from ipvla.data.fitting import Fitting
from ipvla.data.normalisation import NORMALISATIONS, Normalisation
from ipvla.data.statistics import Statistics
from ipvla.files import one_line
from ipvla.models.backbones.openvla_files import (
    OpenVLAFiles,
    film_vision,
    merge_adapter,
    pickled_tensors,
    read_json,
    require_same,
)
from ipvla.models.backbones.prismatic import PrismaticBackbone, PrismaticConfig
from ipvla.models.heads import HeadConfig, OFTConfig, OpenVLATokensConfig
from ipvla.models.memory import MemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config
from ipvla.models.saved_size import no_larger_than
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.storage import require_room
from ray_jobs.command_line.cli import run
from ray_jobs.importing.openvla_terms import known_standard, recorded_terms, state_is_padded
from ray_jobs.importing.orbax import from_orbax, is_orbax
from ray_jobs.importing.pi import Added, PiConfig, from_lerobot, from_openpi
from ray_jobs.importing.pi0_fast import from_lerobot_fast
from ray_jobs.importing.smolvla import from_lerobot_smolvla

logger = logging.getLogger(__name__)

_VICUNA: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: What action should the robot take to "
    "{instruction}? ASSISTANT:"
)
_SHAPES: Final = {"resize-naive": "stretch", "resize-crop": "crop", "letterbox": "pad"}
#: Of OpenVLA-OFT's files of tensors: what a name begins with -> what is in it.
_OFT: Final = {
    "action_head--": "head",
    "proprio_projector--": "proprio",
    "vision_backbone--": "film",
    "noisy_action_projector--": "diffusion",
}
#: Settings of OpenVLA's layout alone.
_OPENVLAS: Final = (
    "unnorm_key", "adapter", "lora_alpha", "prompt", "ends_in_space", "reasoning_tokens", "max_prompt_tokens",
    "parallel", "chunk", "normalisation",
)  # fmt: skip


@dataclass(frozen=True)
class ImportedModelConfig:
    """What is added to the checkpoint; its own parts follow from its files.

    Attributes:
        memory: a choice by its `type`; its weights begin as they are drawn from `seed`.
        nf4: the backbone's linear layers in 4 bits, or None.
    """

    memory: MemoryConfig = field(default_factory=NoMemoryConfig)
    nf4: NF4Config | None = None


@dataclass(frozen=True)
class ImportConfig:
    """What is imported, and how it is to act.

    Attributes:
        source: a directory in OpenVLA's Hugging Face layout, LeRobot's, or one of openpi's.
        policy: directory of the new policy, which must not exist yet.
        unnorm_key: the dataset whose statistics turn what the model says into actions; the only one by default.
        statistics: a file of other statistics, such as those of the dataset that it is to be fine-tuned on.
        adapter: directory of a LoRA adapter of PEFT, which is merged.
        lora_alpha: of the LoRA inside OFT's FiLM file, which does not tell it; by default OFT's, min(rank, 16).
        dtype: "float32", "bfloat16" or "float16"; by default the checkpoint's.
        prompt: with `{instruction}` in it; by default that of the checkpoint's language model, and of ECoT.
        ends_in_space: whether the prompt ends in the token of a space; by default yes, but not for ECoT's
            (`reasoning_tokens`).
        reasoning_tokens: words that may come before the action, for ECoT's checkpoints.
        max_prompt_tokens: longest prompt in tokens.
        cameras: names of the views; by default those of the dataset that `unnorm_key` names, if it is known.
        parallel: OFT's words, all at once, where there is no action head; by default where there are OFT's files.
        chunk: actions per answer of OFT, which its files do not tell: 8 for LIBERO.
        normalisation: of actions and state: OFT's ALOHA policies have "bounds".
        terms: how pictures, states and actions are expressed where the files do not tell: fields of
            `ipvla.contract.Contract`.
        pi: of pi0, pi0-FAST, pi0.5 and SmolVLA alone, which of the others read `statistics`, `dtype`, `cameras`,
            `terms`, `model` and `seed`.
        model: what is added.
        seed: of the weights of a memory.
    """

    source: Path | None = None
    policy: Path | None = None
    unnorm_key: str | None = None
    statistics: Path | None = None
    adapter: Path | None = None
    lora_alpha: float | None = None
    dtype: str | None = None
    prompt: str | None = None
    ends_in_space: bool | None = None
    reasoning_tokens: int = 0
    max_prompt_tokens: int = 96
    cameras: tuple[str, ...] = ()
    parallel: bool | None = None
    chunk: int = 8
    normalisation: Normalisation = "bounds_q99"
    terms: Mapping[str, Any] = field(default_factory=dict)
    pi: PiConfig = field(default_factory=PiConfig)
    model: ImportedModelConfig = field(default_factory=ImportedModelConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source is None or self.policy is None:
            raise ValueError("say what to import and where to: --source ~/openvla-7b --policy ~/policies/openvla")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation is {self.normalisation!r}; choose one of {', '.join(NORMALISATIONS)}")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1")


def imported(config: ImportConfig) -> Policy:
    """The policy, whose backbone's weights are mapped from the checkpoint where their dtype is the same.

    Raises:
        ValueError: see the module's docstring; one line says what is wrong with which file.
    """
    assert config.source is not None
    torch.manual_seed(config.seed)
    try:
        policy = _imported(config)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError) as error:
        raise ValueError(
            f"{config.source} describes no model that can be built ({type(error).__name__}: {one_line(error)}); "
            "copy or download its files again"
        ) from error
    if not policy.model.memory.close():
        logger.warning(
            "this memory cannot begin closed: until it is trained, the policy acts otherwise than before"
        )
    policy.model.eval()
    if (nf4 := config.model.nf4) is not None:
        nf4.apply(policy.model.backbone)
        policy = replace(policy, config=replace(policy.config, nf4=nf4))
    return policy


def _imported(config: ImportConfig) -> Policy:
    assert config.source is not None
    added = Added(config.dtype or "bfloat16", config.cameras, config.terms, config.model.memory)
    orbax = is_orbax(config.source)
    content = {} if orbax else read_json(config.source / "config.json")
    if orbax or content.keys() & {"type", "action_horizon"}:
        _refuse_openvlas(config, (*_OPENVLAS, "statistics") if "type" in content else _OPENVLAS)
    if config.pi.relative_actions and not (orbax or "action_horizon" in content):
        raise ValueError(
            f"pi.relative_actions is set, and {config.source} is in none of openpi's layouts, which alone do not "
            "tell it; leave it out"
        )
    if orbax:
        policy = from_orbax(config.source, config.pi, added, config.statistics)
    elif content.get("type") == "smolvla":
        policy = from_lerobot_smolvla(config.source, config.pi, added)
    elif content.get("type") == "pi0_fast":
        policy = from_lerobot_fast(config.source, config.pi, added)
    elif "type" in content:
        policy = from_lerobot(config.source, config.pi, added)
    elif "action_horizon" in content:
        policy = from_openpi(config.source, config.pi, added, config.statistics)
    else:
        policy = _openvla(config)
    return policy


def _refuse_openvlas(config: ImportConfig, names: Sequence[str]) -> None:
    """ValueError for settings that another layout does not read."""
    usual = {field.name: field.default for field in fields(ImportConfig)}
    for name in names:
        if (value := getattr(config, name)) != usual[name]:
            remedy = "merge it with PEFT, and import the result" if name == "adapter" else "leave it out"
            raise ValueError(
                f"{name} is {str(value)!r}, and {config.source} is not in OpenVLA's layout, which alone takes it; "
                f"{remedy} (--pi has the settings of the others)"
            )


def _openvla(config: ImportConfig) -> Policy:
    assert config.source is not None
    assert config.policy is not None
    files = OpenVLAFiles.read(config.source)
    extra = oft_files(config.source)
    key, statistics = _statistics(files, config.statistics, config.unnorm_key)
    chosen = statistics[key]
    head: HeadConfig = OpenVLATokensConfig(config.reasoning_tokens)
    parallel = bool(extra) if config.parallel is None else config.parallel
    if "head" in extra:
        head, parallel = OFTConfig(), True
    if parallel and config.model.memory.longest_plan:
        raise ValueError("model.memory writes plans, and OpenVLA-OFT writes no words; choose another memory")
    chunk, proprio = config.chunk if parallel else 1, "proprio" in extra
    backbone = _backbone(config, files, chunk * chosen.action.dim if parallel else 0, proprio, "film" in extra)
    conventions = _conventions(config, files, key, statistics, chunk, proprio)
    model = IPVLAConfig(backbone, config.model.memory, head, chunk=chunk)
    with tempfile.TemporaryDirectory() as described:  # without weights, so that they are read once, below
        for name, content in files.description().items():
            (Path(described) / name).write_bytes(content)
        bare = replace(model, backbone=replace(backbone, pretrained=Path(described)))
        with no_larger_than(files.weights()):
            policy = Policy.build(bare, conventions, chunk)
    _load(policy, config, files, extra)
    return replace(policy, config=model)


def oft_files(directory: Path) -> dict[str, Path]:
    """OpenVLA-OFT's files of tensors by what is in them, the newest of each kind; none for OpenVLA's own.

    Raises:
        ValueError: there is a head of a kind that is not known here.
    """
    found: dict[str, Path] = {}
    for beginning, kind in _OFT.items():
        paths = sorted(directory.glob(f"{beginning}*.pt"), key=_step)
        if paths:
            found[kind] = paths[-1]
    if "diffusion" in found:
        raise ValueError(
            f"{found['diffusion']} belongs to OFT's diffusion head, which is not known here; use an L1 head"
        )
    return found


def _step(path: Path) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, path.stem.partition("--")[2]))
    return int(digits or -1), path.name


def _statistics(files: OpenVLAFiles, given: Path | None, key: str | None) -> tuple[str, dict[str, Statistics]]:
    """The chosen dataset, and the statistics of all with actions as large.

    A file beside `config.json` is the fine-tuning's own, and wins over what the base's config says.
    """
    path = given or files.directory / "dataset_statistics.json"
    content: Mapping[str, Any] = files.config.get("norm_stats") or {}
    where = f"{files.directory / 'config.json'} (norm_stats)"
    if path.exists() or given is not None:
        content, where = read_json(path), str(path)
    if not content:
        raise ValueError(
            f"{files.directory} has no statistics of actions; put dataset_statistics.json beside config.json"
        )
    if key is None and len(content) > 1:
        raise ValueError(
            f"{where} has statistics of {len(content)} datasets; set unnorm_key to one of {', '.join(content)}"
        )
    key = key or next(iter(content))
    if key not in content and f"{key}_no_noops" in content:  # as OpenVLA's own evaluation of LIBERO looks for it
        key = f"{key}_no_noops"
    if key not in content:
        raise ValueError(
            f"unnorm_key is {key!r}, and {where} has no statistics of it; {did_you_mean(key, content)}"
        )
    try:
        every = {name: Statistics.from_dict(_complete(values)) for name, values in content.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not in OpenVLA's schema ({error!r}); copy it again") from None
    size = every[key].action.dim
    return key, {name: one for name, one in every.items() if one.action.dim == size}


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Some files leave out the proprioception and the counts."""
    empty: dict[str, list[float]] = {name: [] for name in ("mean", "std", "min", "max", "q01", "q99", "mask")}
    return {"proprio": empty, "num_transitions": 0, "num_trajectories": 0, **values}


def _backbone(
    config: ImportConfig, files: OpenVLAFiles, places: int, proprio: bool, film: bool
) -> PrismaticConfig:
    stored = str(files.config.get("torch_dtype", "bfloat16"))
    vicuna = "vicuna" in str(files.config.get("llm_backbone_id"))
    space = config.reasoning_tokens == 0 if config.ends_in_space is None else config.ends_in_space
    usual = _VICUNA + (" TASK:" if config.reasoning_tokens else "") if vicuna else PrismaticConfig.prompt
    assert config.policy is not None
    return PrismaticConfig(
        config.policy / "backbone",
        config.dtype or (stored if stored in ("float32", "bfloat16", "float16") else "bfloat16"),
        prompt=config.prompt or usual,
        ends_in_space=space,
        max_prompt_tokens=config.max_prompt_tokens,
        action_places=places,
        proprio=proprio,
        film=film,
    )


def _conventions(
    config: ImportConfig,
    files: OpenVLAFiles,
    key: str,
    statistics: Mapping[str, Statistics],
    chunk: int,
    proprio: bool,
) -> Conventions:
    chosen = statistics[key]
    terms = recorded_terms(key, chosen).changed(config.terms)
    cameras = config.cameras or terms.cameras
    if unknown := not config.cameras and known_standard(key) is None:
        logger.warning(
            "dataset %s is not known here: cameras are taken to be %s; set --cameras for others",
            key,
            ", ".join(cameras),
        )
    count = len(cameras) if config.cameras or unknown else (2 if proprio else 1)
    strategy = files.processor.get("image_resize_strategy", files.config.get("image_resize_strategy"))
    if strategy not in _SHAPES:
        raise ValueError(
            f"{files.directory} has image_resize_strategy {strategy!r}; known are {', '.join(_SHAPES)}"
        )
    fill = files.processor.get("tvf_letterbox_fill") or (127, 127, 127)
    return Conventions(
        statistics=chosen,
        cameras=tuple(cameras)[:count],
        image_size=files.image_size,
        chunk=chunk,
        normalisation=config.normalisation,
        proprio_index=None if proprio else (),
        gripper=terms.gripper,
        recorded=terms,
        mixed=statistics if len(statistics) > 1 else {},
        fitting=Fitting(_SHAPES[strategy], "bicubic", tuple(fill)),  # type: ignore[arg-type]
    )


def _load(policy: Policy, config: ImportConfig, files: OpenVLAFiles, extra: Mapping[str, Path]) -> None:
    """The checkpoint's weights into the policy: base, adapter, OFT's own."""
    backbone = policy.model.backbone
    assert isinstance(backbone, PrismaticBackbone)
    weights = files.weights()
    if config.adapter is not None:
        count = merge_adapter(weights, config.adapter)
        logger.info("%d modules of the adapter in %s are merged", count, config.adapter)
    if "film" in extra:
        weights = {name: x for name, x in weights.items() if not name.startswith("vision_backbone.")}
        weights |= film_vision(extra["film"], config.lora_alpha)
    if "proprio" in extra:
        given = pickled_tensors(extra["proprio"])
        weights |= {f"proprio_projector.{name}": tensor for name, tensor in given.items()}
    backbone.vlm.take(weights, str(files.directory))
    if "head" in extra:
        head = {name: tensor.float() for name, tensor in pickled_tensors(extra["head"]).items()}
        require_same(policy.model.head.state_dict(), head, str(extra["head"]))
        policy.model.head.load_state_dict(head)


def fine_tuning(policy: Policy, directory: Path) -> dict[str, Any]:
    """Settings of `ipvla train` that go on from this policy; the dataset is for the user to name."""
    conventions = policy.transforms.conventions
    terms, state = conventions.recorded, conventions.statistics.proprio
    encoded = draccus.encode(policy.config)
    return {
        "start_from": str(directory),
        "model": {name: encoded[name] for name in ("backbone", "memory", "head", "chunk", "nf4") if encoded[name]},
        "lanes": {"stride": policy.execute},
        "data": {
            "cameras": list(conventions.cameras),
            "image_size": conventions.image_size,
            "proprio": None if conventions.proprio_index is None else list(conventions.proprio_index),
            **({"padded_state": True} if terms is not None and state_is_padded(terms, state) else {}),
        },
    }


def main(config: ImportConfig) -> None:
    """Imports, and says what there is now."""
    assert config.policy is not None
    directory = config.policy
    if directory.exists():
        raise ValueError(f"policy: {directory} is there already; give another directory")
    policy = imported(config)
    size = sum(tensor.nbytes for tensor in policy.model.state_dict().values())
    require_room(directory, size, "its weights", "or put the policy elsewhere")
    policy.save(directory)
    model = policy.config
    beside = replace(model, backbone=model.backbone.beside(directory), head=model.head.beside(directory))
    policy = replace(policy, config=beside)
    train = directory.with_name(f"{directory.name}.train.yaml")
    train.write_text(yaml.safe_dump(fine_tuning(policy, directory), sort_keys=False))
    described = policy.describe()
    print(
        f"{int(described['parameters']):,} parameters, head {described['head']}, memory {described['memory']}: "
        f"written to {directory}\n{policy.contract}\n"
        f"to fine-tune it: ipvla train --config_path {train} --data.dataset ..."
    )


if __name__ == "__main__":
    run(ImportConfig, main, __doc__)
