"""Training: it learns what only memory can know, resumes bit for bit, and refuses what it cannot resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.data.lanes import LaneConfig
from ipvla.data.rlds import write_rlds
from ipvla.experiment import DataConfig, Experiment, ExperimentConfig
from ipvla.models.backbones import PaliGemmaConfig
from ipvla.models.heads import FlowConfig
from ipvla.models.memory import (
    BankMemoryConfig,
    GRUMemoryConfig,
    KVMemoryConfig,
    LatentMemoryConfig,
    MemoryConfig,
    NoMemoryConfig,
    PromptMemoryConfig,
    WindowMemoryConfig,
)
from ipvla.models.vla import IPVLAConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.tracking import JsonlSink, Sinks, read_jsonl
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.loop import TrainingConfig, train
from ipvla.training.parallel import World
from ipvla.training.step import OptimizerConfig
from tests.synthetic import SIZE, even_episode

Make = Callable[..., ExperimentConfig]
WORLD = World()


def run(config: ExperimentConfig, experiment: Experiment, save: Callable[[], None] = lambda: None) -> None:
    train(experiment.state, experiment.lanes, config.training, config.optimizer, WORLD, Sinks(), save)


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in experiment.state.model.state_dict().items()}


def loss_of(config: ExperimentConfig, experiment: Experiment) -> float:
    """Mean loss over an epoch's windows that begin in the middle of episodes too."""
    model, lanes = experiment.state.model.eval(), experiment.lanes
    memory, position, losses = model.initial_memory(config.lanes.lanes), experiment.state.position, []
    with torch.no_grad():
        for _ in range(8):
            loss, memory = model(lanes.batch(position), memory)
            losses.append(float(loss))
            position = lanes.after(position)
    return sum(losses) / len(losses)


def trained_loss(make_experiment: Make, memory: MemoryConfig, steps: int) -> float:
    config = make_experiment(
        lanes=LaneConfig(lanes=8, window=10, stride=2), training=TrainingConfig(steps=steps, precision="fp32")
    )
    config = replace(config, model=replace(config.model, memory=memory))
    experiment = config.build(WORLD)
    run(config, experiment)
    return loss_of(config, experiment)


#: Every episode is bright or dark at first and acts by it to the end; a policy that must guess loses more.
GUESSING = 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "steps"), [
    (GRUMemoryConfig(hidden=16), 250), (LatentMemoryConfig(tokens=2), 250), (BankMemoryConfig(length=4), 130),
    (WindowMemoryConfig(), 130), (KVMemoryConfig(length=12), 100), (PromptMemoryConfig(plan_tokens=12), 100),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_memory_learns_what_the_current_frame_does_not_show(
    make_experiment: Make, memory: MemoryConfig, steps: int
) -> None:
    assert trained_loss(make_experiment, memory, steps) < 0.4 * GUESSING


@pytest.mark.slow
def test_no_memory_does_not_learn_it(make_experiment: Make) -> None:
    assert trained_loss(make_experiment, NoMemoryConfig(), 130) > GUESSING


@pytest.mark.parametrize(("stop", "accumulate"), [(3, 1), (6, 1), (3, 2)])
def test_a_resumed_run_ends_with_the_same_weights(
    make_experiment: Make, tmp_path: Path, stop: int, accumulate: int
) -> None:
    config = make_experiment()
    config = replace(config, training=replace(config.training, accumulate=accumulate))
    undisturbed = config.build(WORLD)
    saved = tmp_path / "checkpoint"

    def save() -> None:
        if undisturbed.state.step == stop:
            save_checkpoint(saved, undisturbed.state, undisturbed.policy, WORLD, config.identity)

    run(config, undisturbed, save)
    resumed = config.build(WORLD)
    torch.manual_seed(99)
    load_checkpoint(saved, resumed.state, WORLD, config.identity)
    assert resumed.state.step == stop
    run(config, resumed)
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(resumed).items())
    assert resumed.state.position == undisturbed.state.position
    memories = zip(resumed.state.memory.values(), undisturbed.state.memory.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in memories)


