"""The methods that others use against forgetting, in the same training as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ipvla.data.source import DatasetError
from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.forgetting import (
    CorDAConfig,
    DistillationConfig,
    EWCConfig,
    GPMConfig,
    L2SPConfig,
    MethodConfig,
)
from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.module_statistics import ModuleStatistics
from ipvla.forgetting.moment_methods import input_space
from ipvla.forgetting.thermostat import ThermostatConfig
from ipvla.models.adapters import OSFConfig, adapters
from ipvla.models.memory import GRUMemoryConfig
from ipvla.policy import Policy
from ipvla.training.checkpoint import load_checkpoint, save_checkpoint
from ipvla.training.parallel import World
from ipvla.training.step import training_step
from tests.training.fine_tuning import PROBE, Log, equal, finish, protected, trained, weights

IDLE: list[MethodConfig] = [L2SPConfig(), EWCConfig(), DistillationConfig()]
PENALTIES: list[MethodConfig] = [
    L2SPConfig(strength=1.0),
    EWCConfig(strength=1.0),
    DistillationConfig(weight=1.0, batch=8),
]
RIVALS = [*PENALTIES, GPMConfig(energy=0.5), CorDAConfig()]


def without_adapters(config: ExperimentConfig) -> ExperimentConfig:
    return replace(config, model=replace(config.model, lora=None))


def added(experiment: Experiment) -> float:
    """||dW||^2 of all adapters."""
    found = adapters(experiment.state.model.backbone).values()
    return sum((x.scale * x.b @ x.a).square().sum().item() for x in found)


def steps(experiment: Experiment, config: ExperimentConfig, count: int) -> dict[str, float]:
    """Trains on the next `count` windows; what the last one told."""
    state, told = experiment.state, {}
    with closing(experiment.lanes.batches(state.position)) as batches:
        for _ in range(count):
            position, batch = next(batches)
            lr = config.optimizer.learning_rate(state.step, config.training.steps)
            told = training_step(state, [batch], lr, config.optimizer.max_grad_norm, autocast=None)
            state.step += 1
            state.position = experiment.lanes.after(position)
    return told


def test_strength_0_changes_nothing(tuned: ExperimentConfig) -> None:
    for config in (tuned, without_adapters(tuned)):
        baseline = trained(config)
        for method in IDLE:
            assert equal(trained(protected(config, method)), baseline), method


@pytest.mark.parametrize("method", PENALTIES, ids=str)
def test_a_penalty_is_logged_beside_the_loss_and_not_in_it(tuned: ExperimentConfig, method: MethodConfig) -> None:
    config = replace(tuned, training=replace(tuned.training, steps=2, log_every=1))
    log, plain = Log(), Log()
    trained(protected(config, method), log)
    trained(config, plain)
    (_, first), (_, second) = log.lines
    assert first["train/penalty"] == pytest.approx(0, abs=1e-9), "before the first step the student is the teacher"
    assert first["train/loss"] == plain.lines[0][1]["train/loss"]
    assert second["train/penalty"] > 0
    assert "train/penalty" not in plain.lines[0][1]
    assert not any(name.startswith("gain/") for name in first), "there is nothing to regulate"


@pytest.mark.parametrize("method", [L2SPConfig, EWCConfig])
def test_the_stronger_the_penalty_the_less_is_added(
    tuned: ExperimentConfig, method: Callable[..., MethodConfig]
) -> None:
    sizes = [added(trained(protected(tuned, method(strength=s)))) for s in (0.0, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


def test_distillation_holds_the_output_where_it_was_recorded(tuned: ExperimentConfig) -> None:
    def gap(method: DistillationConfig) -> float:
        log = Log()
        config = replace(tuned, training=replace(tuned.training, steps=20))
        trained(protected(config, method), log)
        return log.lines[-1][1]["train/penalty"] / method.weight

    weak, strong = (gap(DistillationConfig(weight=w, batch=24)) for w in (1e-9, 10.0))
    assert strong < 0.5 * weak


@pytest.mark.parametrize("method", PENALTIES, ids=str)
def test_without_adapters_every_weight_is_held(tuned: ExperimentConfig, method: MethodConfig) -> None:
    """The gradient that the penalty leaves is autograd's of the written formula."""
    config = protected(without_adapters(tuned), method)
    experiment = config.build(World())
    start = {name: p.detach().clone() for name, p in experiment.state.model.named_parameters()}
    steps(experiment, config, 2)
    state = experiment.state
    assert state.protection is not None
    penalty = state.protection.penalty(state.step)
    assert penalty is not None
    if isinstance(method, L2SPConfig):
        moved = [(p.detach() - start[name]).square().sum() for name, p in state.model.named_parameters()]
        torch.testing.assert_close(penalty.detach(), sum(moved) / 2)
    state.model.zero_grad()
    penalty.backward()
    reached = {name for name, p in state.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in reached} == {"backbone", "memory", "head"}


