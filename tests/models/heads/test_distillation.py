"""One step from several: a flow policy teaches a copy of itself; sampling is chosen when a policy is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.experiment import Experiment, ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.heads import FlowConfig, RegressionConfig, Sampling
from ipvla.policy import Policy
from ipvla.tracking import Sinks
from ipvla.training.loop import train
from ipvla.training.parallel import World
from ray_jobs.evaluate import EvaluateConfig
from ray_jobs.serve import ServeConfig, metadata, serving

Make = Callable[..., ExperimentConfig]
HEAD = FlowConfig(hidden=32, steps=5)


def trained(config: ExperimentConfig) -> Experiment:
    experiment = config.build(World())
    train(
        experiment.state, experiment.lanes, config.training, config.optimizer, World(), Sinks(), save=lambda: None
    )
    experiment.policy.model.eval()
    return experiment


def with_head(config: ExperimentConfig, updates: int, **head: object) -> ExperimentConfig:
    backbone = TinyConfig(width=16, heads=2, mlp=16, trunk_channels=4, layers=2)
    model = replace(config.model, backbone=backbone, head=replace(HEAD, **head))  # type: ignore[arg-type]
    return replace(config, model=model, training=replace(config.training, steps=updates))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher") / "policy"


@pytest.fixture
def taught(make_experiment: Make, teacher: Path) -> ExperimentConfig:
    """Settings that start from a teacher."""
    config = with_head(make_experiment(), 60)
    if not teacher.exists():
        trained(config).policy.save(teacher)
    return replace(config, start_from=teacher)


def distances(student: Policy, teacher: Policy, experiment: Experiment) -> tuple[float, float]:
    """Mean squares to the teacher's chunk of the same noise: of the student's, and of one step of the teacher."""
    observations = [experiment.lanes._dataset.observation(i, 4, ("agentview",)) for i in range(12)]
    observations = [replace(o, episode=f"{i}") for i, o in enumerate(observations)]
    inputs, t = teacher.transforms.inputs(observations), torch.full((12,), 4)
    one_step = replace(teacher.config, head=teacher.config.head.sampled(Sampling(1)))
    single = Policy.build(one_step, teacher.transforms.conventions, teacher.execute, teacher.model)
    chunks = [
        policy.model.eval().act(inputs, policy.initial_memory(12), t, range(12))[0]
        for policy in (teacher, student, single)
    ]
    return tuple(float((chunk - chunks[0]).square().mean()) for chunk in chunks[1:])  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["regression", "reflow"])
def test_a_student_of_one_step_is_nearer_to_the_teacher_than_one_step_of_it(
    kind: str, taught: ExperimentConfig, teacher: Path, tmp_path: Path
) -> None:
    experiment = trained(with_head(taught, 50, distil=kind, steps=1))
    loaded = Policy.load(teacher)
    parts = {name: dict(p.model.named_parameters()) for name, p in (("old", loaded), ("new", experiment.policy))}
    moved = {n.partition(".")[0] for n, p in parts["old"].items() if not p.equal(parts["new"][n])}
    assert moved == {"head"}, "nothing else is trained"
    experiment.policy.save(tmp_path / "student")
    student = Policy.load(tmp_path / "student")
    assert student.describe()["evaluations"] == "1"
    assert all("teacher" not in name for name in student.model.state_dict())
    ours, single = distances(student, loaded, experiment)
    assert ours < 0.8 * single, (ours, single)


def test_a_resumed_student_has_the_same_teacher(taught: ExperimentConfig) -> None:
    config = with_head(taught, 2, distil="regression", steps=1)
    once, again = config.build(World()), config.build(World())
    batch = once.lanes.batch(once.state.position)
    for parameter in once.state.model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    again.state.model.load_state_dict(once.state.model.state_dict())
    losses = [e.state.model.loss(batch, e.state.model.initial_memory(4))[0] for e in (once, again)]
    assert torch.equal(*losses)


def test_a_student_without_a_teacher_is_refused(make_experiment: Make, taught: ExperimentConfig) -> None:
    with pytest.raises(
        ValueError, match=r"model\.head\.distil learns from the policy in start_from, which is not"
    ):
        with_head(make_experiment(), 2, distil="reflow")
    with pytest.raises(ValueError, match=r"model\.head\.distil trains the head alone"):
        replace(make_experiment().model, head=replace(HEAD, distil="reflow"), lora=LoRAConfig())
    with pytest.raises(ValueError, match=r"start_from: its head differs"):
        with_head(taught, 2, hidden=16).build(World())


class TestSampling:
    def test_it_is_chosen_when_the_policy_is_loaded(self, taught: ExperimentConfig, teacher: Path) -> None:
        plain, other = Policy.load(teacher), Policy.load(teacher, sampling=Sampling(integrator="heun"))
        assert [p.describe()["evaluations"] for p in (plain, other)] == ["5", "10"]
        assert other.describe()["integrator"] == "heun"
        assert all(
            torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True)
        )
        assert Policy.load(teacher, sampling=Sampling()).config == plain.config

    def test_results_of_another_sampling_are_other_results(self, taught: ExperimentConfig, teacher: Path) -> None:
        def config(**sampling: object) -> EvaluateConfig:
            return EvaluateConfig(policies=("gru",), sampling=Sampling(**sampling))  # type: ignore[arg-type]

        asked = [config(), config(steps=2), config(steps=2, integrator="heun")]
        sources = [replace(c.source("gru", Policy.load), directory=teacher) for c in asked]  # type: ignore[type-var]
        assert len({source.sha256() for source in sources}) == 3
        assert [source.open().describe()["evaluations"] for source in sources] == ["5", "2", "4"]  # type: ignore[attr-defined]
        assert [c.journal("gru").name for c in asked] == [
            "episodes.sqlite",
            "episodes-steps=2.sqlite",
            "episodes-steps=2-integrator=heun.sqlite",
        ]
        assert [c.conditions for c in asked[:2]] == [{}, {"sampling": "steps=2"}]

    def test_a_server_takes_and_says_it(self, taught: ExperimentConfig, teacher: Path, tmp_path: Path) -> None:
        serving(ServeConfig(policy=teacher, sampling=Sampling(steps=2)), None)
        policy = Policy.load(teacher, sampling=Sampling(steps=2))
        assert metadata(policy, policy.contract, "")["steps"] == "2"
        plain = replace(taught, start_from=None, model=replace(taught.model, head=RegressionConfig(16)))
        plain.build(World()).policy.save(tmp_path / "policy")
        with pytest.raises(ValueError, match=r"sampling: steps=2, and a head of type regression takes no"):
            serving(ServeConfig(policy=tmp_path / "policy", sampling=Sampling(steps=2)), None)

    def test_what_cannot_be_sampled_so_is_refused(self, make_experiment: Make, tmp_path: Path) -> None:
        make_experiment().build(World()).policy.save(tmp_path / "policy")
        with pytest.raises(
            ValueError, match=r"sampling: steps=2, and a head of type regression takes no such steps"
        ):
            Policy.load(tmp_path / "policy", sampling=Sampling(steps=2))
        with pytest.raises(ValueError, match=r"sampling\.integrator: 'huen' is unknown; did you mean 'heun'\?"):
            Sampling(integrator="huen")
        with pytest.raises(ValueError, match=r"sampling: steps=2 has no effect on expert; leave them out"):
            EvaluateConfig(policies=("expert",), sampling=Sampling(steps=2))
