"""What frozen vision towers made of a picture is held: the same training, bit for bit, and fewer pictures seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.data.augmentation import AugmentationConfig
from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.training.feature_cache import FeatureCache
from ipvla.training.loop import TrainingConfig
from ipvla.training.parallel import World
from tests.checkpoints.conftest import openvla
from tests.checkpoints.test_fine_tuning import experiment
from tests.training.fine_tuning import equal, trained

__all__ = ["openvla"]


@pytest.fixture
def config(openvla: Path, storage_root: Path, tmp_path: Path) -> ExperimentConfig:
    """Two epochs and more of a tiny OpenVLA, by adapters."""
    base = experiment(openvla, storage_root, tmp_path, GRUMemoryConfig(hidden=8))
    return replace(base, training=replace(base.training, steps=30, checkpoint_every=100))


def cached(config: ExperimentConfig, gib: float) -> ExperimentConfig:
    return replace(config, training=replace(config.training, feature_cache_gib=gib))


def test_training_is_the_same_and_pictures_are_seen_once(config: ExperimentConfig) -> None:
    without, held = trained(config), trained(cached(config, 1))
    assert equal(without, held)
    cache = held.state.model.backbone.see
    assert isinstance(cache, FeatureCache)
    assert cache.hits > 2 * cache.misses > 0


def test_what_has_no_room_is_seen_again(config: ExperimentConfig) -> None:
    """There are three pictures, and room for none."""
    little = trained(cached(config, 1e-9))
    cache = little.state.model.backbone.see
    assert isinstance(cache, FeatureCache)
    assert cache.misses > 3
    assert equal(trained(config), little)


def test_the_oldest_goes_first() -> None:
    seen: list[int] = []

    def see(images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.extend(images[:, 0, 0, 0, 0].tolist())
        return images.flatten(1).float(), {"other": images[:, 0, 0, 0].float()}

    def picture(*values: int) -> torch.Tensor:
        return (
            torch.tensor(values, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 2, 2, 3).contiguous()
        )

    row = 4 * (2 * 2 * 3 + 3)
    cache = FeatureCache(see, 2 * row / 2**30)
    for values, fresh in (((1, 2), [1, 2]), ((1,), []), ((3,), [3]), ((1, 3), []), ((2, 2), [2]), ((1,), [1])):
        seen.clear()
        tokens, extra = cache(picture(*values))
        assert seen == fresh, values
        assert torch.equal(tokens, picture(*values).flatten(1).float())
        assert torch.equal(extra["other"], picture(*values)[:, 0, 0, 0].float())


def test_refused_where_features_change(config: ExperimentConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.augmentation makes other pictures in every epoch"):
        replace(cached(config, 1), data=replace(config.data, augmentation=AugmentationConfig(shift_px=2)))
    assert config.model.lora is not None
    lora = replace(config.model.lora, extra=("projector.fc1",))
    for model in (replace(config.model, lora=None), replace(config.model, lora=lora)):
        with pytest.raises(ValueError, match="the vision towers are trained"):
            replace(cached(config, 1), model=model).build(World())
    with pytest.raises(ValueError, match="it must be at least 0"):
        TrainingConfig(feature_cache_gib=-1)
