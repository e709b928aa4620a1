"""Points in training and in rollout: the same policy from step 0 on; what is refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ipvla.contract import SIMULATED_HAND, ContractError
from ipvla.data.augmentation import AugmentationConfig
from ipvla.data.geometry import GeometryConfig
from ipvla.data.plan import PlanPosition
from ipvla.data.rlds import write_rlds
from ipvla.data.source import DatasetError
from ipvla.experiment import DataConfig, ExperimentConfig
from ipvla.geometry import CameraGeometry, RecordedGeometry, pinhole
from ipvla.models.backbones import TinyConfig
from ipvla.models.fusion import AttendFusionConfig, FusionConfig, GlobalFusionConfig, GridFusionConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.policy import Policy, policy_contract
from ipvla.rollout.policy_actor import PolicySource
from ipvla.training.parallel import World
from ipvla.types import Episode
from ray_jobs.serve import metadata
from tests.synthetic import SIZE, cue_episode, even_episode

Make = Callable[..., ExperimentConfig]
KINDS = (GlobalFusionConfig(hidden=8), GridFusionConfig(hidden=8), AttendFusionConfig(hidden=8))


def deep_episode(seed: int) -> Episode:
    """Pictures are noise and the state is 0; a near button on the left says +0.8, on the right -0.8."""
    episode = even_episode(seed)
    left, steps, rng = seed % 2 == 0, len(episode.action), np.random.default_rng(seed)
    depth = np.full((SIZE, SIZE), 1.0, np.float32)
    depth[4:12, (2 if left else 8) : (8 if left else 14)] = 0.6
    look = CameraGeometry(depth, pinhole(46, SIZE, SIZE), np.eye(4))
    action = np.zeros_like(episode.action)
    action[:, 0] = 0.8 if left else -0.8
    return replace(
        episode,
        images={"agentview": rng.integers(60, 140, (steps, SIZE, SIZE, 3)).astype(np.uint8)},
        action=action,
        geometry={"agentview": RecordedGeometry.of([look] * steps)},
    )


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    write_rlds(root / "datasets", "deep", [deep_episode(seed) for seed in range(8)], SIZE)
    write_rlds(root / "datasets", "new", [deep_episode(seed) for seed in range(50, 54)], SIZE)
    write_rlds(root / "datasets", "flat", [cue_episode(seed) for seed in range(4)], SIZE)
    return root


@pytest.fixture
def deep(make_experiment: Make, datasets: Path) -> Callable[..., ExperimentConfig]:
    def make(fusion: FusionConfig | None = None, **changes: object) -> ExperimentConfig:
        config = make_experiment(storage_root=datasets, data=DataConfig("deep", image_size=SIZE))
        model = config.model if fusion is None else replace(config.model, fusion=fusion)
        return replace(config, **({"model": model} | changes))  # type: ignore[arg-type]

    return make


def shares_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items() if "fusion." not in name)


@pytest.mark.parametrize("fusion", KINDS)
def test_step_0_is_the_policy_of_pictures_alone(deep: Make, fusion: FusionConfig) -> None:
    fused, plain = deep(fusion).build(World()), deep().build(World())
    assert shares_weights(fused.policy.model, plain.policy.model), "drawn as without"
    batches = [one.lanes.batch(PlanPosition()) for one in (fused, plain)]
    assert batches[0].inputs.points is not None
    assert batches[0].inputs.points.shape == (4, 6, 1, 4, 4, 3)
    assert batches[1].inputs.points is None
    losses = [
        one.policy.model.loss(batch, one.policy.initial_memory(4))[0]
        for one, batch in zip((fused, plain), batches, strict=True)
    ]
    assert torch.equal(*losses)


def trained(config: ExperimentConfig, steps: int = 90) -> Policy:
    """The policy after so many steps of Adam."""
    experiment = config.build(World())
    model, position = experiment.policy.model, PlanPosition()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        loss, _ = model.loss(experiment.lanes.batch(position), model.initial_memory(4))
        adam.zero_grad()
        loss.backward()
        adam.step()
        position = experiment.lanes.after(position)
    return experiment.policy


def test_what_depth_alone_tells_is_learned_and_done_in_new_episodes(deep: Make, tmp_path: Path) -> None:
    backbone = TinyConfig(width=32, heads=2, layers=2, mlp=32, trunk_channels=16)
    model = replace(deep().model, backbone=backbone, memory=NoMemoryConfig(), fusion=GridFusionConfig(hidden=32))
    policy = trained(deep(model=model))
    policy.model.eval()
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy").require_finite()
    dataset = deep(data=DataConfig("new", image_size=SIZE)).open_dataset()
    points = loaded.transforms.points
    seen = [dataset.observation(index, 0, ("agentview",), points) for index in range(4)]
    memory = loaded.initial_memory(1)
    batched, _ = loaded.act(seen, loaded.initial_memory(4))
    assert (np.sign(batched[:, 0, 0]) == [1, -1, 1, -1]).all()
    serial = np.concatenate([loaded.act([one], memory)[0] for one in seen])
    np.testing.assert_allclose(batched, serial, atol=1e-6)
    np.testing.assert_array_equal(batched, policy.act(seen, policy.initial_memory(4))[0])
    with pytest.raises(ValueError, match="observations have none of agentview"):
        loaded.act([replace(seen[0], geometry=None)], memory)


def test_a_saved_policy_asks_for_geometry_and_one_without_is_written_as_before(deep: Make, tmp_path: Path) -> None:
    for name, fusion in (("fused", GridFusionConfig()), ("plain", None)):
        deep(fusion).build(World()).policy.save(tmp_path / name)
    written = (tmp_path / "plain" / "policy.json").read_text()
    assert not any(word in written for word in ("fusion", "points", "geometry"))
    contract = policy_contract(tmp_path / "fused")
    assert contract is not None
    assert contract.geometry
    source = PolicySource(Policy.load, tmp_path / "fused")
    assert source.view(SIMULATED_HAND).geometry
    with pytest.raises(ContractError, match="reads depth, which gym:cart does not give"):
        source.view(SIMULATED_HAND.pictures_alone, "gym:cart")
    assert not PolicySource(Policy.load, tmp_path / "plain").view(SIMULATED_HAND).geometry
    told = metadata(Policy.load(tmp_path / "fused"), contract, "")["observation"]
    assert "observation/image_depth" in told, "a server says that it wants depth"


def test_fusion_is_added_to_a_policy_that_knows_pictures(deep: Make, tmp_path: Path) -> None:
    start = deep(seed=5).build(World()).policy
    start.save(tmp_path / "start")
    config = deep(AttendFusionConfig(), seed=7, start_from=tmp_path / "start")
    config.check(config.open_dataset())
    fused = config.build(World()).policy
    assert shares_weights(fused.model.backbone, start.model.backbone)
    fused.save(tmp_path / "fused")
    again = replace(config, seed=8, start_from=tmp_path / "fused").build(World()).policy
    own, theirs = again.model.backbone.fusion, fused.model.backbone.fusion
    assert own is not None
    assert theirs is not None
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"start_from: its backbone differs in .* fusion\."):
        deep(seed=7, start_from=tmp_path / "fused").build(World())


def without_intrinsics(root: Path) -> None:
    """Beside "deep", "bare": the same features but intrinsics and poses, as a foreign camera records."""
    info = root / "datasets" / "deep" / "1.0.0" / "features.json"
    kept: dict[str, Any] = json.loads(info.read_text())
    steps = kept["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    seen = steps["observation"]["featuresDict"]["features"]
    for name in [name for name in seen if name.endswith(("_intrinsics", "_pose"))]:
        del seen[name]
    bare = root / "datasets" / "bare" / "1.0.0"
    bare.mkdir(parents=True)
    for path in info.parent.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    (bare / "features.json").write_text(json.dumps(kept))


def test_a_fallback_is_named_refused_and_recorded(deep: Make, datasets: Path, tmp_path: Path) -> None:
    without_intrinsics(datasets)
    guess = DataConfig("bare", image_size=SIZE)
    config = deep(GridFusionConfig(), data=guess)
    with pytest.raises(DatasetError, match=r"its fallback is a camera of 60 degrees .*accept_fallback true"):
        config.check(config.open_dataset())
    asked = replace(config, data=replace(guess, geometry=GeometryConfig(50.0, accept_fallback=True)))
    asked.check(asked.open_dataset())
    policy = asked.build(World()).policy
    policy.save(tmp_path / "policy")
    told = json.loads((tmp_path / "policy" / "policy.json").read_text())["transforms"]["points"]
    assert told == {"intrinsics": "fallback", "fallback_fov_deg": 50.0}
    # in rollout the simulator's own camera, which is known, is replaced as well
    rich = (
        deep(GridFusionConfig())
        .open_dataset()
        .observation(0, 0, ("agentview",), deep(KINDS[1]).points(deep(GridFusionConfig()).open_dataset()))
    )
    bare = asked.open_dataset().observation(0, 0, ("agentview",), policy.transforms.points)
    points = [policy.transforms.inputs([one]).points for one in (rich, bare)]
    assert points[0] is not None
    assert torch.equal(points[0], points[1])


def test_what_fusion_cannot_use_is_said_before_a_model_is_built(deep: Make) -> None:
    flat = deep(GridFusionConfig(), data=DataConfig("flat", image_size=SIZE))
    with pytest.raises(DatasetError, match=r"flat/1\.0\.0 has none of agentview; collect it with --showing\.geom"):
        flat.check(flat.open_dataset())
    shifted = DataConfig("deep", image_size=SIZE, augmentation=AugmentationConfig(shift_px=2))
    with pytest.raises(ValueError, match="moves pictures away from their points"):
        deep(GridFusionConfig(), data=shifted)
    with pytest.raises(ValueError, match=r"data\.geometry is set, and model\.fusion\.type none"):
        deep(data=DataConfig("deep", geometry=GeometryConfig()))