def test_a_memory_that_the_teacher_does_not_have_is_free_under_ewc(tuned: ExperimentConfig) -> None:
    config = without_adapters(tuned)
    config = replace(config, model=replace(config.model, memory=GRUMemoryConfig(hidden=9)))
    state = trained(protected(config, EWCConfig(strength=1.0))).state
    assert state.protection is not None
    penalty = state.protection.penalty(state.step)
    assert penalty is not None
    state.model.zero_grad()
    penalty.backward()
    assert all(p.grad is None for p in state.model.memory.parameters())
    assert any(p.grad is not None for p in state.model.head.parameters())


def test_under_gpm_a_module_answers_the_teachers_inputs_as_the_teacher_does(
    tuned: ExperimentConfig, tmp_path: Path
) -> None:
    experiment = trained(protected(tuned, GPMConfig(energy=0.9)))
    statistics = ModuleStatistics.load(tmp_path / "artifacts" / "icsm_tiny", {"backbone": "tiny", "width": 32})
    assert tuned.start_from is not None
    teacher = Policy.load(tuned.start_from).model.backbone.vlm
    student = experiment.state.model.backbone.vlm.get_base_model()
    learned = 0
    for name, (moment, _) in statistics.modules.items():
        space = input_space(moment, 0.9).float()
        inside = torch.randn(8, space.shape[1]) @ space.T
        with torch.no_grad():
            ours, theirs = student.get_submodule(name), teacher.get_submodule(name)
            torch.testing.assert_close(ours(inside), theirs(inside), atol=1e-5, rtol=1e-5)
            learned += not torch.allclose(ours(torch.randn(8, len(space))), theirs(torch.randn(8, len(space))))
    assert learned == len(statistics.modules)
    assert all(adapter.b.any() for adapter in adapters(experiment.state.model.backbone).values())


def interrupted(config: ExperimentConfig, tmp_path: Path) -> Experiment:
    """Trained to the end from a checkpoint that was taken after three steps."""
    first = config.build(World())
    steps(first, config, 3)
    save_checkpoint(tmp_path / "checkpoint", first.state, first.policy, World(), config.identity)
    resumed = config.build(World())
    load_checkpoint(tmp_path / "checkpoint", resumed.state, World(), config.identity)
    finish(resumed, config)
    return resumed


@pytest.mark.parametrize("method", RIVALS, ids=str)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    tuned: ExperimentConfig, tmp_path: Path, method: MethodConfig
) -> None:
    config = protected(tuned, method)
    resumed = interrupted(config, tmp_path)
    whole = trained(config)
    assert equal(resumed, whole)
    assert not equal(whole, trained(tuned))


def test_what_was_trained_under_osf_or_corda_comes_back_as_a_policy(
    tuned: ExperimentConfig, tmp_path: Path
) -> None:
    osf = replace(tuned, model=replace(tuned.model, lora=None, osf=OSFConfig(last_layers=4)))
    corda = protected(tuned, CorDAConfig())
    assert (tuned.exports_adapters, osf.exports_adapters, corda.exports_adapters) == (True, True, False)
    assert tuned.start_from is not None
    teacher = Policy.load(tuned.start_from)
    dataset = tuned.data.build(tuned.datasets)
    seen = [dataset.observation(episode, 0, ("agentview",)) for episode in (0, 1)]
    before, _ = teacher.act(seen, teacher.initial_memory(2))
    for config in (osf, corda):
        begun = config.build(World()).policy
        begun.model.eval()
        assert begun.act(seen, begun.initial_memory(2))[0] == pytest.approx(before, abs=1e-4)
        policy = trained(config).policy
        policy.save(tmp_path / "policy")
        policy.model.eval()
        loaded = Policy.load(tmp_path / "policy")
        after, _ = policy.act(seen, policy.initial_memory(2))
        assert (loaded.act(seen, loaded.initial_memory(2))[0] == after).all()
        assert after != pytest.approx(before, abs=1e-3)


