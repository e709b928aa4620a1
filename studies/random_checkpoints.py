"""Checkpoints in published layouts with random weights of any size: what `ipvla import` reads, without a download.

Processors, tokenizers and all that sizes do not change are those of the tiny checkpoints in tests/checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save

from ipvla.data.statistics import Statistics
from ipvla.models.backbones import PaliGemmaSizes, Pi0BackboneConfig
from ipvla.models.backbones.imported import ImportedBackbone
from ipvla.models.backbones.openvla_files import OpenVLAFiles
from ipvla.models.backbones.prismatic import PrismaticVLM
from ipvla.models.heads import OFTConfig, Pi0HeadConfig
from ipvla.models.heads.oft import OFTHead
from ipvla.models.memory import NoMemoryConfig
from ipvla.models.vla import IPVLAConfig, adopt
from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE
from ray_jobs.importing.pi import imported_conventions
from ray_jobs.importing.to_lerobot import to_lerobot

_EXAMPLES: Final = SOURCE_TREE / "tests" / "checkpoints"
PI_TOKENIZER: Final = _EXAMPLES / "pi" / "tokenizer"
_ROWS: Final = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True)
class Sizes:
    """Of a small model; every MLP is twice as wide as what it stands in.

    Attributes:
        width, layers: of the language model; it has 4 heads.
        vision_width, vision_layers: of each vision tower; it has 4 heads.
        side, patch: of a picture and of a patch, in pixels.
        chunk: actions per answer.
        execute: of a chunk, before the next answer; OFT's plays its whole chunk.
        evaluations: of pi0's flow.
    """

    width: int = 64
    layers: int = 2
    vision_width: int = 64
    vision_layers: int = 3
    side: int = 64
    patch: int = 16
    chunk: int = 4
    execute: int = 4
    evaluations: int = 4

    def __post_init__(self) -> None:
        if self.side % self.patch or self.width % 4 or self.vision_width % 4:
            raise ValueError(
                f"side {self.side} is no multiple of patch {self.patch}, or a width ({self.width}, "
                f"{self.vision_width}) none of 4"
            )


def write_openvla_oft(into: Path, sizes: Sizes, statistics: Statistics, unnorm_key: str, seed: int) -> None:
    """OpenVLA's layout with two towers, and OFT's action head and proprioception beside it, float32."""
    torch.manual_seed(seed)
    example = _EXAMPLES / "openvla" / "model"
    into.mkdir(parents=True)
    for path in (*example.glob("*.json"), example.with_name("towers.json")):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, into)
    language = {
        "hidden_size": sizes.width, "intermediate_size": 2 * sizes.width, "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    config = _json(example / "config.json")
    config |= {"image_sizes": [sizes.side] * 2, "text_config": config["text_config"] | language}
    del config["norm_stats"]
    _write(into / "config.json", config)
    towers = _json(into / "towers.json")
    own = {"patch_size": sizes.patch, "embed_dim": sizes.vision_width, "depth": sizes.vision_layers}
    own |= {"num_heads": 4, "mlp_hidden": 2 * sizes.vision_width}
    _write(into / "towers.json", {name: tower | own for name, tower in towers.items()})
    processor = _json(example / "preprocessor_config.json")
    _write(into / "preprocessor_config.json", processor | {"input_sizes": [[3, sizes.side, sizes.side]] * 2})
    _write(into / "dataset_statistics.json", {unnorm_key: statistics.to_dict()})
    vlm = PrismaticVLM(OpenVLAFiles.read(into), statistics.proprio.dim, film=False)
    weights = _with_places({name: x.contiguous() for name, x in vlm.state_dict().items()})
    proprio = "proprio_projector."
    beside = {n.removeprefix(proprio): weights.pop(n) for n in list(weights) if n.startswith(proprio)}
    save_torch_state_dict(weights, into)
    head = OFTHead(OFTConfig(), sizes.width, (sizes.chunk, statistics.action.dim))
    for kind, part in (("proprio_projector", beside), ("action_head", head.state_dict())):
        named = {f"module.{name}": x for name, x in part.items()}
        torch.save(named, into / f"{kind}--0_checkpoint.pt")


def write_pi0(into: Path, sizes: Sizes, statistics: Statistics, seed: int) -> None:
    """LeRobot's layout of pi0 with one camera, float32; the expert is as large as the language model."""
    torch.manual_seed(seed)
    vocabulary = max(Pi0BackboneConfig(pretrained=str(PI_TOKENIZER)).tokenizer().get_vocab().values()) + 1
    language: dict[str, Any] = {
        "width": sizes.width, "layers": sizes.layers, "mlp": 2 * sizes.width, "heads": 4, "key_heads": 1,
        "head_size": sizes.width // 4,
    }  # fmt: skip
    paligemma = PaliGemmaSizes(
        **language, vocabulary=vocabulary + -vocabulary % 64, vision_width=sizes.vision_width,
        vision_layers=sizes.vision_layers, vision_mlp=2 * sizes.vision_width, vision_heads=4, patch=sizes.patch,
        image_size=sizes.side,
    )  # fmt: skip
    prompt_tokens = (sizes.side // sizes.patch) ** 2 + 48
    backbone = Pi0BackboneConfig(
        sizes=paligemma, pretrained=str(PI_TOKENIZER), dtype="float32", max_prompt_tokens=prompt_tokens
    )
    head = Pi0HeadConfig(steps=sizes.evaluations, **language)
    conventions = imported_conventions(statistics, "normal", ("base_0_rgb",), sizes.chunk, {})
    policy = Policy.build(
        IPVLAConfig(backbone, NoMemoryConfig(), head, chunk=sizes.chunk), conventions, sizes.execute
    )
    own = policy.model.backbone
    assert isinstance(own, ImportedBackbone)
    drawn = type(own.network)(own.network.config).state_dict()
    adopt(policy.model, {f"backbone.vlm.{name}": x for name, x in _with_places(drawn).items()})
    own.published = _pi0_files(sizes, statistics)
    to_lerobot(policy, into)


def _pi0_files(sizes: Sizes, statistics: Statistics) -> dict[str, bytes]:
    """What lies beside pi0's weights, by name."""
    example = _EXAMPLES / "pi" / "pi0"
    picture = {"type": "VISUAL", "shape": [3, sizes.side, sizes.side]}
    state = {"type": "STATE", "shape": [statistics.proprio.dim]}
    config = _json(example / "config.json") | {
        "chunk_size": sizes.chunk, "n_action_steps": sizes.execute, "num_inference_steps": sizes.evaluations,
        "image_resolution": [sizes.side] * 2,
        "input_features": {"observation.images.base_0_rgb": picture, "observation.state": state},
        "output_features": {"action": {"type": "ACTION", "shape": [statistics.action.dim]}},
    }  # fmt: skip
    features = (("observation.state", statistics.proprio), ("action", statistics.action))
    rows = {
        f"{name}.{row}": torch.from_numpy(getattr(feature, row)) for name, feature in features for row in _ROWS
    }
    files = {"config.json": json.dumps(config).encode()}
    for name in ("policy_preprocessor", "policy_postprocessor"):
        processor = _json(example / f"{name}.json")
        files[f"{name}.json"] = json.dumps(processor).encode()
        files |= {step["state_file"]: save(rows) for step in processor["steps"] if "state_file" in step}
    return files


def _with_places(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With position embeddings as distinct as trained towers have them, since adapters leave them as they are."""
    places = ("pos_embed", "position_embedding.weight")
    return {name: torch.randn_like(x) / 2 if name.endswith(places) else x for name, x in weights.items()}


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