def test_the_memory_is_carried_and_detached(make_experiment: Make) -> None:
    config = make_experiment(training=TrainingConfig(steps=1, precision="fp32"))
    experiment = config.build(WORLD)
    run(config, experiment)
    hidden = experiment.state.memory["hidden"]
    assert hidden.abs().sum() > 0
    assert not hidden.requires_grad


@pytest.mark.parametrize("window", [6, 3])
def test_without_memory_windows_that_are_accumulated_train_as_one(
    make_experiment: Make, tmp_path: Path, window: int
) -> None:
    write_rlds(tmp_path, "even", [even_episode(seed) for seed in range(12)], SIZE)
    config = make_experiment(data_root_dir=tmp_path, data=DataConfig(dataset="even", image_size=SIZE))
    config = replace(config, model=replace(config.model, memory=NoMemoryConfig()))

    def after_a_step(window: int, accumulate: int) -> Experiment:
        training = replace(config.training, steps=1, accumulate=accumulate)
        lanes = LaneConfig(lanes=4, window=window, stride=2, offsets=1)
        experiment = replace(config, training=training, lanes=lanes).build(WORLD)
        run(replace(config, training=training), experiment)
        return experiment

    whole, parts = after_a_step(12, 1), after_a_step(window, 12 // window)
    assert parts.state.position.window == 12 // window
    parameters = zip(whole.state.model.named_parameters(), parts.state.model.parameters(), strict=True)
    for (name, ours), theirs in parameters:
        torch.testing.assert_close(theirs.grad, ours.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_the_memory_is_carried_between_windows_that_are_accumulated(make_experiment: Make) -> None:
    config = make_experiment(training=TrainingConfig(steps=1, precision="fp32", accumulate=2))
    experiment, fresh = config.build(WORLD), config.build(WORLD)
    run(config, experiment)
    memory, position = fresh.state.memory, fresh.state.position
    for _ in range(2):
        _, memory = fresh.state.model(fresh.lanes.batch(position), memory)
        position = fresh.lanes.after(position)
    assert experiment.state.position == position
    torch.testing.assert_close(experiment.state.memory, {name: m.detach() for name, m in memory.items()})


@pytest.mark.parametrize("damage", ["delete", "truncate"])
@pytest.mark.parametrize("file", ["training.json", "optimizer.safetensors", "policy/model.safetensors"])
def test_a_damaged_checkpoint_is_told(make_experiment: Make, tmp_path: Path, file: str, damage: str) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    save_checkpoint(tmp_path / "c", experiment.state, experiment.policy, WORLD, config.identity)
    path = tmp_path / "c" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "c", experiment.state, WORLD, config.identity)


def test_a_checkpoint_of_another_run_is_refused(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    save_checkpoint(tmp_path / "c", experiment.state, experiment.policy, WORLD, config.identity)
    other = replace(config, model=replace(config.model, memory=NoMemoryConfig()))
    with pytest.raises(CheckpointError, match=r"has model .*gru.*this run has .*none"):
        load_checkpoint(tmp_path / "c", other.build(WORLD).state, WORLD, other.identity)


def test_a_checkpoint_from_before_a_setting_came_resumes_with_its_default(
    make_experiment: Make, tmp_path: Path
) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    save_checkpoint(tmp_path / "c", experiment.state, experiment.policy, WORLD, config.identity)
    written = json.loads((tmp_path / "c" / "training.json").read_text())
    del written["identity"]["model"]["backbone"]["trunk_blocks"], written["identity"]["data"]["augmentation"]
    (tmp_path / "c" / "training.json").write_text(json.dumps(written))
    load_checkpoint(tmp_path / "c", config.build(WORLD).state, WORLD, config.identity, config.completed)
    other = replace(config, model=replace(config.model, backbone=replace(config.model.backbone, trunk_blocks=1)))
    with pytest.raises(CheckpointError, match=r"trunk_blocks 0, this run has 1"):
        load_checkpoint(tmp_path / "c", other.build(WORLD).state, WORLD, other.identity, other.completed)


@pytest.mark.parametrize("lanes", [2, 6])
def test_with_other_lanes_the_memory_stays_with_the_lane_of_its_number(
    make_experiment: Make, tmp_path: Path, lanes: int
) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    run(config, experiment)
    save_checkpoint(tmp_path / "c", experiment.state, experiment.policy, WORLD, config.identity)
    other = replace(config, lanes=replace(config.lanes, lanes=lanes))
    resumed = other.build(WORLD)
    fresh = {name: value.clone() for name, value in resumed.state.memory.items()}
    load_checkpoint(tmp_path / "c", resumed.state, WORLD, other.identity)
    kept = min(lanes, config.lanes.lanes)
    for name, value in resumed.state.memory.items():
        torch.testing.assert_close(value[:kept], experiment.state.memory[name][:kept], rtol=0, atol=0)
        torch.testing.assert_close(value[kept:], fresh[name][kept:], rtol=0, atol=0)
    position = experiment.state.position
    assert resumed.state.position == position.on_other_lanes(config.lanes.lanes)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(make_experiment: Make) -> None:
    config = make_experiment(optimizer=OptimizerConfig(lr=3e-3))
    experiment = config.build(WORLD)
    with torch.no_grad():
        experiment.state.model.head.action.bias.fill_(float("nan"))  # type: ignore[union-attr]
    before = weights(experiment)
    with pytest.raises(FloatingPointError, match=r"optimizer\.lr"):
        run(config, experiment)
    for name, value in weights(experiment).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("reader", ["memory", "head"])
def test_a_layer_that_runs_again_for_the_backward_pass_finds_the_cache_as_it_was(
    make_experiment: Make, paligemma_directory: Path, reader: str
) -> None:
    backbone = PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24)
    parts = {"memory": KVMemoryConfig(length=3)} if reader == "memory" else {"head": FlowConfig(hidden=16)}
    config = make_experiment(model=IPVLAConfig(backbone, chunk=2, **parts))
    trained = []
    for again in (False, True):
        training = TrainingConfig(steps=2, precision="fp32", activation_checkpointing=again)
        experiment = replace(config, training=training).build(WORLD)
        run(replace(config, training=training), experiment)
        trained.append(weights(experiment))
    assert all(torch.equal(trained[1][name], value) for name, value in trained[0].items())


def test_metrics_are_logged_by_step(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    train(experiment.state, experiment.lanes, config.training, config.optimizer, WORLD, sink, lambda: None)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"train/loss", "train/grad_norm", "train/lr", "train/frames_per_s"} <= lines[0].keys()


def test_bfloat16_trains_too(make_experiment: Make) -> None:
    config = make_experiment(training=TrainingConfig(steps=2, precision="bf16"))
    experiment = config.build(WORLD)
    before = weights(experiment)
    run(config, experiment)
    changed = [name for name, value in weights(experiment).items() if not torch.equal(value, before[name])]
    assert any("layers.0" in name for name in changed)
    assert all(value.dtype == torch.float32 for value in experiment.state.memory.values())


def test_the_learning_rate_is_a_pure_function_of_the_step() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [config.learning_rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_a_policy_survives_save_and_load(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    experiment = config.build(WORLD)
    policy = experiment.policy
    policy.model.eval()
    policy.save(tmp_path / "policy")
    policy.save(tmp_path / "policy")  # over itself
    loaded = Policy.load(tmp_path / "policy")
    observation = experiment.lanes._dataset.observation(3, 5, ("agentview",))
    chunk, memory = policy.act([observation], policy.initial_memory(1))
    same, same_memory = loaded.act([observation], loaded.initial_memory(1))
    assert chunk.shape == (1, 2, 7)
    assert (chunk == same).all()
    assert all(torch.equal(memory[name], same_memory[name]) for name in memory)
    assert loaded.describe() == policy.describe()
    assert (chunk[..., 3:6] == 0).all(), "constant dimensions come out exactly"


def test_another_models_weights_are_refused(make_experiment: Make, tmp_path: Path) -> None:
    config = make_experiment()
    policy = config.build(WORLD).policy
    policy.save(tmp_path / "policy")
    other = IPVLAConfig(config.model.backbone, NoMemoryConfig(), config.model.head, chunk=2)
    replace(config, model=other).build(WORLD).policy.save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "policy" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"belongs to another model: memory\."):
        Policy.load(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="no policy in"):
        Policy.load(tmp_path / "nowhere")
