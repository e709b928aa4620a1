"""Distillation holds the output on the probe, and draws its records as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ipvla.forgetting.artifact import ArtifactError
from ipvla.forgetting.distillation import Distillation, DistillationConfig, TeacherOutputs
from tests.forgetting.probed_models import Transformer, prompts

META = {"probe_sha256": "c0ffee", "commit": "ff57e1e"}
RECORDS = torch.cat(prompts())


def batch_of(records: Sequence[int]) -> Tensor:
    return RECORDS[list(records)]


def teacher() -> TeacherOutputs:
    return TeacherOutputs.measure(Transformer(), prompts(), META)


def distillation(student: Transformer, weight: float = 2.0, batch: int = 8, seed: int = 0) -> Distillation:
    return DistillationConfig(weight, batch).build(student, batch_of, teacher(), seed)


def moved() -> Transformer:
    student = Transformer()
    torch.nn.init.normal_(student.head.weight.requires_grad_(True))
    return student


def test_it_is_0_at_the_teacher_and_its_gradient_too() -> None:
    student = Transformer()
    weight = student.head.weight.requires_grad_(True)
    penalty = distillation(student).penalty(0)
    assert float(penalty.detach()) == pytest.approx(0, abs=1e-10)
    penalty.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-6


def test_it_is_the_weighted_mean_divergence_of_the_drawn_records() -> None:
    student = moved()
    penalty = distillation(student)
    drawn = penalty.records(5)
    reference = Transformer().read(batch_of(drawn)).output
    expected = 2 * student.divergence(student.read(batch_of(drawn)).output, reference).mean()
    torch.testing.assert_close(penalty.penalty(5), expected, rtol=1e-5, atol=0)
    assert float(penalty.penalty(5).detach()) > 0


def test_to_follow_its_gradient_is_to_come_back_to_the_teacher() -> None:
    student = moved()
    whole = distillation(student, batch=len(RECORDS))
    optimizer = torch.optim.Adam([student.head.weight], lr=0.1)
    before = float(whole.penalty(0).detach())
    for step in range(60):
        optimizer.zero_grad()
        distillation(student, batch=16).penalty(step).backward()
        optimizer.step()
    assert float(whole.penalty(0).detach()) < 0.05 * before


def test_seed_and_step_alone_decide_the_records() -> None:
    one, other = distillation(Transformer()), distillation(Transformer(), seed=1)
    draws = [one.records(step) for step in range(20)]
    assert draws == [distillation(Transformer()).records(step) for step in range(20)]
    assert draws != [other.records(step) for step in range(20)]
    assert all(sorted(set(draw)) == draw and len(draw) == 8 for draw in draws)
    assert set(range(len(RECORDS))) == {record for step in range(200) for record in one.records(step)}


def test_outputs_come_back_as_they_were_saved(tmp_path: Path) -> None:
    outputs = teacher()
    outputs.save(tmp_path)
    assert torch.equal(TeacherOutputs.load(tmp_path, META).outputs, outputs.outputs)
    assert outputs.outputs.shape == (len(RECORDS), 7)
    with pytest.raises(ArtifactError, match="probe_sha256 c0ffee, this run has bad"):
        TeacherOutputs.load(tmp_path, {"probe_sha256": "bad"})


def test_what_cannot_be_distilled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of distillation is -0\.1"):
        DistillationConfig(weight=-0.1)
    with pytest.raises(ValueError, match="batch of distillation is 0"):
        DistillationConfig(batch=0)
    with pytest.raises(ValueError, match="draws 49 records of a probe of 48"):
        distillation(Transformer(), batch=49)
    other = TeacherOutputs({}, teacher().outputs[:, :5])
    with pytest.raises(ValueError, match=r"outputs are \[8, 5\], the student's \[8, 7\]"):
        DistillationConfig(1.0, 8).build(Transformer(), batch_of, other, 0).penalty(0)
