"""A policy that was imported from LeRobot's layout back into it, with what it has learned."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ipvla.files import appearing
from ipvla.models.backbones.imported import ImportedBackbone
from ipvla.models.backbones.smolvla import SmolVLABackbone
from ipvla.models.heads.pi0 import Pi0Head
from ipvla.models.heads.pi0_fast import Pi0FastHead
from ipvla.policy import Policy
from ray_jobs.importing import pi, smolvla


def to_lerobot(policy: Policy, into: Path) -> None:
    """Writes the directory, in one rename; the projection of the memory's cognition is left out.

    Raises:
        ValueError: the policy was not imported from LeRobot's layout.
    """
    backbone, head = policy.model.backbone, policy.model.head
    assert isinstance(backbone, ImportedBackbone)
    assert isinstance(head, Pi0Head | Pi0FastHead)
    if not backbone.published:
        raise ValueError(
            "this policy was not imported from LeRobot's layout, whose config.json and processors it would need; "
            "import LeRobot's form of the checkpoint instead, and train that"
        )
    published = smolvla.published if isinstance(backbone, SmolVLABackbone) else pi.published
    named = {published(name): x.detach().cpu().contiguous() for name, x in policy.model.state_dict().items()}
    weights = {f"model.{name}": x for name, x in named.items() if name is not None}
    if published is pi.published:
        words = weights.pop(f"model.{pi.WORDS}")
        weights[f"model.{pi.PALIGEMMA}lm_head.weight"] = words
        if isinstance(head, Pi0Head):  # the expert's last layer is never used, but LeRobot refuses a file without
            weights[f"model.{pi.EXPERT}lm_head.weight"] = torch.zeros(len(words), head.config.width)
    with appearing(into) as building:
        for name, content in backbone.published.items():
            (building / name).write_bytes(content)
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
