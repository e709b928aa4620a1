"""Presets of the memory suites in LIBERO's kitchen: collection, training and evaluation fit one another."""

from pathlib import Path

import pytest

from ipvla.experiment import ExperimentConfig
from ipvla.models.backbones.tiny_tokenizer import tokens_of
from ipvla.sim.suites import SUITES
from ipvla.storage import SOURCE_TREE
from ray_jobs.collect import CollectConfig
from ray_jobs.command_line.settings import parse
from ray_jobs.evaluate import EvaluateConfig

PRESETS = SOURCE_TREE / "ray_jobs" / "experiments" / "libero"


@pytest.mark.parametrize("preset", ["mem", "mem/quick", "kitchen_recall", "kitchen_recall/quick"])
def test_what_is_collected_is_trained_on_and_played(preset: str, tmp_path: Path) -> None:
    def read(kind, job: str, *more: str):  # type: ignore[no-untyped-def]
        path = str(PRESETS / preset / f"{job}.yaml")
        return parse(kind, ["--config_path", path, "--storage_root", str(tmp_path), *more])

    collection = read(CollectConfig, "collect")
    training = read(ExperimentConfig, "train", "--name", "gru")
    evaluation = read(EvaluateConfig, "evaluate", "--policies", "[gru]")
    tasks = {task.name: task for task in SUITES[collection.suite].tasks()}
    assert set(collection.demonstrations) == set(evaluation.success.episodes) <= set(tasks)
    assert "quick" in preset or set(collection.demonstrations) == set(tasks)
    assert collection.suite == evaluation.success.suite
    assert collection.dataset == training.data.dataset
    assert collection.camera_size == training.data.image_size == evaluation.success.camera_size
    assert collection.profile == evaluation.success.profile
    assert training.study == evaluation.study
    assert training.lanes.stride % collection.showing.pictures_every == 0
    assert set(training.data.cameras or collection.views) <= set(collection.views)
    longest = training.model.backbone.max_prompt_tokens
    for task in tasks.values():
        assert all(len(tokens_of(text)) < longest for text in task.phrasings), "with <act> it fits"
