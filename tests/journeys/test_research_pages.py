"""docs/RESEARCH_PIPELINE.md, forgetting.md and heads.md: their commands in order, in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE
from tests.journeys.page import Shell, commands

DOCS = SOURCE_TREE / "docs"
STEPS = [
    *("--training.steps", "2", "--training.log_every", "1", "--training.checkpoint_every", "2"),
    *("--num_workers", "1", "--lanes.lanes", "2", "--lanes.window", "4"),
]
SMALL = {
    "collect *pretraining*": ["--demonstrations", "{ground_red: 3}"],
    "collect *new_task*": ["--demonstrations", "{ground_yellow: 2}"],
    "collect *probe*": ["--demonstrations", "{ground_red: 3}"],
    "subspaces": ["--probe.records", "48", "--icsm.rank", "4"],
    "train *method_icsm*": [*STEPS, "--forgetting.probe.records", "48", "--forgetting.thermostat.batch", "8"],
    "train *input_decay*": STEPS,
    "train": STEPS,
    "evaluate *flow*": ["--success.episodes", "{ground_red: 1}", "--success.num_simulators", "1", "--videos", "0"],
    "evaluate": ["--success.episodes", "{ground_yellow: 1}", "--success.num_simulators", "1"],
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_demonstrations_to_a_method_against_forgetting(tmp_path: Path, ray_address: str) -> None:
    pipeline = commands((DOCS / "RESEARCH_PIPELINE.md").read_text())
    methods = [line for line in commands((DOCS / "forgetting.md").read_text()) if line.startswith("ipvla ")]
    assert [line.split()[1] for line in pipeline if line.startswith("ipvla ")] == [
        *("collect", "collect", "collect", "train", "subspaces", "train", "train", "evaluate"),
    ]
    assert [line.split()[1] for line in methods] == ["train"]
    shell = Shell(tmp_path / "home", SMALL, ray_address=ray_address)
    shell.run([*pipeline, *methods], 700)
    runs = shell.home / "ipvla_storage" / "runs" / "forgetting"
    for name in ("pretrained", "baseline_lora", "method_icsm_hsw_thermostat", "input_decay"):
        assert (runs / name / "policy" / "policy.json").exists(), name
        assert (runs / name / "episodes.sqlite").exists() == (name != "input_decay")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_heads_that_integrate(tmp_path: Path, ray_address: str) -> None:
    lines = commands((DOCS / "heads.md").read_text())
    assert [line.split()[1] for line in lines] == ["evaluate", "train"]
    data = ["--data.dataset", "two", "--data.image_size", "64"]
    small = {"train *one_step*": [*STEPS, *data], "train *flow*": [*STEPS, *data], **SMALL}
    shell = Shell(tmp_path / "home", small, ray_address=ray_address)
    before = [
        'ipvla collect --dataset two --demonstrations "{ground_red: 2}" --camera_size 64',
        "ipvla train --study recall --name flow --model.head.type flow",
    ]
    shell.run([*before, *lines], 500)
    assert (shell.home / "ipvla_storage" / "runs" / "recall" / "one_step" / "policy" / "policy.json").exists()
