"""docs/data.md, action_tokens.md, ecot.md and models.md: their commands in order, in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ipvla.data.lerobot import Layout
from ipvla.data.pictures import EncodedPictures, encode_png
from ipvla.data.rlds import write_rlds
from ipvla.data.source import Feature, Trajectory
from ipvla.models.backbones.random_paligemma import SMALLEST, save_random_paligemma
from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE
from tests.data.foreign import write_foreign
from tests.data.lerobot.writing import write_lerobot
from tests.data.reasoning import bridge
from tests.journeys.page import Shell, commands
from tests.models.random_vlms import save_random_qwen
from tests.synthetic import SIZE, cue_episode
from tests.training.test_reasoning import LIBERO, WORDS, libero_reasoning, write_libero

DOCS = SOURCE_TREE / "docs"
#: Suites by their public names, and what their metadata call them.
SUITES = {"goal": "libero_goal", "10": "liber_o10", "spatial": "libero_spatial", "object": "libero_object"}
STEPS = [
    *("--use_gpu", "false", "--num_workers", "1", "--training.precision", "fp32", "--training.steps", "2"),
    *("--training.log_every", "1", "--lanes.lanes", "1", "--lanes.window", "2"),
]
SMALL = {
    "train *qwen_vl*": [*STEPS, "--data.image_size", "56", "--model.backbone.dtype", "float32"],
    "train": STEPS,
    "fit_tokens *rvq*": ["--tokenizer.steps", "20", "--tokenizer.batch", "16"],
}


def page(name: str) -> list[str]:
    return [line for line in commands((DOCS / name).read_text()) if line.startswith("ipvla ")]


def jobs(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines]


def pushed(seed: int) -> Trajectory:
    """Of PushT: a picture, a place, where to go."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(0, 512, (13, 2)).astype(np.float32)
    pictures = tuple(encode_png(rng.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(12))
    steps = {
        "observation.image": EncodedPictures(pictures),
        "observation.state": states[:-1],
        "action": states[1:],
        "task": ("push the T",) * 12,
    }
    return Trajectory(steps, f"episode {seed}", {})


def write_pusht(directory: Path) -> None:
    features = {name: Feature("number", (2,), "float32") for name in ("observation.state", "action")}
    features |= {"observation.image": Feature("image", (24, 24, 3), "uint8")}
    write_lerobot(directory, Layout(10, features, None, "pusht"), map(pushed, range(3)))


def downloads(home: Path) -> None:
    datasets = home / "ipvla_storage" / "datasets"
    for suite, inner in SUITES.items():
        write_foreign(datasets / f"libero_{suite}_no_noops" / "1.0.0", inner_name=inner)
    bridge.write(datasets)
    bridge.write(home)
    write_pusht(home / "data" / "pusht")
    write_foreign(home / "data" / "mine" / "1.0.0", inner_name="mine", state="joints", joints=False)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_data_of_every_layout(tmp_path: Path, ray_address: str) -> None:
    lines = page("data.md")
    assert jobs(lines) == ["data", *["train"] * 5, "statistics", "convert"]
    home = tmp_path / "home"
    places = {"/data/": f"{home}/data/", "bridge.json": home / "bridge.json"}
    shell = Shell(home, SMALL, ray_address=ray_address, places=places)
    downloads(home)
    shown = shell.run(lines, 550)
    assert "open the drawer" in shown
    storage = home / "ipvla_storage"
    names = {"goal", "suites", "mixture", "pusht", "mine"}
    assert {path.parent.name for path in storage.glob("runs/recall/*/policy")} == names
    assert len(json.loads((home / "bridge.json").read_text())["bridge_orig"]["proprio"]["mean"]) == 8
    assert (storage / "datasets" / "bridge" / "meta" / "info.json").exists()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_tokens_are_fitted_and_trained_with(tmp_path: Path, ray_address: str) -> None:
    lines = page("action_tokens.md")
    assert jobs(lines) == ["fit_tokens", "train", "fit_tokens"]
    shell = Shell(tmp_path / "home", SMALL, ray_address=ray_address)
    storage = shell.home / "ipvla_storage"
    write_rlds(storage / "datasets", "recall", [cue_episode(seed) for seed in range(12)], SIZE)
    shell.run(lines, 350)
    assert (storage / "runs" / "recall" / "train" / "policy" / "action_tokenizer").is_dir()
    assert (storage / "artifacts" / "tokens_rvq_recall").is_dir()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_reasoning_is_learned(tmp_path: Path, ray_address: str) -> None:
    lines = page("ecot.md")
    assert jobs(lines) == ["train", "train"]
    home = tmp_path / "home"
    of_bridge = [
        *("--data.reasoning.path", str(home / "bridge.json"), "--data.image_size", "28", "--model.lora.rank", "4"),
        *("--model.backbone.pretrained", str(home / "paligemma"), "--model.backbone.dtype", "float32"),
    ]
    every_step = ["--model.reasoning_loss.share", "1.0"]  # of two steps of two, chance may choose none
    small = {"train *bridge.yaml*": [*STEPS, *of_bridge, *every_step], "train": [*STEPS, *every_step]}
    places = {"libero_reasonings.json": home / "libero.json"}
    shell = Shell(home, small, ray_address=ray_address, places=places)
    datasets = home / "ipvla_storage" / "datasets"
    bridge.write(datasets)
    bridge.write_reasoning(home / "bridge.json")
    save_random_paligemma(home / "paligemma", SMALLEST, WORDS.split())
    write_libero(datasets, lambda number: {"demo_id": number})
    (datasets / LIBERO).rename(datasets / "libero_lm_90")
    (home / "libero.json").write_text(json.dumps(libero_reasoning()))
    shell.run(lines, 350)
    for name in ("reasoning/bridge", "recall/train"):
        metrics = (home / "ipvla_storage" / "runs" / name / "metrics.jsonl").read_text()
        assert "train/reasoning_loss" in metrics


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_policy_of_a_vision_language_model(tmp_path: Path, ray_address: str) -> None:
    lines = page("models.md")
    assert jobs(lines) == ["train"]
    home = tmp_path / "home"
    places = {"Qwen/Qwen2.5-VL-3B-Instruct": home / "qwen"}
    shell = Shell(home, SMALL, ray_address=ray_address, places=places)
    save_random_qwen(home / "qwen", 2)
    storage = home / "ipvla_storage"
    write_rlds(storage / "datasets", "recall", [cue_episode(seed) for seed in range(12)], SIZE)
    shell.run(lines, 250)
    described = Policy.load(storage / "runs" / "recall" / "train" / "policy").describe()
    assert (described["backbone"], described["memory"], described["head"]) == ("qwen_vl", "gru", "flow")
