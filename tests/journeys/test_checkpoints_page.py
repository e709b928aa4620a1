"""docs/checkpoints.md, every command of it, with tiny checkpoints of random weights in place of downloads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE
from tests.checkpoints.conftest import HERE as OPENVLA
from tests.checkpoints.test_orbax import in_openpis_form, written
from tests.data.foreign import write_foreign
from tests.journeys.page import Shell, commands
from tests.journeys.test_engineer import address

CHECKPOINTS = OPENVLA.parent
PI, SMOLVLA = CHECKPOINTS / "pi", CHECKPOINTS / "smolvla"
TASK = "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
PIS = ("--dtype", "float32", "--pi.tokenizer", str(PI / "tokenizer"), "--pi.vision_heads", "3")
SMALL = {
    "import *smolvla*": [
        *("--dtype", "float32", "--pi.tokenizer", str(SMOLVLA / "tokenizer"), "--pi.vision_heads", "3"),
        *("--pi.head_size", "8"),
    ],
    "import *pi0*": PIS,
    "import": ["--dtype", "float32"],
    "train": [
        *("--use_gpu", "false", "--num_workers", "1", "--training.precision", "fp32", "--training.steps", "2"),
        *("--lanes.lanes", "1", "--lanes.window", "2", "--training.log_every", "1", "--model.lora.rank", "4"),
    ],
    "evaluate": [
        *("--use_gpu", "false", "--success.episodes", f"{{{TASK}: 1}}", "--success.num_simulators", "1"),
        *("--videos", "0"),
    ],
    "serve": ["--use_gpu", "false", "--server.port", "0"],
}


def write_openvla(into: Path, key: str, oft: bool = False) -> None:
    """OpenVLA's layout with the statistics of one dataset, which is called `key`; OFT's files beside it."""
    shutil.copytree(OPENVLA / "model", into)
    shutil.copy(OPENVLA / "towers.json", into)
    if oft:
        for path in (OPENVLA / "oft").iterdir():
            if not path.name.startswith("vision_backbone"):
                shutil.copy(path, into)
    statistics = json.loads((into / "dataset_statistics.json").read_text())["toy_libero_no_noops"]
    if not oft:  # OpenVLA's LIBERO has a 0 before the fingers, OFT's has not
        state = statistics["proprio"]
        state |= {row: [*numbers[:6], 0, *numbers[6:]] for row, numbers in state.items()}
    (into / "dataset_statistics.json").write_text(json.dumps({key: statistics}))


def downloads(home: Path) -> None:
    """What the page has downloaded."""
    write_openvla(home / "openvla-spatial", "libero_spatial_no_noops")
    write_openvla(home / "openvla-7b", "bridge_orig")
    write_openvla(home / "openvla-7b-oft-finetuned-libero-spatial", "libero_spatial_no_noops", oft=True)
    write_openvla(home / "openvla-oft-aloha", "aloha", oft=True)
    write_openvla(home / "ecot-openvla-7b-bridge", "bridge_orig")
    shutil.copytree(OPENVLA / "lora_adapter", home / "adapter")
    shutil.copy(home / "openvla-spatial" / "dataset_statistics.json", home / "adapter")
    shutil.copytree(SMOLVLA / "policy", home / "smolvla_base")
    shutil.copytree(PI / "pi0", home / "pi0_base")
    shutil.copytree(PI / "pi05", home / "pi05_libero_finetuned")
    shutil.copytree(PI / "tokenizer", home / "paligemma-3b-pt-224")
    shutil.copytree(PI / "pi0_fast", home / "pi0fast-libero")
    shutil.copytree(PI / "fast_tokenizer", home / "fast-libero-tokenizer-mean-std")
    jax = home / "pi05_libero"
    shutil.copytree(PI / "openpi_pi05" / "assets", jax / "assets")
    weights = load_file(PI / "pi05" / "model.safetensors")
    written(jax / "params", in_openpis_form({name.removeprefix("model."): x for name, x in weights.items()}))
    write_foreign(home / "ipvla_storage/datasets/libero_spatial_no_noops/1.0.0", inner_name="libero_spatial")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_import_evaluate_train_serve_export_and_plan(tmp_path: Path, ray_address: str) -> None:
    text = (SOURCE_TREE / "docs" / "checkpoints.md").read_text()
    lines = [line for line in commands(text) if re.match(r"(R=|hf|pip|ipvla)", line)]  # not options alone
    jobs = [line.split()[1] for line in lines if line.startswith("ipvla")]
    assert jobs == [*["import"] * 11, "evaluate", "train", "serve", "export", "import", *["doctor"] * 3]
    shell = Shell(tmp_path / "home", SMALL, absent=("hf",), ray_address=ray_address)
    downloads(shell.home)
    place = next(i for i, line in enumerate(lines) if line.startswith("ipvla serve"))
    runs = shell.home / "ipvla_storage" / "runs" / "real"

    shown = shell.run(lines[:place], 900)
    assert "0/1" in shown, "an episode of each policy was played"
    heads = {path.parent.name: Policy.load(path).describe()["head"] for path in runs.glob("*/policy")}
    assert {heads.pop(name) for name in ("oft", "aloha")} == {"oft"}
    assert {heads.pop(name) for name in ("pi0", "pi05", "pi05_jax", "smolvla")} == {"pi0"}
    assert heads.pop("fast") == "pi0_fast"
    assert set(heads.values()) == {"openvla"}

    with shell.running(lines[place]) as process:
        assert address(process)

    shown = shell.run(lines[place + 1 :], 300)
    assert "GiB" in shown
    assert (shell.home / "openvla-tuned" / "model.safetensors").exists()
    assert Policy.load(runs / "nf4" / "policy").config.nf4 is not None
