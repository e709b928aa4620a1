"""WiSE-FT: between the teacher and the tuned policy, in a straight line of effective weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.experiment import ExperimentConfig
from ipvla.forgetting import CorDAConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import TinyConfig
from ipvla.models.memory import GRUMemoryConfig
from ipvla.policy import CheckpointError, Policy
from ipvla.training.interpolation import interpolate
from ipvla.training.parallel import World
from ray_jobs import interpolate as job
from ray_jobs.command_line.cli import run
from tests.training.fine_tuning import protected, trained

MODELS = {
    "full": None,
    "lora": LoRAConfig(rank=4, alpha=12, last_layers=4),
    "lora down to a convolution": LoRAConfig(rank=2, modules=("q_proj",), extra=("trunk.conv1",)),
    "lora alone": LoRAConfig(rank=4, freeze_rest=True),
}


def directories(config: ExperimentConfig, lora: LoRAConfig | None, tmp_path: Path) -> tuple[Path, Path]:
    assert config.start_from is not None
    policy = trained(replace(config, model=replace(config.model, lora=lora))).policy
    policy.save(tmp_path / "tuned")
    return config.start_from, tmp_path / "tuned"


def effective(policy: Policy) -> dict[str, torch.Tensor]:
    """All weights, with adapters merged into what they were put on."""
    if policy.config.lora is not None:
        policy.model.backbone.vlm = policy.model.backbone.vlm.merge_and_unload()
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_effective_weights_lie_on_the_line_and_its_ends_are_the_two(
    tuned: ExperimentConfig, tmp_path: Path, name: str
) -> None:
    teacher, student = directories(tuned, MODELS[name], tmp_path)
    begun, ended = effective(Policy.load(teacher)), effective(Policy.load(student))
    assert any(not torch.allclose(begun[weight], ended[weight], atol=1e-3) for weight in begun)
    for coefficient in (0.0, 0.3, 1.0):
        found = effective(interpolate(teacher, student, coefficient))
        assert found.keys() == begun.keys()
        for weight, value in found.items():
            expected = (1 - coefficient) * begun[weight] + coefficient * ended[weight]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_at_the_ends_it_acts_as_they_do(tuned: ExperimentConfig, tmp_path: Path) -> None:
    teacher, student = directories(tuned, LoRAConfig(rank=4), tmp_path)
    dataset = tuned.data.build(tuned.datasets)
    seen = [dataset.observation(episode, 0, ("agentview",)) for episode in (0, 1)]
    for coefficient, end in ((0.0, teacher), (1.0, student)):
        interpolate(teacher, student, coefficient).save(tmp_path / str(coefficient))
        ours, theirs = Policy.load(tmp_path / str(coefficient)), Policy.load(end)
        chunk, _ = ours.act(seen, ours.initial_memory(2))
        expected, _ = theirs.act(seen, theirs.initial_memory(2))
        assert chunk == pytest.approx(expected, abs=1e-5)


def test_what_corda_moved_out_of_the_base_weights_is_on_the_line_too(
    tuned: ExperimentConfig, tmp_path: Path
) -> None:
    assert tuned.start_from is not None
    trained(protected(tuned, CorDAConfig())).policy.save(tmp_path / "tuned")
    begun, ended = effective(Policy.load(tuned.start_from)), effective(Policy.load(tmp_path / "tuned"))
    for weight, value in effective(interpolate(tuned.start_from, tmp_path / "tuned", 0.5)).items():
        torch.testing.assert_close(value, (begun[weight] + ended[weight]) / 2, atol=1e-5, rtol=1e-4)


def test_a_memory_that_the_teacher_does_not_have_is_the_tuned_policys(
    tuned: ExperimentConfig, tmp_path: Path
) -> None:
    other = replace(tuned, model=replace(tuned.model, memory=GRUMemoryConfig(hidden=9), lora=None))
    teacher, student = directories(other, None, tmp_path)
    found, theirs = interpolate(teacher, student, 0.5).model.memory, Policy.load(student).model.memory
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), theirs.parameters(), strict=True))


def test_what_does_not_belong_together_is_refused(tuned: ExperimentConfig, tmp_path: Path) -> None:
    teacher, student = directories(tuned, LoRAConfig(rank=4), tmp_path)
    for coefficient in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"it must be in \[0, 1\]"):
            interpolate(teacher, student, coefficient)
    with pytest.raises(ValueError, match="has adapters; the teacher is the policy"):
        interpolate(student, student, 0.5)
    with pytest.raises(CheckpointError, match="no policy in"):
        interpolate(tmp_path / "nothing", student, 0.5)
    wider = replace(tuned.model, backbone=TinyConfig(width=64, heads=2, mlp=32, trunk_channels=8), lora=None)
    replace(tuned, model=wider, start_from=None).build(World()).policy.save(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"backbone\.\S+ is .* \(\d+ weights differ\); give the teacher"):
        interpolate(tmp_path / "wider", student, 0.5)


def test_the_job_writes_a_policy_and_replaces_none(
    tuned: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher, student = directories(tuned, LoRAConfig(rank=4), tmp_path)
    out = tmp_path / "half"
    arguments = ["--teacher", str(teacher), "--tuned", str(student), "--coefficient", ".5", "--out", str(out)]

    def ending(*given: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["job", *given])
        with pytest.raises(SystemExit) as stop:
            run(job.InterpolateConfig, job.main, job.__doc__)
        return stop.value.code, capfd.readouterr().err

    assert ending(*arguments)[0] in (0, None)
    assert Policy.load(out).config == Policy.load(student).config
    assert ending(*arguments) == (2, f"error: out: {out} is there already; give another directory\n")
    code, told = ending(*arguments[2:])
    assert code == 2
    assert "teacher is not given" in told
