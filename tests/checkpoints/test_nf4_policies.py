"""Published checkpoints in 4 bits: imported, saved, answered, trained by adapters, and exported again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ipvla.models.memory import BankMemoryConfig, NoMemoryConfig
from ipvla.models.nf4 import NF4Config, quantised
from ipvla.policy import Policy, state
from ipvla.training.parallel import World
from ipvla.types import Observation
from ray_jobs.export_policy import ExportConfig
from ray_jobs.export_policy import main as export_job
from ray_jobs.import_policy import ImportConfig, ImportedModelConfig, imported, main
from ray_jobs.importing.pi import PiConfig
from tests.checkpoints.test_fine_tuning import SEEN, experiment
from tests.checkpoints.test_oft import CAMERAS
from tests.checkpoints.test_openvla_policy import act
from tests.training.test_loop import loss_of, run

HERE = Path(__file__).parent
NF4 = ImportedModelConfig(nf4=NF4Config())


def same(a: Policy, b: Policy) -> bool:
    one, two = state(a.model), state(b.model)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_openvla(openvla: Path, tmp_path: Path) -> None:
    config = ImportConfig(openvla, tmp_path / "p", "toy_libero_no_noops", cameras=CAMERAS[:1])
    main(config)
    packed = replace(config, policy=tmp_path / "q", model=NF4)
    made = imported(packed)
    main(packed)
    plain, bits = Policy.load(tmp_path / "p"), Policy.load(tmp_path / "q")
    assert same(made, bits)
    assert not any(parameter.is_meta for parameter in bits.model.parameters())
    np.testing.assert_array_equal(act(made, SEEN), act(bits, SEEN))
    assert json.loads((tmp_path / "q" / "policy.json").read_text())["model"]["nf4"] == {
        "double": True,
        "compute": None,
        "towers": False,
    }
    assert bits.describe() == {**plain.describe(), "quantised": "nf4"}
    np.testing.assert_array_equal(act(bits.dequantised(), SEEN), act(bits, SEEN))
    layers = quantised(bits.model.backbone)
    assert len(layers) == 7 * bits.model.backbone.num_layers
    held = sum(x.numel() * x.element_size() for layer in layers.values() for x in layer.state_dict().values())
    sizes = [layer.in_features * layer.out_features for layer in layers.values()]
    blocks = [math.ceil(n / 64) for n in sizes]
    assert held == sum(n // 2 + b + 4 * math.ceil(b / 256) + 4 for n, b in zip(sizes, blocks, strict=True))
    inputs = plain.transforms.inputs(SEEN)
    states = [policy.model.backbone(inputs).hidden_states for policy in (plain, bits)]
    error = [float((a - b).norm() / a.norm()) for a, b in zip(*states, strict=True)]
    assert error[0] == 0
    assert 0.01 < error[1] < 0.3, "a tenth of a random weight's size is lost"


def test_adapters_learn_and_are_exported(openvla: Path, storage_root: Path, tmp_path: Path) -> None:
    config = experiment(openvla, storage_root, tmp_path, BankMemoryConfig(), NF4Config())
    assert config.model.nf4 == NF4Config(), "import has written it down"
    built, start = config.build(World()), Policy.load(tmp_path / "policy")
    np.testing.assert_array_equal(act(built.policy, SEEN), act(start, SEEN))
    given = {name: value.clone() for name, value in state(built.state.model).items()}
    before = loss_of(config, built)
    built.state.model.train()
    run(config, built)
    assert loss_of(config, built) < 0.8 * before
    moved = {name for name, value in state(built.state.model).items() if not torch.equal(value, given[name])}
    assert moved
    assert all("lora_" in name or name.startswith(("memory.", "head.")) for name in moved)
    tuned = built.policy
    tuned.model.eval()
    tuned.save(tmp_path / "tuned")
    learned = act(tuned, SEEN)
    np.testing.assert_array_equal(act(Policy.load(tmp_path / "tuned"), SEEN), learned)
    export_job(ExportConfig(tmp_path / "tuned", tmp_path / "exported", "mine", without_memory=True))
    exported = imported(ImportConfig(tmp_path / "exported", tmp_path / "p", "mine"))
    assert not quantised(exported.model)
    wanted = tuned.merged()
    inputs = exported.transforms.inputs(SEEN)
    for one, two in zip(*(p.model.backbone(inputs).hidden_states for p in (wanted, exported)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_bits_alone_are_exported_as_the_numbers_they_stand_for(openvla: Path, tmp_path: Path) -> None:
    main(ImportConfig(openvla, tmp_path / "p", "toy_bridge", model=NF4))
    export_job(ExportConfig(tmp_path / "p", tmp_path / "out"))
    again = imported(ImportConfig(tmp_path / "out", tmp_path / "q", "toy_bridge"))
    np.testing.assert_array_equal(act(again, SEEN), act(Policy.load(tmp_path / "p"), SEEN))


@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "oft"])
def test_others(oft_film: Path, tmp_path: Path, name: str, towers: bool) -> None:
    pi = PiConfig(str(HERE / "pi" / "tokenizer"), execute=5, vision_heads=3)
    sources = {
        "oft": ImportConfig(oft_film, tmp_path / "p", "toy_libero", cameras=CAMERAS),
        "smolvla": ImportConfig(
            HERE / "smolvla" / "policy",
            tmp_path / "p",
            pi=PiConfig(str(HERE / "smolvla" / "tokenizer"), vision_heads=3, head_size=8),
        ),
        "pi0": ImportConfig(HERE / "pi" / "pi0", tmp_path / "p", pi=pi),
        "pi05": ImportConfig(HERE / "pi" / "pi05", tmp_path / "p", pi=pi),
    }
    config = replace(sources[name], dtype="float32", model=ImportedModelConfig(nf4=NF4Config(towers=towers)))
    main(config)
    bits, plain = Policy.load(tmp_path / "p"), imported(replace(config, model=ImportedModelConfig()))
    assert same(bits, imported(config))
    conventions = plain.transforms.conventions
    rng = np.random.default_rng(0)
    size = conventions.image_size or 64
    pictures = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name in conventions.cameras}
    state_ = rng.normal(size=conventions.statistics.proprio.dim).astype(np.float32)
    seen = [Observation(pictures, state_, "press the button", 0)]
    a, b, c = (act(policy, seen) for policy in (plain, bits, bits.dequantised()))
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(b, c, rtol=0, atol=1e-5)
    settings = yaml.safe_load((tmp_path / "p.train.yaml").read_text())
    assert settings["model"]["nf4"]["towers"] == towers


def test_a_policy_without_the_setting_is_as_before(openvla: Path, tmp_path: Path) -> None:
    """Policies that were saved before there was `nf4`."""
    main(ImportConfig(openvla, tmp_path / "p", "toy_libero"))
    path = tmp_path / "p" / "policy.json"
    described = json.loads(path.read_text())
    del described["model"]["nf4"]
    path.write_text(json.dumps(described))
    assert Policy.load(tmp_path / "p").config.nf4 is None
    assert "nf4" not in yaml.safe_load((tmp_path / "p.train.yaml").read_text())["model"]


def test_memory_none_is_imported_in_bits_too(openvla: Path, storage_root: Path, tmp_path: Path) -> None:
    """From ordinary weights, training quantises by itself."""
    plain = experiment(openvla, storage_root, tmp_path, NoMemoryConfig())
    config = replace(plain, model=replace(plain.model, nf4=NF4Config()))
    packed = imported(ImportConfig(openvla, tmp_path / "q", "toy_libero_no_noops", cameras=CAMERAS[:1], model=NF4))
    np.testing.assert_array_equal(act(config.build(World()).policy, SEEN), act(packed, SEEN))
