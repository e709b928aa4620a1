"""The student's hour: docs/libero.md from checkpoint to a paired result, with a tiny OpenVLA of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ipvla.storage import SOURCE_TREE
from tests.checkpoints.conftest import HERE
from tests.data.foreign import write_foreign, write_hdf5
from tests.journeys.page import Shell, commands, section

TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
SMALL = {
    "import": ["--dtype", "float32"],
    "train": [
        *("--use_gpu", "false", "--num_workers", "1", "--training.precision", "fp32", "--data.image_size", "56"),
        *("--data.padded_state", "false"),  # the tiny checkpoint's statistics are of a state of 8 numbers
        *("--model.backbone.dtype", "float32", "--model.lora.rank", "4", "--training.steps", "2"),
        *("--lanes.lanes", "1", "--lanes.window", "2", "--training.log_every", "1"),
    ],
    "evaluate": [
        *("--use_gpu", "false", "--success.episodes", f"{{{TASK}: 1}}", "--success.num_simulators", "1"),
        *("--videos", "0"),
    ],
}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_a_checkpoint_to_a_paired_result(tmp_path: Path) -> None:
    page = section(SOURCE_TREE / "docs" / "libero.md", "OpenVLA with a memory: download, train, evaluate, compare")
    lines = commands(page)
    shell = Shell(tmp_path / "home", SMALL, absent=("hf",))
    write_foreign(shell.home / "ipvla_storage/datasets/libero_spatial_no_noops/1.0.0", inner_name="libero_spatial")
    originals = shell.home / "LIBERO" / "datasets" / "libero_spatial"
    originals.mkdir(parents=True)
    write_hdf5(originals / f"{TASK}_demo.hdf5", (3, 4), {"language_instruction": "put it on the plate"})
    model = shell.home / "openvla-spatial"
    shutil.copytree(HERE / "model", model)
    shutil.copy(HERE / "towers.json", model)
    statistics = json.loads((model / "dataset_statistics.json").read_text())
    named = {"libero_spatial_no_noops": statistics["toy_libero_no_noops"]}
    (model / "dataset_statistics.json").write_text(json.dumps(named))
    shown = shell.run(lines, 850)
    jobs = {line.split()[1] for line in lines if line.startswith("ipvla ")}
    assert jobs == {"data", "convert", "import", "train", "evaluate", "paired"}
    assert "bank_tuned" in shown
    assert (shell.home / "ipvla_storage" / "datasets" / "libero_spatial_mine" / "1.0.0").is_dir()
    for name in ("none_tuned", "bank_tuned"):
        assert (shell.home / "ipvla_storage" / "runs" / "libero" / name / "episodes.sqlite").exists()