def test_osf_goes_on_from_a_checkpoint(tuned: ExperimentConfig, tmp_path: Path) -> None:
    config = replace(tuned, model=replace(tuned.model, lora=None, osf=OSFConfig(last_layers=4)))
    assert equal(interrupted(config, tmp_path), trained(config))


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """Distributed training as its wrapper sees it: the hooks and the bookkeeping are those of many workers."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("method", PENALTIES, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "all weights"])
def test_distributed_training_takes_the_penalty_too(
    tuned: ExperimentConfig, method: MethodConfig, full: bool
) -> None:
    """Weights that a window leaves out of the loss, but not out of the penalty, are no exception."""
    config = protected(without_adapters(tuned) if full else tuned, method)
    plain, wrapped = config.build(World()), config.build(World())
    wrapped.state.trained = DistributedDataParallel(wrapped.state.model, find_unused_parameters=True)
    unwrapped, told = steps(plain, config, 3), steps(wrapped, config, 3)
    assert told["penalty"] == pytest.approx(unwrapped["penalty"])
    for name, value in weights(wrapped).items():
        torch.testing.assert_close(value, weights(plain)[name], msg=lambda m, n=name: f"{n}: {m}")


def test_l2_sp_needs_no_artifact(tuned: ExperimentConfig) -> None:
    trained(protected(tuned, L2SPConfig(strength=1.0), artifact="nothing"))


def test_a_penalty_that_is_not_finite_is_refused_before_it_does_harm(tuned: ExperimentConfig) -> None:
    config = protected(tuned, L2SPConfig(strength=1e30))
    experiment = config.build(World())
    steps(experiment, config, 1)
    for adapter in adapters(experiment.state.model.backbone).values():
        adapter.b.data.fill_(1e10)
    before = {name: value.clone() for name, value in weights(experiment).items()}
    with pytest.raises(FloatingPointError, match=r"the penalty of forgetting\.method is inf at step 1; lower its"):
        steps(experiment, config, 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(experiment).items())


def test_what_does_not_fit_is_refused(tuned: ExperimentConfig, tmp_path: Path) -> None:
    artifact = tmp_path / "artifacts" / "icsm_tiny"
    ewc, distillation = EWCConfig(strength=1.0), DistillationConfig(weight=1.0)
    with pytest.raises(ValueError, match=r"thermostat is set, but l2_sp has no gains to regulate"):
        protected(tuned, L2SPConfig(strength=1.0), thermostat=ThermostatConfig())
    with pytest.raises(ValueError, match="works on LoRA adapters; set model"):
        protected(without_adapters(tuned), GPMConfig()).build(World())
    lora = replace(tuned.model.lora, extra=("trunk.conv1",))
    with pytest.raises(ValueError, match=r"adapters on \['trunk.conv1'\], which are not linear"):
        protected(replace(tuned, model=replace(tuned.model, lora=lora)), GPMConfig()).build(World())
    with pytest.raises(DatasetError, match="nothing"):
        protected(tuned, distillation, probe=replace(PROBE, dataset="nothing")).build(World())
    with pytest.raises(ArtifactError, match="probe_sha256"):
        protected(tuned, distillation, probe=replace(PROBE, seed=1)).build(World())
    meta = (artifact / "meta.json").read_text()
    (artifact / "meta.json").write_text(meta.replace('"teacher_sha256": "', '"teacher_sha256": "another '))
    with pytest.raises(ArtifactError, match="teacher_sha256"):
        protected(tuned, ewc).build(World())
    for name, method in (("fisher", ewc), ("outputs", distillation), ("module_statistics", GPMConfig())):
        (artifact / f"{name}.json").unlink()
        with pytest.raises(ValueError, match=r"make it again by ray_jobs\.subspaces with"):
            protected(tuned, method).build(World())
