"""A policy for benchmarks of rollout: the real class with random weights, since time is all that counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ipvla.data.conventions import Conventions
from ipvla.data.statistics import Statistics
from ipvla.models.backbones import TinyConfig
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import Policy
from ipvla.sim.protocols import load_protocol

#: What the policy is shown.
CAMERAS = load_protocol("oft").cameras
EXECUTE = 8


def save_untrained_policy(directory: Path, cameras: Sequence[str] = CAMERAS) -> Path:
    """Writes a policy with these cameras at 64 px, a GRU and chunks of 8, always the same; returns `directory`."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.5, 0.5, (6000, 7)).astype(np.float32)
    actions[:, 6] = np.sign(actions[:, 6])
    proprio = rng.normal(size=(6000, 8)).astype(np.float32)
    conventions = Conventions(
        Statistics.compute([actions], [proprio]), cameras=tuple(cameras), image_size=64, chunk=EXECUTE
    )
    torch.manual_seed(0)
    config = IPVLAConfig(backbone=TinyConfig(max_prompt_tokens=64), chunk=EXECUTE)
    Policy.build(config, conventions, EXECUTE).save(directory)
    return directory
