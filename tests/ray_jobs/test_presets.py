"""Every YAML of ray_jobs/experiments is taken by its job; presets per card say what docs/models.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ipvla.experiment import ExperimentConfig
from ipvla.storage import SOURCE_TREE
from ray_jobs.command_line.jobs import config_class
from ray_jobs.command_line.settings import parse

EXPERIMENTS = SOURCE_TREE / "ray_jobs" / "experiments"
#: A setting at a file's root -> the job that has it, the rarest first; all others are trainings.
JOBS = {
    "experiment": "tune",
    "icsm": "subspaces",
    "probe": "memory_use",
    "success": "evaluate",
    "suite": "collect",
}
#: A suite, not a job's settings (tests/sim/gym).
SUITE = EXPERIMENTS / "gym_aloha" / "aloha.yaml"
PRESETS = sorted(set(EXPERIMENTS.rglob("*.yaml")) - {SUITE})
CARDS = sorted((EXPERIMENTS / "libero").glob("*_lora_*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_every_preset_is_taken_by_its_job(path: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    job = next((JOBS[name] for name in JOBS if name in tree), "train")
    more = ["--policies", "[mine]"] if "success" in tree and job != "tune" else []
    parse(config_class(job), ["--config_path", str(path), "--storage_root", str(tmp_path), *more])


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_presets_per_card_say_what_the_page_says(path: Path, tmp_path: Path) -> None:
    page = (SOURCE_TREE / "docs" / "models.md").read_text()
    row = re.search(rf"^\| `{path.name}` \|.*\| (\d+) = .*\| ([\d.e-]+)", page, re.MULTILINE)
    assert row, f"docs/models.md has no row of {path.name}"
    given = ["--start_from", "policy", "--model.backbone.pretrained", "policy/backbone"]
    config = parse(ExperimentConfig, ["--config_path", str(path), "--storage_root", str(tmp_path), *given])
    frames = config.num_workers * config.lanes.lanes * config.lanes.window * config.training.accumulate
    assert (frames, config.optimizer.lr) == (int(row[1]), float(row[2]))
    assert config.use_gpu
    assert config.model.lora is not None
    halves = "float16" if config.training.precision == "fp16" else "bfloat16"
    assert config.model.backbone.dtype == halves
    assert (halves == "float16") == ("v100" in path.stem), "a V100 has no bfloat16"
