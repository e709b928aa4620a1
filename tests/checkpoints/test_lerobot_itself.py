"""What `ipvla export` writes is loaded by LeRobot itself, in its own environment, and acts there as here.

`make lerobot` makes that environment; IPVLA_LEROBOT_PYTHON names the interpreter of another one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvla.models.heads.pi0 import Pi0Head
from ipvla.policy import Policy
from ipvla.storage import SOURCE_TREE
from ipvla.types import Observation
from ray_jobs.export_policy import ExportConfig
from ray_jobs.export_policy import main as export
from ray_jobs.import_policy import ImportConfig, imported
from ray_jobs.importing.pi import PiConfig

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("IPVLA_LEROBOT_PYTHON", SOURCE_TREE / ".venv" / "lerobot" / "bin" / "python"))
TEXTS = ["pick up the black bowl", "open the top drawer"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"there is no {PYTHON}; run make lerobot"),
]


def started(kind: str, tmp_path: Path) -> Policy:
    """Imported, and then trained, or moved at random: what LeRobot computes lies in no file."""
    source = tmp_path / "source"
    shutil.copytree(HERE / ("smolvla/policy" if kind == "smolvla" else f"pi/{kind}"), source)
    config = json.loads((source / "config.json").read_text())
    more = {"max_decoding_steps": 64} if kind == "pi0_fast" else {}
    (source / "config.json").write_text(json.dumps(config | more))
    family = "smolvla" if kind == "smolvla" else "pi"
    pi = PiConfig(
        str(HERE / family / "tokenizer"), vision_heads=3, head_size=8,
        action_tokenizer=str(HERE / "pi" / "fast_tokenizer"),
    )  # fmt: skip
    policy = imported(ImportConfig(source, tmp_path / "p", dtype="float32", cameras=("one", "two"), pi=pi))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "cognition_proj" not in name:  # a memory's, for which the layout has no place
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
    return policy


def observed(policy: Policy) -> list[Observation]:
    random = np.random.default_rng(3)
    statistics = policy.transforms.statistics.proprio
    states = statistics.mean + statistics.std * random.normal(size=(2, statistics.dim))
    pictures = random.integers(0, 256, (2, 2, 48, 64, 3), np.uint8)
    return [
        Observation({"one": one, "two": two}, state.astype(np.float32), text, 0, f"episode {i}")
        for i, ((one, two), state, text) in enumerate(zip(pictures, states, TEXTS, strict=True))
    ]


def taught(policy: Policy, observations: list[Observation]) -> None:
    """pi0-FAST writes a chunk after some steps of training; a random one writes none."""
    backbone, inputs = policy.model.backbone, policy.transforms.inputs(observations)
    actions = torch.linspace(-0.5, 0.5, 20).view(2, 10, 1).repeat(1, 1, 7)
    weight = torch.ones(2, 10, 7, dtype=torch.bool)
    optimizer = torch.optim.Adam(policy.model.parameters(), 1e-2)
    for _ in range(40):
        features = replace(backbone(inputs).features, language=backbone)
        optimizer.zero_grad()
        policy.model.head.loss(features, actions, weight).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast", "smolvla"])
def test_lerobot_loads_an_export_and_predicts_the_same_chunk(kind: str, tmp_path: Path) -> None:
    policy = started(kind, tmp_path)
    observations = observed(policy)
    if kind == "pi0_fast":
        taught(policy, observations)
    policy.save(tmp_path / "policy")
    export(ExportConfig(tmp_path / "policy", tmp_path / "exported"))

    features = json.loads((tmp_path / "exported" / "config.json").read_text())["input_features"]
    cameras = [name for name in features if ".images." in name][:2]
    given = {
        name: torch.stack([torch.from_numpy(o.images[own]).permute(2, 0, 1) / 255 for o in observations])
        for name, own in zip(cameras, ("one", "two"), strict=True)
    }
    given["observation.state"] = torch.stack([torch.from_numpy(o.proprio) for o in observations])
    head, inputs, noise = policy.model.head, policy.transforms.inputs(observations), None
    if isinstance(head, Pi0Head):
        noise = given["noise"] = torch.randn(2, *head.noise_shape, generator=torch.Generator().manual_seed(7))
    save_file({name: x.contiguous() for name, x in given.items()}, tmp_path / "inputs.safetensors")
    (tmp_path / "inputs.json").write_text(json.dumps(TEXTS))
    beside = HERE / "smolvla" / "vlm.json" if kind == "smolvla" else HERE / "pi" / "fast_tokenizer"
    tokenizer = HERE / ("smolvla" if kind == "smolvla" else "pi") / "tokenizer"
    ran = subprocess.run(
        [
            PYTHON, HERE / "lerobot_chunk.py", tmp_path / "exported", tmp_path / "inputs.safetensors", tokenizer,
            beside, tmp_path / "chunk.safetensors",
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]

    with torch.no_grad():
        seen = replace(policy.model.backbone(inputs).features, language=policy.model.backbone)
        ours = head.sample(seen, noise)
    theirs = load_file(tmp_path / "chunk.safetensors")
    torch.testing.assert_close(ours, theirs["normalised"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(policy.transforms.denormalise(ours), theirs["chunk"].numpy(), rtol=0, atol=1e-4)
