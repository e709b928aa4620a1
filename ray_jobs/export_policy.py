"""`python -m ray_jobs.export_policy`: a trained policy back into the published layout of its family.

    ipvla export --policy ~/ipvla_storage/runs/real/tuned/policy --into ~/openvla-tuned --unnorm_key my_robot

OpenVLA: safetensors of at most 5 GB with their index, `config.json`, tokenizer, processor and statistics; adapters
are merged, and weights in 4 bits (`model.nf4`) become ordinary ones. OFT's action head and proprioception become
`.pt` files beside them. OpenVLA's own code wants its `*_prismatic.py` files there too: copy them from the
checkpoint that was imported.
pi0, pi0-FAST, pi0.5 and SmolVLA: LeRobot's, with the settings and statistics that were imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from ipvla.files import appearing
from ipvla.models.backbones.imported import ImportedBackbone
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.heads.oft import OFTHead
from ipvla.models.memory import NoMemoryConfig
from ipvla.policy import Policy
from ray_jobs.command_line.cli import run
from ray_jobs.importing.to_lerobot import to_lerobot


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and where to.

    Attributes:
        policy: a policy's directory.
        into: the directory to write, which must not exist yet.
        unnorm_key: what the statistics are called there, if the policy has those of one dataset.
        without_memory: exports the rest of a policy with a memory, for which the layout has no place.
    """

    policy: Path | None = None
    into: Path | None = None
    unnorm_key: str = "ipvla"
    without_memory: bool = False

    def __post_init__(self) -> None:
        if self.policy is None or self.into is None:
            raise ValueError(
                "say what to export and where to: --policy runs/STUDY/NAME/policy --into ~/openvla-tuned"
            )


def export(policy: Policy, into: Path, unnorm_key: str) -> None:
    """Writes the directory, in one rename.

    Raises:
        ValueError: no published layout is known for this policy.
    """
    backbone = policy.model.backbone
    if isinstance(backbone, ImportedBackbone):
        to_lerobot(policy, into)
        return
    if not isinstance(backbone, PrismaticBackbone):
        raise ValueError(
            f"model.backbone.type is {policy.describe()['backbone']}; only prismatic, pi0 and smolvla have a "
            "published layout that is known here"
        )
    if backbone.config.film:
        raise ValueError(
            "a policy with FiLM cannot be exported: OFT's files of it hold adapters that are merged here"
        )
    weights = {name: x.detach().cpu().contiguous() for name, x in backbone.network.state_dict().items()}
    proprio = _part(weights, "proprio_projector.")
    conventions = policy.transforms.conventions
    every = conventions.mixed or {unnorm_key: conventions.statistics}
    statistics = {name: one.to_dict() for name, one in every.items()}
    with appearing(into) as building:
        for name, content in backbone.description.items():
            (building / name).write_bytes(content)
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config = {**backbone.files.config, "norm_stats": statistics, "torch_dtype": dtype}
        (building / "config.json").write_text(json.dumps(config, indent=2))
        (building / "dataset_statistics.json").write_text(json.dumps(statistics, indent=2))
        save_torch_state_dict(weights, building, max_shard_size="5GB")
        if proprio:
            _save(proprio, building / "proprio_projector--latest_checkpoint.pt")
        if isinstance(policy.model.head, OFTHead):
            _save(policy.model.head.state_dict(), building / "action_head--latest_checkpoint.pt")


def _part(weights: dict[str, torch.Tensor], beginning: str) -> dict[str, torch.Tensor]:
    """Takes the weights of one part out."""
    names = [name for name in weights if name.startswith(beginning)]
    return {name.removeprefix(beginning): weights.pop(name) for name in names}


def _save(weights: Mapping[str, Any], path: Path) -> None:
    """With the names that DistributedDataParallel gives, as OFT's own files have them."""
    torch.save({f"module.{name}": tensor.detach().cpu() for name, tensor in weights.items()}, path)


def main(config: ExportConfig) -> None:
    """Exports, and says where to."""
    assert config.policy is not None
    assert config.into is not None
    if config.into.exists():
        raise ValueError(f"into: {config.into} is there already; give another directory")
    policy = Policy.load(config.policy).merged().dequantised()
    if policy.config.memory != NoMemoryConfig() and not config.without_memory:
        raise ValueError(
            f"policy: {config.policy} has a memory, for which the published layout has no place; set "
            "without_memory to export the rest, which acts otherwise"
        )
    export(policy, config.into, config.unnorm_key)
    openvla = isinstance(policy.model.backbone, PrismaticBackbone)
    more = "; OpenVLA's own code wants its *_prismatic.py there too" if openvla else ""
    print(f"written to {config.into}{more}")


if __name__ == "__main__":
    run(ExportConfig, main, __doc__)
