"""What cannot fit is refused before training begins, with the number of frames that would."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ipvla.experiment import ExperimentConfig
from ipvla.models.memory import GRUMemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config
from ipvla.training.parallel import World
from ray_jobs.planning import training_run
from ray_jobs.planning.cards import GIB, Card
from ray_jobs.planning.footprint import gradient_bytes, optimizer_bytes, weight_bytes
from ray_jobs.planning.training_run import require_fits, training_way
from ray_jobs.running.cluster import ClusterError
from ray_jobs.train import train_policy
from tests.checkpoints.conftest import openvla
from tests.checkpoints.test_fine_tuning import experiment

__all__ = ["openvla"]


@pytest.fixture(scope="module")
def tuned(openvla: Path, storage_root: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A tiny OpenVLA with adapters and a memory, on GPUs of which this machine need not have any."""
    made = experiment(openvla, storage_root, tmp_path_factory.mktemp("tuned"), GRUMemoryConfig(hidden=8))
    return replace(made, use_gpu=True, forgetting=None)


@pytest.mark.parametrize("changes", [{}, {"nf4": NF4Config()}, {"lora": None}], ids=["LoRA", "NF4", "all"])
def test_what_does_not_depend_on_frames_is_exact(tuned: ExperimentConfig, changes: dict[str, object]) -> None:
    config = replace(tuned, model=replace(tuned.model, **changes))
    way = training_way(config, config.open_dataset(), "cpu")
    model = config.build(World()).policy.model
    assert way is not None
    held = weight_bytes(model) + gradient_bytes(model) + optimizer_bytes(model)
    assert way.total(0) == pytest.approx(held, rel=1e-3 if "nf4" in changes else 0), "but for scales of NF4"


def test_a_card_too_small_is_refused_and_what_the_line_says_fits(
    tuned: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = tuned.open_dataset()
    way = training_way(tuned, dataset)
    assert way is not None
    card = Card("a small card", way.total(4) / GIB / training_run.USABLE)
    with pytest.raises(ClusterError) as refused:
        require_fits(tuned, dataset, card)
    line = str(refused.value)
    assert line.startswith("training needs ")
    assert "16 frames), and a small card has" in line
    assert "set model.nf4 {}, training.activation_checkpointing true, or lower lanes.lanes x lanes.window" in line
    assert "model.lora" not in line, "it has adapters"
    most = int(re.findall(r"at most (\d+)", line)[0])
    assert most in (3, 4)
    require_fits(replace(tuned, lanes=replace(tuned.lanes, lanes=1, window=most)), dataset, card)
    assert not caplog.text
    again = replace(tuned, training=replace(tuned.training, activation_checkpointing=True))
    less = training_way(again, dataset)
    assert less is not None
    assert less.total(16, checkpointed=True) < way.total(16)


def test_a_card_that_is_filled_to_its_brim_is_warned_of(
    tuned: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = tuned.open_dataset()
    way = training_way(tuned, dataset)
    assert way is not None
    require_fits(tuned, dataset, Card("full", 1.02 * way.total(16) / GIB))
    assert "of the" in caplog.text
    assert "and may fail" in caplog.text
    caplog.clear()
    require_fits(tuned, dataset, Card("roomy", 1.2 * way.total(16) / GIB))
    assert not caplog.text


def test_all_weights_need_more_than_adapters_and_workers_share_them(tuned: ExperimentConfig) -> None:
    dataset = tuned.open_dataset()
    whole = replace(tuned, model=replace(tuned.model, lora=None, memory=NoMemoryConfig()))
    with pytest.raises(ClusterError, match=r"set model\.lora\.rank 32, model\.nf4"):
        require_fits(whole, dataset, Card("none", 1e-6))
    adapted, alone = training_way(tuned, dataset), training_way(whole, dataset)
    sharded = replace(whole, num_workers=4, training=replace(whole.training, sharding="fsdp"))
    four = training_way(sharded, dataset)
    assert adapted is not None
    assert alone is not None
    assert four is not None
    assert adapted.total(1) < alone.total(1)
    assert four.optimizer == alone.optimizer // 4


def test_on_cpus_a_memory_far_too_small_is_warned_of(
    tuned: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    on_cpu, dataset = replace(tuned, use_gpu=False), tuned.open_dataset()
    require_fits(on_cpu, dataset)
    assert not caplog.text
    require_fits(on_cpu, dataset, ram_gib=1e-5)
    assert "of 1 training workers take" in caplog.text
    assert "this machine has 1e-05" in caplog.text


def test_training_is_refused_before_it_writes_anything(
    tuned: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "smallest_card", lambda: Card("a tiny card", 1e-4))
    with pytest.raises(ClusterError, match=r"a tiny card has 0\.0001"):
        train_policy(tuned)
    assert not tuned.run_directory.exists()
