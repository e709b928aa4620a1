"""WiSE-FT: a policy between a teacher and what it was fine-tuned to (Wortsman et al., arXiv 2109.01903)."""

from __future__ import annotations

from pathlib import Path

import torch

from ipvla.models.adapters import adapters
from ipvla.models.vla import fresh_parts
from ipvla.policy import Policy, shape_of
from ipvla.training.target import VLM


@torch.no_grad()
def interpolate(teacher: Path, tuned: Path, coefficient: float) -> Policy:
    """The policy with the effective weights (1 - coefficient) teacher + coefficient tuned.

    Adapters stay adapters: what they add to a weight, (alpha / r) B A, is scaled through B. Of a part that the
    teacher does not have (a memory of another mechanism) the tuned policy's is taken.

    Args:
        teacher: directory of the policy that `tuned` was started from.
        tuned: directory of the fine-tuned policy, with LoRA adapters or without any.
        coefficient: in [0, 1].

    Raises:
        CheckpointError: a policy is missing or damaged.
        ValueError: the coefficient is out of range, or `teacher` is not what `tuned` was started from.
    """
    if not 0 <= coefficient <= 1:
        raise ValueError(f"the coefficient is {coefficient}; it must be in [0, 1], 0 for the teacher")
    begun, policy = Policy.load(teacher), Policy.load(tuned)
    if begun.config.adapted is not None:
        raise ValueError(f"{teacher} has adapters; the teacher is the policy that they were put on")
    if policy.config.osf is not None:
        raise ValueError(
            f"{tuned} was trained under OSF, whose factors have no straight line between two policies"
        )
    if begun.transforms.statistics.to_dict() != policy.transforms.statistics.to_dict():
        raise ValueError(
            f"{teacher} and {tuned} have different normalisations; give the teacher that was started from"
        )
    before, after = dict(begun.model.named_parameters()), _without_adapters(policy)
    fresh = fresh_parts({n: p.shape for n, p in after.items()}, {n: p.shape for n, p in before.items()})
    after = {name: weight for name, weight in after.items() if name.partition(".")[0] not in fresh}
    if wrong := [name for name in after if shape_of(before, name) != shape_of(after, name)]:
        raise ValueError(
            f"{wrong[0]} is {shape_of(after, wrong[0])} in {tuned} and {shape_of(before, wrong[0])} in {teacher} "
            f"({len(wrong)} weights differ); give the teacher that was started from"
        )
    for name, weight in after.items():
        weight.lerp_(before[name].to(weight.dtype), 1 - coefficient)
    for adapter in adapters(policy.model.backbone).values():
        adapter.b.mul_(coefficient)
    return policy


def _without_adapters(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """The weights under the names that they have in a model without adapters, which are left out."""
    added = {id(p) for found in adapters(policy.model.backbone).values() for p in (found.a, found.b)}
    return {
        name.replace(f"{VLM}base_model.model.", VLM).replace(".base_layer.", "."): weight
        for name, weight in policy.model.named_parameters()
        if id(weight) not in added
    }
